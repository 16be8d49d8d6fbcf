"""Shared by all schedules: checks of arguments, the text of a schedule, and half a cosine wave."""

import math
from typing import Any

from fnlight.errors import ConfigError


def check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, but got {value!r}")


def check_real(name: str, value: Any, low: float = 0.0, high: float = math.inf, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        wanted = f"above {low:g}" if above else f"at least {low:g}"
        raise ConfigError(
            f"{name} must be a finite number, {wanted}{'' if high == math.inf else f' and at most {high:g}'}, but got {value!r}"
        )


def check_schedule(name: str, value: Any) -> None:
    if not callable(value):
        raise ConfigError(f"{name} must be a schedule, a function of the count, but got {value!r}; write constant(...) for a fixed factor")


def text_of(schedule: Any) -> str:
    return getattr(schedule, "__name__", None) or repr(schedule)


def anneal_cos(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * part))
