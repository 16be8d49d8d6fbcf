"""Schedules that follow one another: a warm-up first, a decay last."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from fnlight.errors import ConfigError, check_type
from fnlight.schedules._checks import anneal_cos, check_count, check_real, check_schedule, text_of
from fnlight.schedules.curve import Curve
from fnlight.schedules.shapes import constant, cosine


def warmup(warmup: int, then: Callable[[int], float] | None = None) -> Curve:
    """A rise to 1 over `warmup` steps, followed by another schedule, which counts from there.

    The first step already learns: the factors are 1/warmup, 2/warmup, ..., 1. For a first factor of 0 write ``linear(0, 1, total=warmup)``.

    Args:
        warmup: Steps of the rise; 0 for none.
        then: What follows; a constant 1 if left out.

    Returns:
        A schedule.

    Raises:
        ConfigError: If `warmup` is negative or `then` is no function.

    Example:
        >>> rise = warmup(4)
        >>> [rise(count) for count in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    References:
        Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour" (2017).
    """
    check_count("warmup(warmup)", warmup, least=0)
    after = constant() if then is None else then
    check_schedule("warmup(then)", after)
    text = f"warmup({warmup})" if then is None else f"warmup({warmup}, then={text_of(then)})"
    return Curve(text, _rise(warmup, after), _end(warmup, after) if then is not None else warmup)


def _end(start: int, last: Callable[[int], float]) -> int | None:
    """Where schedules that follow one another end: where the last one does."""
    total = last.total if isinstance(last, Curve) else None
    return None if total is None else start + total


def _rise(steps: int, after: Callable[[int], float]) -> Callable[[int], float]:
    return lambda count: (count + 1) / steps if count < steps else after(count - steps)


def warmup_cosine(warmup: int, total: int, final: float = 0.0) -> Curve:
    """A rise to 1 as `warmup` makes it, then half a cosine wave down to `final`.

    Args:
        warmup: Steps of the rise; 0 for none.
        total: All steps, those of the rise among them.
        final: The last factor.

    Returns:
        A schedule.

    Raises:
        ConfigError: If the rise does not end before `total`.

    Example:
        >>> course = warmup_cosine(warmup=2, total=6)
        >>> course
        warmup_cosine(warmup=2, total=6, final=0.0)
        >>> [course(0), course(1), course(2), course(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    check_count("warmup_cosine(warmup)", warmup, least=0)
    check_count("warmup_cosine(total)", total)
    check_real("warmup_cosine(final)", final)
    if warmup >= total:
        raise ConfigError(
            f"warmup_cosine(warmup, total): total counts all steps and must be above warmup, but got warmup={warmup}, total={total}"
        )
    return Curve(f"warmup_cosine(warmup={warmup}, total={total}, final={final})", _rise(warmup, cosine(total - warmup, final)), total)


def wsd(warmup: int, total: int, decay: int, final: float = 0.0, shape: Literal["linear", "cos", "sqrt"] = "linear") -> Curve:
    """Warm-up, stable, decay: a rise to 1 as `warmup` makes it, a plain of 1, and a fall to `final` over the last steps.

    Args:
        warmup: Steps of the rise; 0 for none.
        total: All steps.
        decay: Steps of the fall, the last of `total`.
        final: The last factor.
        shape: The form of the fall: ``"linear"``, ``"cos"``, or ``"sqrt"``, which is 1 minus the root of the part that is done.

    Returns:
        A schedule.

    Raises:
        ConfigError: If rise and fall do not fit into `total`, or an argument is out of its range.

    Example:
        >>> course = wsd(warmup=2, total=8, decay=2)
        >>> [course(count) for count in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]

    References:
        Hu et al., "MiniCPM" (2024); Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations" (2024).
    """
    check_count("wsd(warmup)", warmup, least=0)
    check_count("wsd(total)", total)
    check_count("wsd(decay)", decay)
    check_real("wsd(final)", final)
    if warmup + decay > total:
        raise ConfigError(
            f"wsd(warmup, total, decay): rise and fall must fit into total, but got warmup={warmup}, decay={decay}, total={total}"
        )
    if shape not in _FALLS:
        raise ConfigError(f"wsd(shape) must be one of {sorted(_FALLS)}, but got {shape!r}")
    rest, start = _FALLS[shape], total - warmup - decay

    def plain_and_fall(count: int) -> float:
        return final + (1.0 - final) * rest(min(max(count - start, 0), decay) / decay)

    text = f"wsd(warmup={warmup}, total={total}, decay={decay}, final={final}, shape={shape!r})"
    return Curve(text, _rise(warmup, plain_and_fall), total)


_FALLS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda part: 1.0 - part,
    "cos": lambda part: anneal_cos(1.0, 0.0, part),
    "sqrt": lambda part: 1.0 - math.sqrt(part),
}


def join(schedules: Sequence[Callable[[int], float]], boundaries: Sequence[int]) -> Curve:
    """Several schedules one after the other; each later one counts from its boundary.

    Args:
        schedules: At least one.
        boundaries: The count at which each later one takes over, rising; one fewer than schedules.

    Returns:
        A schedule.

    Raises:
        ConfigError: If the numbers do not fit or the boundaries do not rise.

    Example:
        >>> from fnlight.schedules import linear
        >>> both = join([constant(0.1), linear(1.0, 0.0, total=2)], [2])
        >>> [both(count) for count in range(5)]
        [0.1, 0.1, 1.0, 0.5, 0.0]
    """
    check_type("join(schedules)", schedules, Iterable, "a list of schedules")
    check_type("join(boundaries)", boundaries, Sequence, "a list of counts")
    parts, starts = tuple(schedules), (0, *boundaries)
    if len(parts) != len(starts):
        raise ConfigError(f"join takes one boundary fewer than schedules, but got {len(parts)} schedules and {len(starts) - 1} boundaries")
    for i, part in enumerate(parts):
        check_schedule(f"join(schedules)[{i}]", part)
    for before, start in itertools.pairwise(starts):
        check_count("join(boundaries)", start)
        if start <= before:
            raise ConfigError(f"join(boundaries) must rise, but got {list(boundaries)}")

    def joined(count: int) -> float:
        i = bisect_right(starts, count) - 1
        return parts[i](count - starts[i])

    return Curve(f"join([{', '.join(map(text_of, parts))}], {list(boundaries)})", joined, _end(starts[-1], parts[-1]))
