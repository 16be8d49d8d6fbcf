"""Exact means of the training metrics over each epoch, in the history."""

from collections.abc import Mapping
from typing import Any

from fnlight.metrics import MEDIA, Tally, read_all
from fnlight.pipe import Combinator
from fnlight.state import TrainState


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
            epoch = state.progress.epoch
            state, metrics = step(state, batch)
            tally: Tally = state.store.memory["epoch_means"]
            if state.store.step.back == state.version:  # after a rollback, neither this step counts nor an epoch whose end was dropped
                if state.progress.epoch != epoch:
                    tally.clear()
                return state, metrics
            tally.add(state.progress.step, metrics)
            if state.progress.epoch != epoch:
                place = state.store.place
                read = tally.read() if place is None else read_all(tally, place.world.gather)
                found = {f"train/{k}": v for k, v in read.items() if not isinstance(v, MEDIA)}
                state = state.recorded(found)
                tally.clear()
            return state, metrics

        return averaged

    return Combinator("epoch_means", wrap, "step", "step", init=lambda store: Tally(), phase="history", provides=("train/",))
