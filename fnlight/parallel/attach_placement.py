"""Attach a placement to a state that was created without one, for the duration of a run, and detach it afterwards."""

from typing import Any

from fnlight.errors import ParallelError
from fnlight.metrics import Tally, merged, with_parts
from fnlight.state import TrainState


def placed_on(state: TrainState, place: Any) -> TrainState:
    """Attach a placement to a state, in place; only placements that keep whole tensors on every rank can be attached later.

    Args:
        state: Created on every rank, and not trained on any of them since.
        place: A placement, such as ``ddp()``.

    Returns:
        The same state.

    Raises:
        ParallelError: If the placement shards parameters, which must happen before the optimizer is built.

    Example:
        >>> import fnlight as fl, torch
        >>> state = fl.TrainState.create(fl.Task(torch.nn.Linear(1, 1), max))
        >>> placed_on(state, fl.parallel.ddp()) is state  # alone there is nothing to do
        True
    """
    if place.cuts:
        raise ParallelError(
            f"{place} shards parameters, which must be done before the optimizer is built; give it to fl.TrainState.create(task, place=...)"
        )
    store, found = state.store, place.place(state.live.module)
    for each in (store, *store.phases.values()):
        each.place = found
    return state


def alone(state: TrainState) -> TrainState:
    """Detach a state from its placement, in place, after all ranks have finished a run.

    Args:
        state: The last state of a run; all ranks call this.

    Returns:
        The same state; if an epoch is unfinished, its metrics are those of all ranks.

    Example:
        >>> import fnlight as fl, torch
        >>> alone(fl.TrainState.create(fl.Task(torch.nn.Linear(1, 1), max))).store.place is None
        True
    """
    store = state.store
    if store.place is not None:
        store.place.sync(store)
        with_parts(store.memory.values(), store.place.world.gather)
    for key, tree in store.memory.items():
        if isinstance(tree, Tally) and tree.parts is not None:
            store.memory[key] = Tally(*merged(tree.parts))
    for each in (store, *store.phases.values()):
        each.place = each.bound = None
    return state
