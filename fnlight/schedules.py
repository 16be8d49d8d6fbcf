"""Schedules: pure functions from completed steps (or epochs) to a factor of the base learning rate.

A schedule counts nothing itself, so there is nothing to save and nothing that could drift: ``schedule(count)`` is the factor of the step
that comes after `count` completed ones. Past its end a schedule holds its last value. Each prints as the code that makes it.

What depends on a metric, and any scheduler of ``torch.optim.lr_scheduler``, stands in `fnlight.replay`.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from fnlight.errors import ConfigError


@attrs.frozen(eq=False, repr=False)
class Curve:
    """A schedule that prints as the code that makes it.

    Args:
        text: That code.
        fn: Maps a count, 0 or more, to a factor.

    Example:
        >>> Curve("halves()", lambda count: 0.5**count)
        halves()
    """

    text: str
    fn: Callable[[int], float]

    def __call__(self, count: int) -> float:
        """Map completed steps (or epochs) to the factor of the base learning rate."""
        return self.fn(count)

    def __repr__(self) -> str:
        return self.text


def _count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, but got {value!r}")


def _real(name: str, value: Any, low: float = 0.0, high: float = math.inf, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        wanted = f"above {low:g}" if above else f"at least {low:g}"
        raise ConfigError(
            f"{name} must be a finite number, {wanted}{'' if high == math.inf else f' and at most {high:g}'}, but got {value!r}"
        )


def _schedule(name: str, value: Any) -> None:
    if not callable(value):
        raise ConfigError(f"{name} must be a schedule, a function of the count, but got {value!r}; write constant(...) for a fixed factor")


def _text(schedule: Any) -> str:
    return getattr(schedule, "__name__", None) or repr(schedule)


def constant(factor: float = 1.0) -> Curve:
    """The same factor at every step.

    Args:
        factor: The factor of the base learning rate.

    Returns:
        A schedule.

    Raises:
        ConfigError: If the factor is negative or not finite.

    Example:
        >>> constant(0.5)(100)
        0.5
    """
    _real("constant(factor)", factor)
    return Curve(f"constant({factor})", lambda count: factor)


def linear(start: float, end: float, steps: int) -> Curve:
    """A straight line from `start` at count 0 to `end` at count `steps`.

    Args:
        start: The first factor.
        end: The last factor.
        steps: How many steps it takes.

    Returns:
        A schedule.

    Raises:
        ConfigError: If a factor is negative or there is no step.

    Example:
        >>> line = linear(1.0, 0.0, steps=4)
        >>> [line(count) for count in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _real("linear(start)", start)
    _real("linear(end)", end)
    _count("linear(steps)", steps)
    return Curve(f"linear({start}, {end}, steps={steps})", lambda count: start + (end - start) * min(count, steps) / steps)


def cosine(total: int, final: float = 0.0) -> Curve:
    """Half a cosine wave from 1 at count 0 down to `final` at count `total`.

    Args:
        total: How many steps it takes.
        final: The last factor.

    Returns:
        A schedule.

    Raises:
        ConfigError: If there is no step, or `final` is negative.

    Example:
        >>> cosine(10)(5)
        0.5

    References:
        Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts" (2017).
    """
    _count("cosine(total)", total)
    _real("cosine(final)", final)
    return Curve(f"cosine({total}, final={final})", lambda count: _anneal_cos(1.0, final, min(count, total) / total))


def warmup(steps: int, then: Callable[[int], float] | None = None) -> Curve:
    """A rise to 1 over `steps` steps, followed by another schedule, which counts from there.

    The first step already learns: the factors are 1/steps, 2/steps, ..., 1. For a first factor of 0 write ``linear(0, 1, steps)``.

    Args:
        steps: How many steps it takes; 0 for none.
        then: What follows; a constant 1 if left out.

    Returns:
        A schedule.

    Raises:
        ConfigError: If `steps` is negative or `then` is no function.

    Example:
        >>> rise = warmup(4)
        >>> [rise(count) for count in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    References:
        Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour" (2017).
    """
    _count("warmup(steps)", steps, least=0)
    after = constant() if then is None else then
    _schedule("warmup(then)", after)
    text = f"warmup({steps})" if then is None else f"warmup({steps}, then={_text(then)})"
    return Curve(text, _rise(steps, after))


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
    _count("warmup_cosine(warmup)", warmup, least=0)
    _count("warmup_cosine(total)", total)
    _real("warmup_cosine(final)", final)
    if warmup >= total:
        raise ConfigError(
            f"warmup_cosine(warmup, total): total counts all steps and must be above warmup, but got warmup={warmup}, total={total}"
        )
    return Curve(f"warmup_cosine(warmup={warmup}, total={total}, final={final})", _rise(warmup, cosine(total - warmup, final)))


def step_decay(every: int, factor: float = 0.1) -> Curve:
    """A staircase: the learning rate is multiplied by `factor` every so many steps.

    Args:
        every: The length of a stair.
        factor: What one stair multiplies by.

    Returns:
        A schedule.

    Raises:
        ConfigError: If a stair has no length, or the factor is negative.

    Example:
        >>> stairs = step_decay(2, factor=0.5)
        >>> [stairs(count) for count in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    _count("step_decay(every)", every)
    _real("step_decay(factor)", factor)
    return Curve(f"step_decay({every}, factor={factor})", lambda count: float(factor ** (count // every)))


def exponential(rate: float) -> Curve:
    """A decay by the same rate at every step: ``rate ** count``.

    Args:
        rate: What each step multiplies by.

    Returns:
        A schedule.

    Raises:
        ConfigError: If the rate is negative.

    Example:
        >>> exponential(0.5)(3)
        0.125
    """
    _real("exponential(rate)", rate)
    return Curve(f"exponential({rate})", lambda count: float(rate**count))


def polynomial(total: int, power: float = 1.0, final: float = 0.0) -> Curve:
    """A polynomial from 1 at count 0 down to `final` at count `total`.

    Args:
        total: How many steps it takes.
        power: 1 for a straight line; the larger, the faster at first.
        final: The last factor.

    Returns:
        A schedule.

    Raises:
        ConfigError: If there is no step, the power is not above 0, or `final` is negative.

    Example:
        >>> polynomial(4, power=2)(2)
        0.25
    """
    _count("polynomial(total)", total)
    _real("polynomial(power)", power, above=True)
    _real("polynomial(final)", final)
    return Curve(
        f"polynomial({total}, power={power}, final={final})",
        lambda count: final + (1.0 - final) * (1.0 - min(count, total) / total) ** power,
    )


def one_cycle(
    total: int, warmup: float = 0.3, start_div: float = 25.0, final_div: float = 1e4, anneal: Literal["cos", "linear"] = "cos"
) -> Curve:
    """One cycle: up from a fraction of the base learning rate, which is the peak, and down to almost nothing.

    Args:
        total: All steps of the cycle.
        warmup: The part of them that goes up, in 0..1.
        start_div: The first factor is ``1 / start_div``.
        final_div: The last factor is ``1 / (start_div * final_div)``.
        anneal: The form of both parts: ``"cos"`` or ``"linear"``.

    Returns:
        A schedule.

    Raises:
        ConfigError: If there is no step, or an argument is out of its range.

    Example:
        >>> cycle = one_cycle(10, anneal="linear")
        >>> [round(cycle(count), 3) for count in (0, 2, 9)]
        [0.04, 1.0, 0.0]

    References:
        Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates" (2018).
    """
    _count("one_cycle(total)", total)
    _real("one_cycle(warmup)", warmup, high=1.0)
    _real("one_cycle(start_div)", start_div, above=True)
    _real("one_cycle(final_div)", final_div, above=True)
    if anneal not in _ANNEAL:
        raise ConfigError(f"one_cycle(anneal) must be one of {sorted(_ANNEAL)}, but got {anneal!r}")
    between, peak, last = _ANNEAL[anneal], float(warmup * total) - 1, total - 1
    first, final = 1.0 / start_div, 1.0 / start_div / final_div

    def cycle(count: int) -> float:
        place = min(count, last)
        if place <= peak and peak > 0:
            return between(first, 1.0, place / peak)
        return between(1.0, final, (place - peak) / (last - peak)) if last > peak else 1.0

    return Curve(f"one_cycle({total}, warmup={warmup}, start_div={start_div}, final_div={final_div}, anneal={anneal!r})", cycle)


def _anneal_cos(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * part))


_ANNEAL: Mapping[str, Callable[[float, float, float], float]] = {
    "cos": _anneal_cos,
    "linear": lambda start, end, part: start + (end - start) * part,
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
        >>> both = join([constant(0.1), linear(1.0, 0.0, steps=2)], [2])
        >>> [both(count) for count in range(5)]
        [0.1, 0.1, 1.0, 0.5, 0.0]
    """
    parts, starts = tuple(schedules), (0, *boundaries)
    if len(parts) != len(starts):
        raise ConfigError(f"join takes one boundary fewer than schedules, but got {len(parts)} schedules and {len(starts) - 1} boundaries")
    for i, part in enumerate(parts):
        _schedule(f"join(schedules)[{i}]", part)
    for before, start in itertools.pairwise(starts):
        _count("join(boundaries)", start)
        if start <= before:
            raise ConfigError(f"join(boundaries) must rise, but got {list(boundaries)}")

    def joined(count: int) -> float:
        i = bisect_right(starts, count) - 1
        return parts[i](count - starts[i])

    return Curve(f"join([{', '.join(map(_text, parts))}], {list(boundaries)})", joined)
