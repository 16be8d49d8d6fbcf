"""Read a state: the newest valid checkpoint, matched by name with the task, copied into live tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint.encode import decode
from fnlight.checkpoint.groups import place_optimizers
from fnlight.checkpoint.head import casts, history_of
from fnlight.checkpoint.header import uncollected
from fnlight.checkpoint.listing import MEMORY, MODEL
from fnlight.checkpoint.pieces import Like
from fnlight.checkpoint.placeholder import Lent, twin
from fnlight.checkpoint.places import Path, open_checkpoint, read_checkpoint
from fnlight.checkpoint.reader import Opened
from fnlight.checkpoint.rename import Rename, new_name, renamed, renamed_body
from fnlight.checkpoint.weights import LoadReport, extra_states, make_late_buffers, place_weights, put, split_buffers
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning, MismatchError, check_type, warn
from fnlight.metrics import Tally, own_part
from fnlight.runtime import WallTime
from fnlight.state import Progress, Store, Task, TrainState
from fnlight.tensors import DTYPES, convert, is_sharded, lying_like, spread_like

ALLOWED = frozenset({"dtype", "model", "optimizer"})
"""Differences between a checkpoint and a task that `restore` can be told to accept."""

_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, ArithmeticError)


def load(path: Path, task: Task, *, device: torch.device | str | None = None, place: Any = None) -> TrainState:
    """Read a state from a checkpoint; nothing in the file is run.

    Args:
        path: A checkpoint, or a run's directory, whose newest valid checkpoint is taken; or a URL.
        task: The model and functions that the state was trained with.
        device: The device of the tensors; None takes that of the task's model.
        place: A placement on several processes, whichever way the state was saved; all of them must call this, and each reads its own part. The
            task's model may then be on the meta device.

    Returns:
        The state, bit-identical to the saved one.

    Raises:
        MismatchError: If the model has other names or shapes; all of them are listed.
        BrokenCheckpointError: If files are damaged.
        CheckpointError: If there is no checkpoint.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> task = Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(TrainState.create(task, seed=7), f"{folder}/state")
        ...     load(path, task).seed
        7
    """

    def read(opened: Opened) -> TrainState:
        lent, memo = Lent(), dict[int, Any]()
        if isinstance(task, Task) and place is None:
            lent.borrow((*task.model.parameters(), *task.model.buffers()), memo)
        state, notes = _fill(
            TrainState.create(task, device=device, place=place, _memo=memo), lent, opened, allowed=frozenset(), rename=None
        )
        _warn(opened, notes)
        return state

    return read_checkpoint(path, read, hold=place is None, ranks=getattr(place, "everyone", None))


def restore(path: Path, like: TrainState, *, allow: Iterable[str] = (), rename: Rename = None) -> TrainState:
    """Read a state from a checkpoint into a copy of another state of the same task, on the same device.

    What the code configures is never overwritten: a group value of the optimizer comes from the checkpoint only where the code
    configures what it configured then, otherwise from the code, and a `CheckpointWarning` says so.

    Args:
        path: A checkpoint, or a run's directory, whose newest valid checkpoint is taken; or a URL.
        like: A state of the task; it is not changed.
        allow: Differences that give a warning and not an error: ``"model"`` loads the weights that match, with their optimizer state, and
            leaves the others unchanged; ``"dtype"`` converts floating-point weights to the dtypes of `like`; ``"optimizer"`` lets an
            optimizer of another class start with empty state.
        rename: Names in the checkpoint to names in the model: a mapping, whose keys name a parameter or a module with all below it, or a
            function, whose None leaves one out. Optimizer state, averages and everything else that is kept by these names is renamed, too.

    Returns:
        The state.

    Raises:
        MismatchError: Unless it is allowed, if the model has other names, shapes or dtypes, all of which are listed, or another optimizer.
        BrokenCheckpointError: If files are damaged.
        CheckpointError: If there is no checkpoint, `allow` knows no such difference, or two names become one.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> state = TrainState.create(Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     restore(save(state.recorded({"val/loss": 0.5}), f"{folder}/state"), like=state).history[0].metrics
        {'val/loss': 0.5}
    """
    check_type("restore(path, like=...)", like, TrainState, expected="a TrainState", advice="for a Task use fl.load(path, task)")
    check_type("restore(allow=...)", allow, Iterable, f"some of {sorted(ALLOWED)}")
    allowed = frozenset((allow,) if isinstance(allow, str) else allow)
    if not allowed <= ALLOWED:
        raise CheckpointError(f"allow= takes some of {sorted(ALLOWED)}, but got {sorted(allowed - ALLOWED)}")
    place = like.live.place

    def read(opened: Opened) -> TrainState:
        store, lent = twin(like.live)
        state, notes = _fill(attrs.evolve(like, store=store, version=0), lent, opened, allowed=allowed, rename=rename)
        _warn(opened, notes)
        return state

    return read_checkpoint(path, read, hold=place is None, ranks=None if place is None else place.everyone)


def refill(path: Path, state: TrainState) -> TrainState:
    """Load a checkpoint in place into a state of the same run that saved it; it donates its input.

    Args:
        path: The checkpoint.
        state: Where the run stands.

    Returns:
        The state as it was saved. Its times, and the place of a loader that keeps its own, are those of now.

    Raises:
        CheckpointError: If it does not fit, or cannot be read; the state can then no longer be read.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> state = TrainState.create(Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(state, f"{folder}/state")
        ...     weight = state.store.module.weight.data.fill_(7.0)
        ...     after = refill(path, state)
        >>> after.store is state.store, bool((after.params["weight"] == 7.0).any())
        (True, False)
    """
    place = state.live.place
    opened = open_checkpoint(path, hold=place is None, ranks=None if place is None else place.everyone)
    store = state.donated()
    times = store.wall_time
    found, _ = _fill(state, Lent(), opened, allowed=frozenset(), rename=None, same_run=True)
    store.wall_time, store.version = times, state.version + 2
    return attrs.evolve(found, version=store.version)


def _warn(opened: Opened, notes: list[str]) -> None:
    if notes:
        lines = "\n  ".join(notes)
        warn(f"checkpoint {opened.path} was loaded with differences:\n  {lines}", CheckpointWarning)


def _fill(
    state: TrainState, lent: Lent, opened: Opened, allowed: frozenset[str], rename: Rename, same_run: bool = False
) -> tuple[TrainState, list[str]]:
    """Fill a state that nobody else holds; also what a reader should be told. The tensors of the checkpoint become its own."""
    store = state.store
    opened = attrs.evolve(opened, like=_homes(store, rename))
    listed = opened.body["files"][MODEL]["tensors"]
    _recast(store, opened)
    weights = renamed(opened.tensors(MODEL), rename)
    make_late_buffers(store.module, weights, derived=False, same_run=same_run)
    report = place_weights(store.module, weights, opened.path, convert="dtype" in allowed, lent=lent)
    if not report.fits and "model" not in allowed:
        raise MismatchError(_another(report))
    notes = [] if report.fits else [f"only the matching weights were loaded. {report}"]
    notes += [f"converted to the dtypes of the model. {report}"] if report.fits and report.converted else []
    try:
        opened = attrs.evolve(opened, body=renamed_body(opened.body, listed.keys(), rename))
        known = {name: getattr(torch, dtype) for name, (dtype, _) in renamed(listed, rename).items()}
        tensors = opened.tensors(MEMORY)
        derived = decode(opened.body["buffers"], tensors.pop)
        make_late_buffers(store.module, derived, derived=True, same_run=same_run)
        notes += _derived_buffers(store.module, derived, lent)
        lent.own((*store.module.parameters(), *store.module.buffers()))  # from here on, code of the user's may write to them
        notes += _extra(store.module, decode(opened.body["extra"], _moved(tensors, store.device)))
        notes += place_optimizers(store.optims, store.module, opened, loaded=report.taken, known=known, afresh="optimizer" in allowed)
        lent.own()
        memory = _memory(opened.body["memory"], tensors, store.device)
        fitting = {key: _as_the_model(tree, known, report.left, store.named) for key, tree in memory.items()}
        kept = {key: tree for key, tree in fitting.items() if not _emptied(tree, memory[key])}
        rank, size = (0, 1) if store.place is None else (store.place.world.rank, store.place.world.size)
        store.memory = {key: own_part(tree, rank, size) if isinstance(tree, Tally) else tree for key, tree in kept.items()}
        return _head(state, opened.body), notes
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise BrokenCheckpointError(
            f"checkpoint {opened.path} is broken: state.json has content that fnlight does not write: {error!r:.200}"
        ) from error


def _homes(store: Store, rename: Rename) -> Like | None:
    """What a tensor of a checkpoint shall lie like, by its name; None where this process is alone, and reads what is held already."""
    if store.place is None:
        return None
    cut = {name: p for name, p in store.named.items() if is_sharded(p)}

    def like(key: str, shape: tuple[int, ...]) -> Tensor | None:
        homes = (cut.get(new_name(rename, part) or "") for part in key.split("/"))
        return next((p for p in homes if p is not None and tuple(p.shape) == shape), None)

    return like


def _recast(store: Store, opened: Opened) -> None:
    """Give the model the precision of a run in another one than the model was made in."""
    for tree in casts(opened.body["memory"]):
        convert(store.module, [optim.optimizer for optim in store.optims.values()], DTYPES[tree["dtype"]])


def _another(report: LoadReport) -> str:
    only_dtypes = not (report.missing or report.unexpected) and all(
        a[a.index(" ") :] == b[b.index(" ") :] for a, b in report.mismatched.values()
    )
    ways = (
        'convert the weights with allow=("dtype",)'
        if only_dtypes
        else 'load the weights that match with allow=("model",), map names that changed with rename={...}'
    )
    return (
        f"the checkpoint is from another model. {report}\nCreate the task with the model that was saved, or {ways}: arguments of "
        "fl.restore(path, like=state, ...) and of fl.FitConfig(resume=True, ...)"
    )


def _as_the_model(tree: Any, known: Mapping[str, torch.dtype], left: frozenset[str], named: Mapping[str, Tensor]) -> Any:
    """Memory that is kept by names of parameters, without those that were not taken, in the dtypes of those that were converted."""
    if not isinstance(tree, dict):
        return tree
    if not tree or not all(name in known for name in tree):
        return {key: _as_the_model(value, known, left, named) for key, value in tree.items()}
    return {name: _converted(value, known[name], named.get(name)) for name, value in tree.items() if name not in left}


def _emptied(tree: Any, before: Any) -> bool:
    return isinstance(tree, dict) and not tree and bool(before)


def _converted(value: Any, dtype: torch.dtype, like: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or like is None or value.shape != like.shape:
        return value
    value = lying_like(value, like)
    return spread_like(value.to(like.dtype) if value.dtype == dtype else value, like)


def _head(state: TrainState, body: Any) -> TrainState:
    progress = Progress(**body["progress"])
    updates = {name: progress.updates.get(name, 0) for name in state.store.phases}
    state.store.wall_time = WallTime.from_json(body.get("times", {}))
    progress, seed, stopped = attrs.evolve(progress, updates=updates), body["seed"], body["stopped"]
    return attrs.evolve(state, progress=progress, seed=seed, stopped=stopped, history=history_of(body))


def _moved(tensors: dict[str, Tensor], device: torch.device) -> Callable[[str], Tensor]:
    """What gives each tensor once: a reference that comes again is none that fnlight wrote, and might stand there a million times."""
    return lambda name: tensors.pop(name).to(device)


def _memory(section: Any, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The trees of the combinators on the device of the state; the place of a loader is on the CPU."""
    cpu = torch.device("cpu")
    with uncollected():
        return {key: decode(tree, _moved(tensors, cpu if key == "loader" else device)) for key, tree in section.items()}


def _derived_buffers(module: nn.Module, found: dict[str, Tensor], lent: Lent) -> list[str]:
    """Restore the buffers outside the ``state_dict``; those that changed their shape are the model's own business."""
    wanted = split_buffers(module)[1]
    fits = [
        name for name, value in found.items() if name in wanted and (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype)
    ]
    with torch.no_grad():
        for name in fits:
            put(module, name, found[name], lent)
    left = sorted((set(wanted) | set(found)) - set(fits))
    return (
        [f"non-persistent buffers whose shape differs were not loaded; they have the model's values: {', '.join(left[:8])}"] if left else []
    )


def _extra(module: nn.Module, found: dict[str, Any]) -> list[str]:
    own, inner = extra_states(module), dict(module.named_modules())
    for name in own:
        if name in found:
            try:
                inner[name].set_extra_state(found[name])
            except Exception as error:
                raise BrokenCheckpointError(
                    f"the set_extra_state of {name or 'the model'} refuses what is in state.json under extra.{name}: {error!r:.200}"
                ) from error
    left = sorted(set(own) ^ set(found))
    return [f"extra states of modules that only the checkpoint or only the model has: {', '.join(left[:8])}"] if left else []
