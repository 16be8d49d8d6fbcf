"""Back to the last checkpoint where a loss is no number, and on from there with other data and other random numbers."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.checkpoint import newest, refill
from fnlight.data import Item
from fnlight.errors import CheckpointError, ConfigError, FaultWarning, NonFiniteError, check_type, warn
from fnlight.loop import Saver
from fnlight.nonfinite.check_finite import Place, first_bad, no_losses, note, said
from fnlight.pipe import Combinator
from fnlight.state import Progress, TrainState
from fnlight.tensors import listed, not_finite
from fnlight.triggers import Tick, condition, steps


def rollback(dir: str | os.PathLike[str], every: Callable[[Tick], bool] = steps(50), max_consecutive: int = 3) -> Combinator:
    """Go back to the last checkpoint when a loss was NaN or infinite, and go on with other data.

    Losses and parameters are looked at when it is due, so no step waits for the device. When one is not finite, parameters, optimizer,
    memory, history and step count become those of the newest sound checkpoint, in the memory where they are. The place in the data stays where
    it is: the batches since that checkpoint are left out, and `progress.skipped` counts their steps, as it does for other steps that are
    left out; so the random numbers are others, too. All of this is a function of the checkpoint and of the place in the data: a run that
    is killed at any instant and resumed goes back at the same step, and ends bitwise where it would have.

    Of several ranks all go back, whichever has found something, to a checkpoint that all of them must be able to read.

    Each time there is a `FaultWarning`, and the metrics of that step count in no mean. ``state.memory["rollback"]`` counts how often it happened in all (``total``), and in a row to one
    checkpoint (``row``).

    Args:
        dir: The run's directory, the one that `checkpoint_every` in the same pipe saves to.
        every: When it is due; make it fire wherever a checkpoint is saved, so that none is saved after the fact.
        max_consecutive: WallTime in a row, at least 1, that one goes back to one and the same checkpoint; then training fails.

    Returns:
        A combinator from `Step` to `Step`. Where the first checkpoint may come too late, give ``checkpoint_every(..., initial=True)``.

    Raises:
        ConfigError: If the number is below 1, or nothing in the pipe saves a checkpoint.

    Example:
        >>> print(rollback("runs/a", every=steps(10)))
        rollback('runs/a', every=steps(10), max_consecutive=3)

    References:
        Chowdhery et al., "PaLM: Scaling language modeling with pathways" (2022), section 5.1: training goes on from a checkpoint before the
        trouble, without the batches around it.
    """
    check_type("rollback(dir)", dir, str | os.PathLike, "a str or os.PathLike")
    path, due = os.fspath(dir), condition(every, "rollback(every=...)")
    if not isinstance(max_consecutive, int) or isinstance(max_consecutive, bool) or max_consecutive < 1:
        raise ConfigError(f"rollback(max_consecutive=...) must be a whole number of at least 1, but got {max_consecutive!r}")

    def checked(state: TrainState) -> TrainState:
        tree = state.store.memory["rollback"]
        trouble = _first(state.store.place, _trouble(state, first_bad(tree)))
        tree.update(no_losses())
        return state if trouble is None else _back(state, path, trouble, max_consecutive)

    def wrap(step: Any) -> Any:
        def guarded(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            place = (state.progress.step, before.epoch, batch.batch if batch.__class__ is Item else before.batch + 1)
            note(state.store.memory["rollback"], place, metrics, state.store.place is None)
            return (checked(state) if due(Tick(before, state.progress)) else state), metrics

        return guarded

    return Combinator(
        "rollback", wrap, "step", "step", args=f"{path!r}, every={every}, max_consecutive={max_consecutive}",
        init=lambda store: {**no_losses(), "to": -1, "row": 0, "total": 0}, phase="update",
        finish=lambda before, state: checked(state), validate=_validate,
    )  # fmt: skip


def _first(place: Any, found: Any) -> Any:
    """What the first of all ranks has found, if one has; where this process is alone, what it has."""
    ranks = [found] if place is None else place.everyone.gather(found)
    return next((each for each in ranks if each is not None), None)


def _validate(combinators: tuple[Combinator, ...]) -> str | None:
    names = [c.name for c in combinators]
    if "checkpoint_every" not in names:
        return "rollback goes back to a checkpoint, but nothing in this pipe saves any; add checkpoint_every(dir) with the same directory"
    if "debug_bundle" in names:
        return "debug_bundle repeats the steps since a copy of its own, which rollback may leave behind; leave one of them out"
    return None


def _trouble(state: TrainState, place: Place | None) -> str | None:
    """What is not finite: a loss since the last look, or else a parameter; None if nothing is."""
    if place is not None:
        return said(place)
    bad = not_finite({name: p for name, p in state.store.named.items() if p.requires_grad})
    return f"by step {state.progress.step}, NaN or infinite: {listed(bad)}" if bad else None


def _back(state: TrainState, dir: str, trouble: str, most: int) -> TrainState:
    now, store = state.progress, state.store
    for held in store.run.resources.values():
        if isinstance(held, Saver):
            held.settle()
    found = _first(store.place, newest(dir) if store.place is None or store.place.writes else None)
    if found is None:
        raise NonFiniteError(
            f"{trouble}, and {dir} holds no sound checkpoint to go back to; save the first one earlier, as with checkpoint_every(..., initial=True)"
        )
    counts = {key: store.memory["rollback"][key] for key in ("to", "row", "total")}
    try:
        after = refill(found, state)
    except CheckpointError as error:
        raise NonFiniteError(f"{trouble}, and checkpoint {found} could not be gone back to: {error}") from error
    to = after.progress.step
    row = counts["row"] + 1 if counts["to"] == to else 1
    if row > most:
        raise NonFiniteError(
            f"{trouble}; it is the {row}. time in a row after checkpoint {found}, and max_consecutive={most}; look into the data from there on, "
            "lower the learning rate, or clip"
        )
    store.step.back = after.version
    store.memory["rollback"] = {**no_losses(), "to": to, "row": row, "total": counts["total"] + 1}
    if store.owner is not None:
        store.owner.adopt(after)
    warn(
        f"{trouble}: back to {found}; the data of the {now.step - to} steps since then is left out ({row} of at most {most} times in a row)",
        FaultWarning,
    )
    return attrs.evolve(after, progress=_here(after.progress, now), stopped=state.stopped)


def _here(then: Progress, now: Progress) -> Progress:
    """The completed updates of then at the place in the data of now; what lies between was left out."""
    return attrs.evolve(now, step=then.step, updates=then.updates, skipped=now.skipped + now.step - then.step)
