"""Write a state: first converted to data (`describe_state`), then written completely or not at all (`write`)."""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.distributed_save import is_cut, parts_of, write_together
from fnlight.checkpoint.encode import Put, encode
from fnlight.checkpoint.folder import Folder
from fnlight.checkpoint.head import is_metric
from fnlight.checkpoint.listing import FILES, MEMORY, MODEL, OPTIMIZER
from fnlight.checkpoint.manifest import STATE, render
from fnlight.checkpoint.places import Path, at
from fnlight.checkpoint.reader import examine
from fnlight.checkpoint.tensors import check_tensor, chunks, describe
from fnlight.checkpoint.weights import extra_states, split_buffers
from fnlight.errors import CheckpointError, check_type
from fnlight.metrics import with_parts
from fnlight.optim import RAW, Optim, class_name, named_groups, named_state, weights_to_use
from fnlight.state import A_STATE, Store, TrainState
from fnlight.tensors import equal

Tensors = dict[str, dict[str, Tensor]]
"""By file, names to tensors."""


def save(state: TrainState, path: Path, *, overwrite: bool = True) -> str:
    """Write a checkpoint, completely or not at all; one that it replaces is kept until the new one is complete.

    If a state is on several ranks, all of them must call this: rank 0 writes; if tensors are sharded, each rank writes its own parts.

    Files are written into a hidden sibling, flushed to disk and renamed into place. In a remote store, which has no renames, the
    manifest is written last, and one that is replaced is gone from the first byte on. No second copy of tensors on the CPU is made.
    Strides are not saved: tensors come back in the memory format that the task's model has.

    Args:
        state: What is saved; it stays as it is.
        path: The directory to write, or a URL for fsspec (``s3://``, ``memory://``); parents are made.
        overwrite: False refuses to replace a checkpoint.

    Returns:
        The path.

    Raises:
        CheckpointError: If it cannot be written: no space, no permission, other files in the directory, or a value in the
            state that is no data. The older checkpoint stands then, and nothing else is left.
        DonatedStateError: If a later step has overwritten the tensors.

    Example:
        >>> import tempfile
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(state, f"{folder}/state")
        ...     at(path).names()
        ['model.safetensors', 'state.json']
    """
    check_type("save(state, ...)", state, TrainState, A_STATE)
    folder, place = at(path), state.store.place
    body, tensors = describe_state(state)
    if place is not None and is_cut(tensors):
        write_together(folder, body, parts_of(tensors, place.everyone.rank), ranks=place.everyone, overwrite=overwrite)
        return folder.path
    if place is None or place.writes:
        write(folder, body, tensors, overwrite)
    if place is not None:
        place.everyone.gather(None)  # once it is there, it is there for all ranks
    return folder.path


def write(folder: Folder | Bucket, body: Mapping[str, Any], tensors: Tensors, overwrite: bool = True) -> None:
    """Write what `describe_state` gave.

    Args:
        folder: Where to.
        body: The sections of the manifest, without the list of files.
        tensors: By file, names to tensors.
        overwrite: False refuses to replace a checkpoint.

    Raises:
        CheckpointError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     write(Folder(path).child("a"), {"seed": 0}, {"model.safetensors": {}})
        ...     Folder(path).child("a").names()
        ['model.safetensors', 'state.json']
    """
    with folder.replacing(overwrite) as place:
        files = {name: place.write(name, chunks(tensors[name])) | {"tensors": _listed(tensors[name])} for name in FILES if name in tensors}
        place.write(STATE, [render({**body, "layouts": [], "files": files})])


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: describe(tensor) for name, tensor in tensors.items()}


def amend(state: TrainState, path: Path) -> None:
    """Bring the manifest of a checkpoint up to date with a state whose tensors are those saved there.

    Only `state.json` is written, atomically: progress, history, why the run stopped, and numbers in the memory of combinators.

    Args:
        state: The state of the same step.
        path: Its checkpoint.

    Raises:
        CheckpointError: If there is no valid manifest, it is of another step, its tensors have other names, or writing fails.

    Example:
        >>> import attrs, tempfile
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(state, f"{folder}/state")
        ...     amend(attrs.evolve(state, stopped="enough"), path)
        ...     b'"stopped": "enough"' in at(path).read("state.json")
        True
    """
    folder = at(path)
    body, tensors = describe_state(state)
    if state.store.place is not None and not state.store.place.writes:
        return
    old, problems = examine(folder, digests=False)
    if old is None or problems:
        raise CheckpointError(f"cannot update checkpoint {folder.path}: {'; '.join(problems)}; save the state again")
    listed = {name: _listed(held) for name, held in tensors.items()}
    if listed != {name: entry["tensors"] for name, entry in old["files"].items()} or body["progress"]["step"] != old["progress"]["step"]:
        raise CheckpointError(
            f"cannot update checkpoint {folder.path}: it has other tensors than the state of step {state.progress.step}; save the state again"
        )
    folder.rewrite(STATE, render({**body, "layouts": old["layouts"], "files": old["files"]}))


def describe_state(state: TrainState, together: bool = True) -> tuple[dict[str, Any], Tensors]:
    """Convert a state to data: the sections of the manifest and, by file, the tensors, which are not copied.

    Args:
        state: Any state.
        together: Whether all ranks say it at the same time, where there are several; False leaves out what others alone know.

    Returns:
        The sections and the tensors.

    Raises:
        CheckpointError: If the state contains something that is not data.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum()), seed=7)
        >>> body, tensors = describe_state(state)
        >>> body["seed"], list(tensors["model.safetensors"])
        (7, ['weight', 'bias'])
    """
    store = state.live
    store.settle()
    if store.place is not None and together:
        with_parts(store.memory.values(), store.place.world.gather)
    elif store.place is not None:
        with_parts(store.memory.values(), lambda mine: [mine])
    persistent, derived = split_buffers(store.module)
    params = {name: p.detach() for name, p in store.module.named_parameters()}
    used = weights_to_use(store.optims.values(), store.module)
    tensors: Tensors = {MODEL: {**params, **used, **persistent}, OPTIMIZER: {}, MEMORY: {}}
    put = _collector(tensors[MEMORY])
    try:
        body = {
            "fnlight": _version(),
            "torch": torch.__version__,
            "progress": {key: value for key, value in attrs.asdict(state.progress).items() if key != "updates" or value},
            "seed": state.seed,
            "stopped": state.stopped,
            "times": store.wall_time.to_json(),
            "history": [[r.step, r.epoch, _numbers(r.metrics, f"history of step {r.step}")] for r in state.history],
            "parameters": list(params),
            "optimizer": _optimizers(store, _collector(tensors[OPTIMIZER]), {name: params[name] for name in used}),
            "memory": {key: encode(tree, put, key) for key, tree in store.memory.items()},
            "buffers": encode(derived, put, "buffers"),
            "extra": encode(extra_states(store.module), put, "extra"),
        }
    except RecursionError as error:
        raise CheckpointError("state.memory is nested too deeply, or contains itself; nest it less") from error
    if body["optimizer"] is None:
        del tensors[OPTIMIZER]
    if not tensors[MEMORY]:
        del tensors[MEMORY]
    return body, tensors


def check_savable(state: TrainState) -> None:
    """Refuse, before any work, a state that a checkpoint cannot hold; nothing is copied or written.

    Args:
        state: Any state of one process.

    Raises:
        CheckpointError: If an extra state is no data, or a tensor is sparse, on the meta device, or of a dtype that the format lacks.

    Example:
        >>> from fnlight.state import Task
        >>> check_savable(TrainState.create(Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum())))
    """
    _, tensors = describe_state(state)
    for held in tensors.values():
        for name, tensor in held.items():
            check_tensor(name, tensor)


def _collector(tensors: dict[str, Tensor]) -> Put:
    def put(name: str, tensor: Tensor) -> str:
        while name in tensors or name == "__metadata__":
            name += "'"
        tensors[name] = tensor.detach()
        return name

    return put


def _numbers(metrics: Mapping[str, Any], path: str) -> Any:
    found = encode(dict(metrics), _refuse, path)
    for name, value in found.items():
        if type(value) is not float and not is_metric(value):
            raise CheckpointError(f"{path}/{name} is {metrics.get(name)!r:.60}, but a history holds numbers by name; record float(value)")
    return found


def _refuse(path: str, tensor: Tensor) -> str:
    raise CheckpointError(f"{path} is a tensor of shape {list(tensor.shape)}, but a history holds only numbers; record float(value)")


def _optimizers(store: Store, put: Put, raw: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The section of a single optimizer; or those of several, by name."""
    if store.phases:
        return {"phases": {name: _optimizer(optim, store.module, put, prefix=f"{name}/", raw=raw) for name, optim in store.optims.items()}}
    return None if store.optim.optimizer is None else _optimizer(store.optim, store.module, put, prefix="", raw=raw)


def _optimizer(optim: Optim, module: nn.Module, put: Put, prefix: str, raw: Mapping[str, Tensor]) -> dict[str, Any]:
    held, own = named_state(optim, module), {name for group in named_groups(optim, module) for name in group["params"]}
    for name in own & raw.keys():
        held[name] = {**held.get(name, {}), RAW: raw[name]}  # the model's file holds the weight to use, this is the one that is trained
    slots = {name: encode(found, put, prefix + name) for name, found in held.items()}
    groups = [
        {
            "params": group.pop("params"),
            "values": _values(group, was, put, f"{prefix}groups/{i}"),
            "configured": _values(was, was, put, f"{prefix}configured/{i}"),
        }
        for i, (group, was) in enumerate(zip(named_groups(optim, module), optim.configured, strict=True))
    ]
    return {"class": class_name(optim.optimizer), "slots": slots, "groups": groups}


def _values(group: Mapping[str, Any], configured: Mapping[str, Any], put: Put, path: str) -> dict[str, Any]:
    """The values of a group; what is no data is left out where it is still as the code configured it, which will do so again."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        try:
            found[key] = encode(value, put, f"{path}/{key}")
        except CheckpointError:
            if key not in configured or not equal(value, configured[key]):
                raise
    return found


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("fnlight")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
