"""Cyclic schedules, which rise and fall."""

from collections.abc import Callable, Mapping
from typing import Literal

from fnlight.errors import ConfigError
from fnlight.schedules._checks import anneal_cos, check_count, check_real
from fnlight.schedules.curve import Curve


def one_cycle(
    total: int, up_fraction: float = 0.3, start_div: float = 25.0, final_div: float = 1e4, anneal: Literal["cos", "linear"] = "cos"
) -> Curve:
    """One cycle: a rise from a small factor to 1, the base learning rate, then a fall to almost 0.

    Args:
        total: Total number of steps of the cycle.
        up_fraction: The fraction of these steps that rises, in 0..1.
        start_div: The first factor is ``1 / start_div``.
        final_div: The last factor is ``1 / (start_div * final_div)``.
        anneal: The shape of both parts: ``"cos"`` or ``"linear"``.

    Returns:
        A schedule.

    Raises:
        ConfigError: If `total` is below 1, or an argument is out of its range.

    Example:
        >>> cycle = one_cycle(10, anneal="linear")
        >>> [round(cycle(count), 3) for count in (0, 2, 9)]
        [0.04, 1.0, 0.0]

    References:
        Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates" (2018).
    """
    check_count("one_cycle(total)", total)
    check_real("one_cycle(up_fraction)", up_fraction, high=1.0)
    check_real("one_cycle(start_div)", start_div, above=True)
    check_real("one_cycle(final_div)", final_div, above=True)
    if anneal not in _ANNEAL:
        raise ConfigError(f"one_cycle(anneal) must be one of {sorted(_ANNEAL)}, but got {anneal!r}")
    between, peak, last = _ANNEAL[anneal], float(up_fraction * total) - 1, total - 1
    first, final = 1.0 / start_div, 1.0 / start_div / final_div

    def cycle(count: int) -> float:
        position = min(count, last)
        if position <= peak and peak > 0:
            return between(first, 1.0, position / peak)
        return between(1.0, final, (position - peak) / (last - peak)) if last > peak else 1.0

    return Curve(
        f"one_cycle({total}, up_fraction={up_fraction}, start_div={start_div}, final_div={final_div}, anneal={anneal!r})", cycle, last
    )


def cyclic(
    up: int,
    down: int | None = None,
    low: float = 0.1,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float = 1.0,
) -> Curve:
    """Endless cycles: from `low` up to 1, the base learning rate, and down to `low` again.

    Args:
        up: Number of steps of a rise.
        down: Number of steps of a fall; None: the same as `up`.
        low: The smallest factor.
        mode: ``"triangular"``: all cycles are equal; ``"triangular2"``: each cycle is half as high as the previous one;
            ``"exp_range"``: the height shrinks as ``gamma ** count``.
        gamma: The base of ``"exp_range"``, in 0..1.

    Returns:
        A schedule.

    Raises:
        ConfigError: If `up` or `down` is below 1, an argument is out of its range, or `gamma` is given with another mode.

    Example:
        >>> wave = cyclic(2, low=0.5)
        >>> [wave(count) for count in range(6)]
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.75]

    References:
        Smith, "Cyclical learning rates for training neural networks" (2017).
    """
    fall = up if down is None else down
    check_count("cyclic(up)", up)
    check_count("cyclic(down)", fall)
    check_real("cyclic(low)", low, high=1.0)
    check_real("cyclic(gamma)", gamma, high=1.0)
    if mode not in _HEIGHTS:
        raise ConfigError(f"cyclic(mode) must be one of {sorted(_HEIGHTS)}, but got {mode!r}")
    if gamma != 1.0 and mode != "exp_range":
        raise ConfigError(f'cyclic(gamma={gamma}) has an effect with mode="exp_range" only, but the mode is {mode!r}; leave gamma out')
    height = _HEIGHTS[mode]

    def cycle(count: int) -> float:
        number, position = divmod(count, up + fall)
        part = position / up if position <= up else (up + fall - position) / fall
        return low + (1.0 - low) * part * height(number, count, gamma)

    return Curve(f"cyclic({up}, down={down}, low={low}, mode={mode!r}, gamma={gamma})", cycle)


_HEIGHTS: Mapping[str, Callable[[int, int, float], float]] = {
    "triangular": lambda number, count, gamma: 1.0,
    "triangular2": lambda number, count, gamma: 0.5**number,
    "exp_range": lambda number, count, gamma: gamma**count,
}


def cosine_restarts(period: int, mult: int = 1, final: float = 0.0) -> Curve:
    """Repeated half cosine waves from 1 down to `final`; each restart jumps back to 1.

    Args:
        period: Number of steps until the first restart.
        mult: Each wave is this many times as long as the previous one.
        final: The factor at the end of a wave.

    Returns:
        A schedule.

    Raises:
        ConfigError: If `period` or `mult` is below 1, or `final` is negative.

    Example:
        >>> waves = cosine_restarts(2, mult=2)
        >>> [round(waves(count), 3) for count in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    References:
        Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts" (2017).
    """
    check_count("cosine_restarts(period)", period)
    check_count("cosine_restarts(mult)", mult)
    check_real("cosine_restarts(final)", final)

    def wave(count: int) -> float:
        position, length = (count % period, period) if mult == 1 else (count, period)
        while position >= length:
            position, length = position - length, length * mult
        return anneal_cos(1.0, final, position / length)

    return Curve(f"cosine_restarts({period}, mult={mult}, final={final})", wave)


_ANNEAL: Mapping[str, Callable[[float, float, float], float]] = {
    "cos": anneal_cos,
    "linear": lambda start, end, part: start + (end - start) * part,
}
