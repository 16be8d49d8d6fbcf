"""Garbage collection between steps: when it is due, and over what the run has made, not over all that was there before."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.triggers import Tick, condition, epochs, steps

_SELDOM = 100_000  # objects after which Python still collects by itself: a step that makes very many is not left alone with them


def collect_garbage(every: Callable[[Tick], bool] = steps(100) | epochs(1)) -> Combinator:
    """Collect garbage when it is due rather than in the middle of any step, and leave out what was there before the run.

    While a run lasts, objects that are older than it are frozen: they are not gone over, and cycles among them are freed after the run only.
    Between two ticks Python collects by itself only where very many objects were made. At the end, however it comes, all is as it was.
    Values do not change by it.

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
    """How Python collected before a run; None and False where a run around this one has seen to it."""

    thresholds: tuple[int, int, int] | None
    froze: bool

    @classmethod
    def now(cls) -> "_Kept":
        before = gc.get_threshold()
        if before[0] == _SELDOM:
            return cls(None, False)
        gc.collect()
        froze = gc.get_freeze_count() == 0  # what somebody else has frozen could not be told from what is frozen here
        if froze:
            gc.freeze()
        gc.set_threshold(max(before[0], _SELDOM) if before[0] else 0, *before[1:])  # 0 means never
        return cls(before, froze)

    def close(self, error: BaseException | None) -> None:  # noqa: ARG002  # what every resource of a run takes
        """Put it back."""
        if self.froze:
            gc.unfreeze()
        if self.thresholds is not None:
            gc.set_threshold(*self.thresholds)
