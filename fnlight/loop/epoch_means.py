"""Exact means of the training metrics over each epoch, in the history."""

from collections.abc import Mapping
from typing import Any

from fnlight.metrics import MEDIA, Tally, read_all
from fnlight.pipe import Combinator
from fnlight.state import Progress, TrainState


def samples_since(before: Progress, state: TrainState) -> float:
    """The samples of a step, with which its plain metrics count; where several ranks share a batch, each counts its part.

    Args:
        before: The progress before the step.
        state: The state after it.

    Returns:
        The number.

    Example:
        >>> from types import SimpleNamespace
        >>> samples_since(Progress(samples=8), SimpleNamespace(progress=Progress(samples=12), store=SimpleNamespace(place=None)))
        4
    """
    samples, place = state.progress.samples - before.samples, state.store.place
    return samples if place is None else samples / place.world.size


def epoch_means() -> Combinator:
    """Add the exact means of the training metrics over each epoch to the history, as ``train/loss`` and so on.

    Returns:
        A combinator from `Step` to `Step`; an epoch that is resumed in the middle still gets its exact mean.

    Example:
        >>> print(epoch_means())
        epoch_means
    """

    def wrap(step: Any) -> Any:
        def averaged(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before, epoch = state.progress, state.progress.epoch
            state, metrics = step(state, batch)
            tally: Tally = state.store.memory["epoch_means"]
            if state.store.step.back == state.version:  # after a rollback, neither this step counts nor an epoch whose end was dropped
                if state.progress.epoch != epoch:
                    tally.clear()
                return state, metrics
            tally.add(state.progress.step, metrics, samples_since(before, state))
            if state.progress.epoch != epoch:
                place = state.store.place
                read = tally.read() if place is None else read_all(tally, place.world.gather)
                found = {f"train/{k}": v for k, v in read.items() if not isinstance(v, MEDIA)}
                state = state.recorded(found)
                tally.clear()
            return state, metrics

        return averaged

    return Combinator("epoch_means", wrap, "step", "step", init=lambda store: Tally(), phase="history", provides=("train/",))
