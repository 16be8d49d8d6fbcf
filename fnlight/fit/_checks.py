"""Converters and validators of the fields of `FitConfig`: converters pass wrong values on, and validators refuse them."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch

from fnlight.checkpoint import ALLOWED
from fnlight.errors import ConfigError

DIFFERENCES = ALLOWED | {"batch_size", "data"}
"""Differences between a checkpoint and a run that can be allowed."""

DIFFERENT = f"some of {', '.join(map(repr, sorted(DIFFERENCES)))}"


def count(least: int, optional: bool = True) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            off = "None for no limit, " if optional else ""
            raise ConfigError(f"FitConfig({field.name}=...) must be {off}a whole number of at least {least}, but got {value!r}")

    return check


def limit(_: Any, field: Any, value: Any) -> None:
    if (
        value is None
        or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
        or (isinstance(value, float) and 0 < value <= 1)
    ):
        return
    raise ConfigError(f"FitConfig({field.name}=...) must be batches (an int >= 1), a fraction (a float in 0..1) or None, but got {value!r}")


def above_zero(_: Any, field: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf")):
        raise ConfigError(f"FitConfig({field.name}=...) must be a number above 0, or None to switch it off, but got {value!r}")


def decay(_: Any, field: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1):
        raise ConfigError(f"FitConfig(ema=...) must be a decay of at least 0 and below 1, or None to switch it off, but got {value!r}")


def flag_or_count(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"FitConfig({field.name}=...) must be True, False or a number of batches >= 1, but got {value!r}")


def accumulate(_: Any, field: Any, value: Any) -> None:
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    begins = list(value) if isinstance(value, Mapping) else [0]
    if not numbers or not all(type(v) is int and v >= 1 for v in numbers) or not all(type(k) is int and k >= 0 for k in begins):
        raise ConfigError(
            f"FitConfig(accumulate=...) must be a number of batches per step (>= 1), or a mapping of first epochs to such numbers, but got {value!r}"
        )
    if 0 not in begins:
        raise ConfigError(f"FitConfig(accumulate=...) as a mapping must start at epoch 0, but got {dict(value)!r}; add 0: 1")


def part(_: Any, field: Any, value: Any) -> None:
    if value is not None and value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(
            f'FitConfig(microbatch=...) must be a number of samples >= 1, "auto", or None to switch it off, but got {value!r}'
        )


def one_of(*allowed: Any) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if value not in allowed:
            raise ConfigError(f"FitConfig({field.name}=...) must be one of {', '.join(map(repr, allowed))}, but got {value!r}")

    return check


def function(_: Any, field: Any, value: Any) -> None:
    if value is not None and not callable(value):
        example = {"stop": 'patience("val/loss", 3)', "keep": "last(1)"}.get(field.name, "steps(50)")
        instead = f"; write fl.steps({value})" if example == "steps(50)" and isinstance(value, int) and not isinstance(value, bool) else ""
        raise ConfigError(f"FitConfig({field.name}=...) must be something like {example}, or None, but got {value!r}{instead}")


def seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


def several(value: Any) -> Any:
    return () if value is None else tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)


def each(kind: Callable[[Any], bool], what: str) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        wrong = [each for each in value if not kind(each)]
        if wrong:
            raise ConfigError(f"FitConfig({field.name}=...) must be {what}, but got {wrong[0]!r:.60}")

    return check


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def own(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value  # later changes to the caller's mapping must not change a run


def device(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


def known_device(_: Any, field: Any, value: Any) -> None:
    try:
        assert isinstance(value, str)
        torch.device("cpu" if value == "auto" else value)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f'FitConfig(device=...) must be "auto" or a device such as "cpu" or "cuda:1", but got {value!r}') from error


def folder(_: Any, field: Any, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"FitConfig(dir=...) must be a directory, a URL, or None to write no files, but got {value!r}")


def renames(_: Any, field: Any, value: Any) -> None:
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(v, str) for pair in value.items() for v in pair)):
        raise ConfigError(f"FitConfig(rename=...) must map names in the checkpoint to names in the model, but got {value!r}")


def pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def first_and_last(_: Any, field: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(n) is int for n in value) or not 1 <= value[0] <= value[1]:
        raise ConfigError(
            f"FitConfig({field.name}=...) must be the first and the last step, such as (100, 102), or None, but got {value!r}"
        )


def path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
