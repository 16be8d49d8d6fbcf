"""Stop rules such as ``patience("val/loss", 3) | max_epochs(10)``: pure functions of the state that give a reason to stop.

A rule has no counters: it is computed after every step, and before the first one, so a run that has ended also ends at once when resumed.
"""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import attrs

from fnlight.errors import ConfigError, check_type
from fnlight.optim import monitored
from fnlight.triggers.form import Form
from fnlight.triggers.stop_rule import StopRule

Mode = Literal["min", "max"]


def _of_history(form: Form, monitor: str, fn: Callable[[list[float]], str | None]) -> StopRule:
    """A rule about the values of one name."""
    if not isinstance(monitor, str) or "/" not in monitor:
        raise ConfigError(f'a monitored name must be a string with its kind, such as "val/loss" or "train/loss", but got {monitor!r}')
    return StopRule(form, _Asked(monitor, fn), (monitor,))


@attrs.define(eq=False, repr=False)
class _Asked:
    """A pure function of a history, with its last result cached: a rule is called at every step, and the history changes rarely.

    The result is stored together with its history in one assignment, so runs that share a rule cannot get each other's result.
    """

    monitor: str
    fn: Callable[[list[float]], str | None]
    last: tuple[Any, str | None] = attrs.field(default=(None, None), init=False)

    def __call__(self, state: Any) -> str | None:
        """Give the reason to stop, or None."""
        history, (known, reason) = state.history, self.last
        if known is not history:
            reason = self.fn(monitored(history, self.monitor))
            self.last = (history, reason)
        return reason


def patience(monitor: str, n: int, mode: Mode = "min", min_delta: float = 0.0) -> StopRule:
    """Stop when a metric has not improved in n evaluations.

    Args:
        monitor: A name in the history, such as ``"val/loss"``.
        n: Stop after this many consecutive evaluations without improvement, at least 1.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta: An improvement must exceed the best value so far by more than this.

    Returns:
        A stop rule. NaN never improves.

    Raises:
        ConfigError: If an argument cannot mean anything.

    Example:
        >>> from types import SimpleNamespace as S
        >>> records = [S(metrics={"val/loss": v}) for v in (0.5, 0.4, 0.45, 0.41)]
        >>> patience("val/loss", 2)(S(history=tuple(records)))
        'val/loss has not improved in 2 evaluations (best 0.4)'
    """
    _check_mode("patience", mode)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"patience must tolerate a whole number of evaluations of at least 1, but got {n!r}")
    check_type("patience(min_delta=...)", min_delta, int | float, "a number")
    if not min_delta >= 0:
        raise ConfigError(f"patience(min_delta=...) must be at least 0, but got {min_delta!r}; the direction is given by mode")

    def waited(values: list[float]) -> str | None:
        best, since = math.nan, 0
        for value in values:
            gain = best - value if mode == "min" else value - best
            if gain > min_delta or (math.isnan(best) and not math.isnan(value)):
                best, since = value, 0
            else:
                since += 1
        return f"{monitor} has not improved in {n} evaluations (best {best:.6g})" if since >= n else None

    more = ("" if mode == "min" else f", {mode!r}") + (f", min_delta={min_delta}" if min_delta else "")
    form = Form("patience", (monitor, n, mode, min_delta), f"patience({monitor!r}, {n}{more})")
    return _of_history(form, monitor, waited)


def reached(monitor: str, value: float, mode: Mode = "max") -> StopRule:
    """Stop when a metric is at least (``"max"``) or at most (``"min"``) a value.

    Args:
        monitor: A name in the history, such as ``"val/acc"``.
        value: The goal.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is.

    Returns:
        A stop rule, about the last evaluation.

    Raises:
        ConfigError: If an argument cannot mean anything.

    Example:
        >>> from types import SimpleNamespace as S
        >>> reached("val/acc", 0.9)(S(history=(S(metrics={"val/acc": 0.95}),)))
        'val/acc reached 0.95 (goal 0.9)'
    """
    _check_mode("reached", mode)
    check_type("reached(value)", value, int | float, "a number")

    def there(values: list[float]) -> str | None:
        met = values and (values[-1] >= value if mode == "max" else values[-1] <= value)
        return f"{monitor} reached {values[-1]:.6g} (goal {value:g})" if met else None

    more = "" if mode == "max" else f", {mode!r}"
    return _of_history(Form("reached", (monitor, value, mode), f"reached({monitor!r}, {value}{more})"), monitor, there)


def diverged(monitor: str, limit: float, mode: Mode = "min") -> StopRule:
    """Stop when a metric is worse than a limit, or not finite.

    Args:
        monitor: A name in the history, such as ``"val/loss"``.
        limit: The worst value that is tolerated.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.

    Returns:
        A stop rule, about the last evaluation.

    Raises:
        ConfigError: If an argument cannot mean anything.

    Example:
        >>> from types import SimpleNamespace as S
        >>> diverged("val/loss", 10.0)(S(history=(S(metrics={"val/loss": 12.0}),)))
        'val/loss diverged to 12 (limit 10)'
    """
    _check_mode("diverged", mode)
    check_type("diverged(limit)", limit, int | float, "a number")

    def worse(values: list[float]) -> str | None:
        bad = values and (not math.isfinite(values[-1]) or (values[-1] > limit if mode == "min" else values[-1] < limit))
        return f"{monitor} diverged to {values[-1]:.6g} (limit {limit:g})" if bad else None

    more = "" if mode == "min" else f", {mode!r}"
    return _of_history(Form("diverged", (monitor, limit, mode), f"diverged({monitor!r}, {limit}{more})"), monitor, worse)


def nonfinite(monitor: str | None = None) -> StopRule:
    """Stop when the last record holds a NaN or an infinity.

    Args:
        monitor: The name to check; None checks all names.

    Returns:
        A stop rule.

    Example:
        >>> from types import SimpleNamespace as S
        >>> nonfinite()(S(history=(S(metrics={"val/loss": float("nan")}),)))
        'val/loss is nan'
    """
    if monitor is not None:
        form = Form("nonfinite", (monitor,), f"nonfinite({monitor!r})")
        return _of_history(form, monitor, lambda v: f"{monitor} is {v[-1]}" if v and not math.isfinite(v[-1]) else None)

    def rule(state: Any) -> str | None:
        metrics = state.history[-1].metrics if state.history else {}
        return next((f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), None)

    return StopRule(Form("nonfinite", (), "nonfinite()"), rule)


def max_steps(n: int) -> StopRule:
    """Stop after n completed steps in all, those before a resume counted.

    Args:
        n: At least 0; 0 does nothing.

    Returns:
        A stop rule.

    Raises:
        ConfigError: If n is not a whole number of at least 0.

    Example:
        >>> print(max_steps(100))
        max_steps(100)
    """
    _whole("max_steps", n)
    return StopRule(
        Form("max_steps", (n,), f"max_steps({n})"), lambda state: f"{n} steps done" if state.progress.step >= n else None, until=n
    )


def max_epochs(n: int) -> StopRule:
    """Stop after n completed epochs in all, those before a resume counted.

    Args:
        n: At least 0; 0 does nothing.

    Returns:
        A stop rule.

    Raises:
        ConfigError: If n is not a whole number of at least 0.

    Example:
        >>> print(max_epochs(10))
        max_epochs(10)
    """
    _whole("max_epochs", n)
    return StopRule(Form("max_epochs", (n,), f"max_epochs({n})"), lambda state: f"{n} epochs done" if state.progress.epoch >= n else None)


def max_time(limit: float | timedelta) -> StopRule:
    """Stop after a time of training in all, that before a resume counted.

    Args:
        limit: Seconds, or a ``timedelta``.

    Returns:
        A stop rule.

    Raises:
        ConfigError: If the time is not above 0.

    Example:
        >>> print(max_time(timedelta(hours=1)))
        max_time(3600.0)
    """
    s = limit.total_seconds() if isinstance(limit, timedelta) else limit
    if not isinstance(s, int | float) or isinstance(s, bool) or not s > 0:
        raise ConfigError(f"max_time must be seconds above 0 or a timedelta, but got {limit!r}")
    return StopRule(
        Form("max_time", (s,), f"max_time({s})"), lambda state: f"{s:g} seconds of training done" if state.progress.seconds >= s else None
    )


def min_steps(n: int) -> StopRule:
    """A guard: ``rule & min_steps(n)`` ignores the rule until n steps are completed.

    Args:
        n: At least 0.

    Returns:
        A stop rule, to be joined with ``&``.

    Raises:
        ConfigError: If n is not a whole number of at least 0.

    Example:
        >>> print(patience("val/loss", 3) & min_steps(100))
        patience('val/loss', 3) & min_steps(100)
    """
    _whole("min_steps", n)
    return StopRule(
        Form("min_steps", (n,), f"min_steps({n})"), lambda state: f"at least {n} steps done" if state.progress.step >= n else None
    )


def min_epochs(n: int) -> StopRule:
    """A guard: ``rule & min_epochs(n)`` ignores the rule until n epochs are completed.

    Args:
        n: At least 0.

    Returns:
        A stop rule, to be joined with ``&``.

    Raises:
        ConfigError: If n is not a whole number of at least 0.

    Example:
        >>> print(patience("val/loss", 3) & min_epochs(5))
        patience('val/loss', 3) & min_epochs(5)
    """
    _whole("min_epochs", n)
    return StopRule(
        Form("min_epochs", (n,), f"min_epochs({n})"), lambda state: f"at least {n} epochs done" if state.progress.epoch >= n else None
    )


def _whole(name: str, n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ConfigError(f"{name} must be a whole number of at least 0, but got {n!r}; leave the rule out for no limit")


def _check_mode(name: str, mode: Any) -> None:
    if mode not in ("min", "max"):
        raise ConfigError(f'{name}(mode=...) must be "min" or "max", but got {mode!r}')
