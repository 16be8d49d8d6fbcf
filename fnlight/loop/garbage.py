"""Garbage collection between steps, over the objects of the run only, not over those that existed before it."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.triggers import Tick, condition, epochs, steps

_SELDOM = 100_000  # allocations after which Python still collects by itself, for steps that create very many objects


def collect_garbage(every: Callable[[Tick], bool] = steps(100) | epochs(1)) -> Combinator:
    """Collect garbage on a trigger instead of in the middle of a step, and skip the objects that existed before the run.

    During a run, older objects are frozen: they are not scanned, and cycles among them are freed only after the run. Between two
    collections Python collects by itself only if very many objects were created. At the end of the run, also after an error, the former
    settings are restored. The results of training do not change.

    Args:
        every: When garbage is collected.

    Returns:
        A combinator from `Step` to `Step`.

    Example:
        >>> print(collect_garbage(every=steps(100)))
        collect_garbage(every=steps(100))
    """
    due = condition(every, "collect_garbage(every=...)")

    def start(state: TrainState) -> TrainState:
        state.store.run.resources["garbage"] = _Kept.now()
        return state

    def wrap(step: Any) -> Any:
        def collected(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            if due(Tick(before, state.progress)):
                gc.collect()
            return state, metrics

        return collected

    return Combinator("collect_garbage", wrap, "step", "step", args=f"every={every}", start=start)


@attrs.frozen(repr=False)
class _Kept:
    """The settings of garbage collection before a run; None and False if an outer run has already changed them."""

    thresholds: tuple[int, int, int] | None
    froze: bool

    @classmethod
    def now(cls) -> "_Kept":
        before = gc.get_threshold()
        if before[0] == _SELDOM:
            return cls(None, False)
        gc.collect()
        froze = gc.get_freeze_count() == 0  # objects frozen by other code could not be told from those frozen here
        if froze:
            gc.freeze()
        gc.set_threshold(max(before[0], _SELDOM) if before[0] else 0, *before[1:])  # 0 means never
        return cls(before, froze)

    def close(self, error: BaseException | None) -> None:  # noqa: ARG002  # what every resource of a run takes
        """Restore the settings."""
        if self.froze:
            gc.unfreeze()
        if self.thresholds is not None:
            gc.set_threshold(*self.thresholds)
