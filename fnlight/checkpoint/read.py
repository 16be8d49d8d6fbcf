"""Read a state: the newest sound checkpoint, matched by name against the task, copied into live tensors."""

import warnings
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint.encode import decode
from fnlight.checkpoint.groups import place_optimizers
from fnlight.checkpoint.manifest import MEMORY, MODEL
from fnlight.checkpoint.places import Opened, Path, open_checkpoint
from fnlight.checkpoint.weights import extra_states, place_weights, put, split_buffers
from fnlight.dtype import DTYPES, convert
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning, MismatchError
from fnlight.history import History, Record
from fnlight.state import Progress, Task, TrainState

_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)


def load(path: Path, task: Task, *, device: torch.device | str | None = None) -> TrainState:
    """Read a state from a checkpoint; nothing in the file is run.

    Args:
        path: A checkpoint, or a run's directory, of which the newest sound one is taken; or a URL.
        task: The model and functions that the state was trained with.
        device: Where the tensors shall live; None leaves them where the task's model has them.

    Returns:
        The state, bitwise as it was saved.

    Raises:
        MismatchError: If the model has other names or shapes; all of them are listed.
        BrokenCheckpointError: If files are damaged.
        CheckpointError: If there is no checkpoint.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint.write import save
        >>> task = Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(TrainState.create(task, seed=7), f"{folder}/state")
        ...     load(path, task).seed
        7
    """
    opened = open_checkpoint(path)
    state, notes = _fill(TrainState.create(task, device=device), opened, partial=False)
    _warn(opened, notes)
    return state


def restore(path: Path, like: TrainState, *, partial: bool = False) -> TrainState:
    """Read a state from a checkpoint into a copy of another state of the same task, on its device.

    What the code configures is never overwritten: a group value of the optimizer comes from the checkpoint only where the code
    configures what it configured then, otherwise from the code, and a `CheckpointWarning` says so.

    Args:
        path: A checkpoint, or a run's directory, of which the newest sound one is taken; or a URL.
        like: A state of the task; it stays as it is.
        partial: True takes the weights that fit, with their optimizer memory, and leaves the others as they are, with a warning.

    Returns:
        The state.

    Raises:
        MismatchError: Unless `partial`, if the model has other names or shapes; all of them are listed.
        BrokenCheckpointError: If files are damaged.
        CheckpointError: If there is no checkpoint.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint.write import save
        >>> state = TrainState.create(Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     restore(save(state.recorded({"val/loss": 0.5}), f"{folder}/state"), like=state).history[0].metrics
        {'val/loss': 0.5}
    """
    if not isinstance(like, TrainState):
        raise TypeError(
            f"restore(path, like=...) takes a TrainState, but got {type(like).__name__}; for a Task there is fl.load(path, task)"
        )
    opened = open_checkpoint(path)
    state, notes = _fill(like.copy(), opened, partial)
    _warn(opened, notes)
    return state


def _warn(opened: Opened, notes: list[str]) -> None:
    if notes:
        lines = "\n  ".join(notes)
        warnings.warn(f"checkpoint {opened.path} was loaded with differences:\n  {lines}", CheckpointWarning, stacklevel=3)


def _fill(state: TrainState, opened: Opened, partial: bool) -> tuple[TrainState, list[str]]:
    """Fill a state that nobody else holds; also what a reader should be told."""
    store = state.store
    cast = opened.body["memory"].get("cast")  # a run in another precision than the model was made in
    if cast is not None:
        convert(store.module, [optim.optimizer for optim in store.optims.values()], DTYPES[decode(cast, {}.__getitem__)["dtype"]])
    report = place_weights(store.module, opened.tensors(MODEL), opened.path)
    if not report.fits and not partial:
        raise MismatchError(
            f"the checkpoint is of another model. {report}\nMake the task with the model that was saved, or take what fits with "
            "fl.restore(path, like=state, partial=True)"
        )
    notes = [] if report.fits else [f"only what fits was taken. {report}"]
    try:
        tensors = opened.tensors(MEMORY)
        notes += _derived_buffers(store.module, decode(opened.body["buffers"], tensors.__getitem__))
        notes += _extra(store.module, decode(opened.body["extra"], _copied(tensors, store.device)))
        notes += place_optimizers(store.optims, store.module, opened, frozenset(report.loaded))
        store.memory = _memory(opened.body["memory"], tensors, store.device)
        return _head(state, opened.body), notes
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise BrokenCheckpointError(
            f"checkpoint {opened.path} is broken: state.json holds what fnlight does not write: {error!r:.200}"
        ) from error


def _head(state: TrainState, body: Any) -> TrainState:
    progress, seed, stopped = Progress(**body["progress"]), body["seed"], body["stopped"]
    counts = (progress.step, progress.epoch, progress.batch, progress.samples, progress.epoch_samples, progress.skipped, seed)
    if (
        not all(type(n) is int and n >= 0 for n in counts)
        or not isinstance(stopped, str | None)
        or not isinstance(progress.seconds, int | float)
    ):
        raise ValueError(f"progress {progress}, seed {seed!r}, stopped {stopped!r}")
    if not all(type(n) is int and n >= 0 for n in progress.updates.values()):
        raise ValueError(f"updates {progress.updates!r:.80}")
    updates = {name: progress.updates.get(name, 0) for name in state.store.phases}
    history = History(Record(step, epoch, decode(metrics, {}.__getitem__)) for step, epoch, metrics in body["history"])
    return attrs.evolve(state, progress=attrs.evolve(progress, updates=updates), seed=seed, stopped=stopped, history=history)


def _copied(tensors: dict[str, Tensor], device: torch.device) -> Callable[[str], Tensor]:
    return lambda name: tensors[name].to(device, copy=True)


def _memory(section: Any, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The trees of the combinators on the device of the state; the place of a loader is on the CPU."""
    cpu = torch.device("cpu")
    return {key: decode(tree, _copied(tensors, cpu if key == "loader" else device)) for key, tree in section.items()}


def _derived_buffers(module: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """Restore the buffers outside the ``state_dict``; those that changed their shape are the model's own business."""
    wanted = split_buffers(module)[1]
    fits = [
        name for name, value in found.items() if name in wanted and (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype)
    ]
    with torch.no_grad():
        for name in fits:
            put(module, name, found[name])
    left = sorted((set(wanted) | set(found)) - set(fits))
    return [f"non-persistent buffers that differ now were left as the model makes them: {', '.join(left[:8])}"] if left else []


def _extra(module: nn.Module, found: dict[str, Any]) -> list[str]:
    own, inner = extra_states(module), dict(module.named_modules())
    for name in own:
        if name in found:
            inner[name].set_extra_state(found[name])
    left = sorted(set(own) ^ set(found))
    return [f"extra states of modules stand on one side only: {', '.join(left[:8])}"] if left else []
