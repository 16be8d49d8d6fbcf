"""Schedules that go up and down again."""

from collections.abc import Callable, Mapping
from typing import Literal

from fnlight.errors import ConfigError
from fnlight.schedules._checks import anneal_cos, check_count, check_real
from fnlight.schedules.curve import Curve


def one_cycle(
    total: int, up_fraction: float = 0.3, start_div: float = 25.0, final_div: float = 1e4, anneal: Literal["cos", "linear"] = "cos"
) -> Curve:
    """One cycle: up from a fraction of the base learning rate, which is the peak, and down to almost nothing.

    Args:
        total: All steps of the cycle.
        up_fraction: The part of them that goes up, in 0..1.
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
    check_count("one_cycle(total)", total)
    check_real("one_cycle(up_fraction)", up_fraction, high=1.0)
    check_real("one_cycle(start_div)", start_div, above=True)
    check_real("one_cycle(final_div)", final_div, above=True)
    if anneal not in _ANNEAL:
        raise ConfigError(f"one_cycle(anneal) must be one of {sorted(_ANNEAL)}, but got {anneal!r}")
    between, peak, last = _ANNEAL[anneal], float(up_fraction * total) - 1, total - 1
    first, final = 1.0 / start_div, 1.0 / start_div / final_div

    def cycle(count: int) -> float:
        place = min(count, last)
        if place <= peak and peak > 0:
            return between(first, 1.0, place / peak)
        return between(1.0, final, (place - peak) / (last - peak)) if last > peak else 1.0

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
    """Cycles without end: from `low` up to 1, the base learning rate, and down to `low` again.

    Args:
        up: Steps of a rise.
        down: Steps of a fall; as many as of a rise if left out.
        low: The least factor.
        mode: ``"triangular"``: all cycles are alike; ``"triangular2"``: each is half as high as the one before;
            ``"exp_range"``: the height shrinks as ``gamma ** count``.
        gamma: For ``"exp_range"``, in 0..1.

    Returns:
        A schedule.

    Raises:
        ConfigError: If a part has no step, an argument is out of its range, or `gamma` is given to another mode.

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
        raise ConfigError(f'cyclic(gamma={gamma}) shrinks cycles of mode="exp_range", but the mode is {mode!r}; leave gamma out')
    height = _HEIGHTS[mode]

    def cycle(count: int) -> float:
        number, place = divmod(count, up + fall)
        part = place / up if place <= up else (up + fall - place) / fall
        return low + (1.0 - low) * part * height(number, count, gamma)

    return Curve(f"cyclic({up}, down={down}, low={low}, mode={mode!r}, gamma={gamma})", cycle)


_HEIGHTS: Mapping[str, Callable[[int, int, float], float]] = {
    "triangular": lambda number, count, gamma: 1.0,
    "triangular2": lambda number, count, gamma: 0.5**number,
    "exp_range": lambda number, count, gamma: gamma**count,
}


def cosine_restarts(period: int, mult: int = 1, final: float = 0.0) -> Curve:
    """Half a cosine wave from 1 down to `final`, again and again; a restart is a jump back to 1.

    Args:
        period: Steps of the first wave.
        mult: How many times as long each wave is as the one before.
        final: The factor at the end of a wave.

    Returns:
        A schedule.

    Raises:
        ConfigError: If there is no step, `mult` is below 1, or `final` is negative.

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
        place, length = (count % period, period) if mult == 1 else (count, period)
        while place >= length:
            place, length = place - length, length * mult
        return anneal_cos(1.0, final, place / length)

    return Curve(f"cosine_restarts({period}, mult={mult}, final={final})", wave)


_ANNEAL: Mapping[str, Callable[[float, float, float], float]] = {
    "cos": anneal_cos,
    "linear": lambda start, end, part: start + (end - start) * part,
}
