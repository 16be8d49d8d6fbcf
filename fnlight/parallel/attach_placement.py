"""A state that was made by one process, on several ranks for as long as a run lasts."""

from typing import Any

from fnlight.errors import ParallelError
from fnlight.metrics import Tally, merged, with_parts
from fnlight.state import TrainState


def placed_on(state: TrainState, place: Any) -> TrainState:
    """Let a state lie on several ranks, in place; only a placement that keeps whole tensors can be given later.

    Args:
        state: Made by every rank, before any of them has trained it further.
        place: Such as ``ddp()``.

    Returns:
        The same state.

    Raises:
        ParallelError: If the placement has to come before the optimizer.

    Example:
        >>> import fnlight as fl, torch
        >>> state = fl.TrainState.create(fl.Task(torch.nn.Linear(1, 1), max))
        >>> placed_on(state, fl.parallel.ddp()) is state  # alone there is nothing to do
        True
    """
    if place.cuts:
        raise ParallelError(
            f"{place} cuts up parameters, which must be done before their optimizer is built; give it to fl.TrainState.create(task, place=...)"
        )
    store, found = state.store, place.place(state.live.module)
    for each in (store, *store.phases.values()):
        each.place = found
    return state


def alone(state: TrainState) -> TrainState:
    """A state that is this process's own again, in place, once all ranks have come to the end of a run.

    Args:
        state: The last state of a run; all ranks call this.

    Returns:
        The same state, with the metrics of all ranks where an epoch is under way.

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
