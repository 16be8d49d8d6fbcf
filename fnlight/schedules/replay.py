"""Schedules by replay: what looks stateful, computed afresh from its whole input.

`plateau` is a function of all values of a metric so far. `from_torch` turns any scheduler of ``torch.optim.lr_scheduler`` into a
function of completed steps: the scheduler runs on a shadow optimizer, which has the same groups and does nothing. Neither has anything
to save, and a resumed run cannot drift.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fnlight.errors import ConfigError, check_type


@attrs.frozen(repr=False)
class Plateau:
    """A factor that shrinks whenever a metric stops getting better; made by `plateau`, with the same arguments.

    Args:
        factor: What the learning rate is multiplied by.
        patience: How many values in a row may be no better.
        threshold: How much better a value must be to count.
        mode: ``"min"`` or ``"max"``.
        cooldown: How many values are let pass after a cut.
        min_factor: The least factor.
        threshold_mode: ``"rel"`` or ``"abs"``.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> Plateau(factor=0.5, patience=0).over([1.0, 1.0])
        0.5
    """

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    mode: Literal["min", "max"] = "min"
    cooldown: int = 0
    min_factor: float = 0.0
    threshold_mode: Literal["rel", "abs"] = "rel"

    def __attrs_post_init__(self) -> None:
        for name, low, high in (("factor", 0.0, 1.0), ("threshold", 0.0, math.inf), ("min_factor", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or not math.isfinite(value):
                raise ConfigError(f"plateau({name}) must be a finite number from {low:g} to {high:g}, but got {value!r}")
        if self.factor == 1.0:
            raise ConfigError("plateau(factor) must be below 1, but got 1.0, which changes nothing")
        for name in ("patience", "cooldown"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"plateau({name}) must be a whole number of at least 0, but got {value!r}")
        for name, known in (("mode", ("min", "max")), ("threshold_mode", ("rel", "abs"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"plateau({name}) must be one of {known}, but got {getattr(self, name)!r}")

    def over(self, values: Sequence[float]) -> float:
        """The factor once these values have been seen, oldest first: a pure function, without memory.

        Args:
            values: All values of the metric so far; NaN is never better.

        Returns:
            The factor of the base learning rate, in `min_factor`..1.
        """
        found, bad, rest = 1.0, 0, 0
        best = math.inf if self.mode == "min" else -math.inf
        for value in values:
            better = self._better(value, best)
            best, bad = (value, 0) if better else (best, bad + 1)
            if rest > 0:  # in cooldown nothing counts as bad
                rest, bad = rest - 1, 0
            if bad > self.patience:
                found, bad, rest = min(found, max(found * self.factor, self.min_factor)), 0, self.cooldown
        return found

    def _better(self, value: float, best: float) -> bool:
        sign = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "rel":
            return sign * value > sign * best * (1.0 + sign * self.threshold)
        return sign * value > sign * (best + sign * self.threshold)

    def __repr__(self) -> str:
        return f"plateau({', '.join(f'{name}={value!r}' for name, value in attrs.asdict(self).items())})"


def plateau(
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    mode: Literal["min", "max"] = "min",
    cooldown: int = 0,
    min_factor: float = 0.0,
    threshold_mode: Literal["rel", "abs"] = "rel",
) -> Plateau:
    """Shrink the learning rate whenever a metric has stopped getting better; ``Optim(..., monitor=...)`` says which metric.

    It decides as ``torch.optim.lr_scheduler.ReduceLROnPlateau`` does, once for every value in the history.

    Args:
        factor: What the learning rate is multiplied by, in 0..1.
        patience: How many values in a row may be no better.
        threshold: How much better a value must be to count.
        mode: ``"min"`` if smaller is better, else ``"max"``.
        cooldown: How many values are let pass after a cut before bad ones count again.
        min_factor: The least factor of the base learning rate.
        threshold_mode: Whether `threshold` is relative to the best value (``"rel"``) or absolute (``"abs"``).

    Returns:
        A `Plateau`.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> plateau(factor=0.5, patience=1).over([3.0, 2.0, 2.0, 2.0])
        0.5
    """
    return Plateau(
        factor=factor,
        patience=patience,
        threshold=threshold,
        mode=mode,
        cooldown=cooldown,
        min_factor=min_factor,
        threshold_mode=threshold_mode,
    )


class _Shadow(Optimizer):
    """An optimizer with the groups of another one and a dummy parameter in each; its step does nothing."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        made = [{**_options(group), "params": [nn.Parameter(torch.zeros((), device="cpu"))]} for group in groups]
        shared = {k: v for k, v in made[0].items() if k != "params" and all(k in group for group in made)}
        Optimizer.__init__(self, made, shared)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # a shadow computes no loss
        pass


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group was configured with; ``initial_lr`` only where the user gave one, so that schedulers set it as they do elsewhere."""
    held = {k: _own(v) for k, v in group.items() if k != "params"}
    if "initial_lr" in held and held["initial_lr"] == held.get("lr"):
        del held["initial_lr"]
    return held


def _own(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


class _Replay:
    """One scheduler on its shadow, somewhere on its way."""

    def __init__(self, make: Callable[[Any], Any], configured: Sequence[Mapping[str, Any]]) -> None:
        self.configured, self.shadow = configured, _Shadow(configured)
        self.scheduler = _made(make, self.shadow)
        self.shadow.step()  # torch warns of a scheduler that steps before its optimizer
        self.count, self.seen = 0, list[float]()  # what it has stepped over; values only if it is monitored
        self.before = [{k: v for k, v in _options(g).items() if _plain(v)} for g in configured]
        self.changed = [{"lr"} for _ in configured]
        self._note()

    def stands_before(self, configured: Sequence[Mapping[str, Any]], count: int, values: list[float] | None) -> bool:
        return self.configured is configured and self.count <= count and (values is None or values[: self.count] == self.seen)

    def forward(self, count: int, values: list[float] | None) -> list[dict[str, Any]]:
        for i in range(self.count, count):
            try:
                self.scheduler.step(*(() if values is None else (values[i],)))
            except ValueError as error:
                raise ConfigError(_past_its_end(self.scheduler, i + 1, error)) from error
            self._note()
        self.count, self.seen = count, values or []
        return [{k: _own(group[k]) for k in sorted(keys)} for group, keys in zip(self.shadow.param_groups, self.changed, strict=True)]

    def _note(self) -> None:
        """Keep in mind what has ever been changed: it is given back even where it stands as it stood at first."""
        for group, before, changed in zip(self.shadow.param_groups, self.before, self.changed, strict=True):
            changed.update(k for k, v in before.items() if group[k] is not v and group[k] != v)


def _past_its_end(scheduler: Any, count: int, error: Exception) -> str:
    return (
        f"{type(scheduler).__name__}, replayed by from_torch, refuses its step {count}: {error}; train no longer than it goes, make it longer "
        "(fl.total_steps(config, loaders) counts the steps of a run), or use a schedule of fnlight, which holds its last value"
    )


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | tuple) or (isinstance(value, Tensor) and value.numel() == 1)


def _made(make: Callable[[Any], Any], shadow: _Shadow) -> Any:
    scheduler = make(shadow)
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError(f"from_torch(make): make(optimizer) must return a scheduler, but returned {scheduler!r}; is a `return` missing?")
    if getattr(scheduler, "optimizer", shadow) is not shadow:
        raise ConfigError(
            f"from_torch(make): make(optimizer) must use the optimizer that it is given, but its {type(scheduler).__name__} changes another one; "
            "write from_torch(lambda optimizer: Scheduler(optimizer, ...))"
        )
    return scheduler


def _takes_metric(scheduler: Any) -> bool:
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(scheduler.step).parameters.values())


@attrs.frozen(eq=False, repr=False)
class TorchSchedule:
    """Any scheduler of ``torch.optim.lr_scheduler`` as a pure function; made by `from_torch`.

    What it computes follows from its arguments alone. The replay goes on from where the last one stood, if it can: that saves time,
    and changes nothing.

    Args:
        make: Maps an optimizer to a scheduler on it.
        monitored: Whether the scheduler steps over the values of a metric, as ``ReduceLROnPlateau`` does, and not over a count.

    Example:
        >>> halve = TorchSchedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        >>> halve.groups([{"lr": 1.0}, {"lr": 8.0}], count=2)
        [{'lr': 0.25}, {'lr': 2.0}]
    """

    make: Callable[[Any], Any]
    monitored: bool = False
    _last: dict[str, _Replay] = attrs.field(factory=dict, init=False)

    def groups(self, configured: Sequence[Mapping[str, Any]], count: int, values: Sequence[float] | None = None) -> list[dict[str, Any]]:
        """What each group holds after `count` steps of the scheduler, or after these values if it is monitored.

        Args:
            configured: The options of each group as they were at first; this very object again and again lets the replay go on.
            count: Completed steps (or epochs).
            values: All values of the metric so far, oldest first; for monitored schedules only.

        Returns:
            One dict a group: ``lr``, and whatever else the scheduler has changed on its way, such as ``momentum``.

        Raises:
            ConfigError: If `make` returns no scheduler, or one of another optimizer, or the scheduler has come to its end.
        """
        seen = list(values or ()) if self.monitored else None
        steps = count if seen is None else len(seen)
        replay = self._last.pop("replay", None)  # nobody else has it now, in any thread; put back only if the scheduler did not fail
        if replay is None or not replay.stands_before(configured, steps, seen):
            replay = _Replay(self.make, configured)
        found = replay.forward(steps, seen)
        self._last["replay"] = replay
        return found

    def resolved(self, groups: Sequence[Mapping[str, Any]]) -> "TorchSchedule":
        """This schedule with `monitored` set if the scheduler that it makes for these groups steps over a metric."""
        if self.monitored or not _takes_metric(_made(self.make, _Shadow(groups))):
            return self
        return attrs.evolve(self, monitored=True)

    def last(self, configured: Sequence[Mapping[str, Any]]) -> int | None:
        """The last count that the scheduler has a value for, if it says so, as ``OneCycleLR`` does; None if it has no end."""
        total = getattr(_made(self.make, _Shadow(configured)), "total_steps", None)
        return total if isinstance(total, int) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TorchSchedule":
        return self  # nothing of it can be observed to change, and a copy goes on from the same replay

    def __repr__(self) -> str:
        return f"from_torch({getattr(self.make, '__name__', repr(self.make))}{', monitored=True' if self.monitored else ''})"


def from_torch(make: Callable[[Any], Any], monitored: bool = False) -> TorchSchedule:
    """Use any scheduler of ``torch.optim.lr_scheduler``, or one written like them, as a pure schedule.

    The scheduler may change the learning rate, the momentum, the betas or any other option, of each group in its own way. It never
    sees the real optimizer: it is replayed on a shadow with the same groups. Going on costs one step of the scheduler; going back,
    or resuming at step n, costs n of them, once.

    Args:
        make: Maps an optimizer to a scheduler on it, as in ``lambda optimizer: StepLR(optimizer, 30)``.
        monitored: Whether it steps over the values of a metric; found out by itself for ``ReduceLROnPlateau``.

    Returns:
        A `TorchSchedule`, for ``Optim(optimizer, schedule=...)``.

    Example:
        >>> from_torch(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)).groups([{"lr": 1.0}], count=30)
        [{'lr': 0.1}]
    """
    check_type("from_torch(make)", make, Callable, "a function of an optimizer that gives a scheduler of torch")
    return TorchSchedule(make, monitored)
