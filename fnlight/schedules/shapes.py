"""Schedules of one shape: constant, straight, bent, or in stairs."""

from fnlight.schedules._checks import anneal_cos, check_count, check_real
from fnlight.schedules.curve import Curve


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
    check_real("constant(factor)", factor)
    return Curve(f"constant({factor})", lambda count: factor)


def linear(start: float, end: float, total: int) -> Curve:
    """A straight line from `start` at count 0 to `end` at count `total`.

    Args:
        start: The first factor.
        end: The last factor.
        total: How many steps it takes.

    Returns:
        A schedule.

    Raises:
        ConfigError: If a factor is negative or there is no step.

    Example:
        >>> line = linear(1.0, 0.0, total=4)
        >>> [line(count) for count in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    check_real("linear(start)", start)
    check_real("linear(end)", end)
    check_count("linear(total)", total)
    return Curve(f"linear({start}, {end}, total={total})", lambda count: start + (end - start) * min(count, total) / total, total)


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
    check_count("cosine(total)", total)
    check_real("cosine(final)", final)
    return Curve(f"cosine({total}, final={final})", lambda count: anneal_cos(1.0, final, min(count, total) / total), total)


def step_decay(period: int, factor: float = 0.1) -> Curve:
    """A staircase: the learning rate is multiplied by `factor` every `period` steps.

    Args:
        period: Steps of one stair.
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
    check_count("step_decay(period)", period)
    check_real("step_decay(factor)", factor)
    return Curve(f"step_decay({period}, factor={factor})", lambda count: float(factor ** (count // period)))


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
    check_real("exponential(rate)", rate)
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
    check_count("polynomial(total)", total)
    check_real("polynomial(power)", power, above=True)
    check_real("polynomial(final)", final)
    return Curve(
        f"polynomial({total}, power={power}, final={final})",
        lambda count: final + (1.0 - final) * (1.0 - min(count, total) / total) ** power,
        total,
    )
