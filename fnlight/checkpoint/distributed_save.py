"""Write a checkpoint from several ranks: each rank writes its own parts; rank 0 writes the manifest after it has seen all files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs
from torch import Tensor

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.folder import Folder
from fnlight.checkpoint.layout import Layout, layout_of, part_name
from fnlight.checkpoint.manifest import STATE, render
from fnlight.checkpoint.tensors import chunks, describe
from fnlight.errors import CheckpointError
from fnlight.tensors import box, is_sharded, local

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file, names to tensors."""


@attrs.frozen(repr=False)
class Parts:
    """The parts that one rank writes, and the layout that all ranks know; made by `parts_of`.

    Args:
        entries: By file, what the manifest will say of it but for sizes and digests.
        layouts: How tensors are cut, with ranks in the place of files.
        own: By file, the tensors that this rank writes.
        offsets: By file, where each of them is in the whole.

    Example:
        >>> import torch
        >>> parts_of({"model.safetensors": {"x": torch.ones(2)}}, rank=1).own
        {'model.safetensors': {}}
    """

    entries: dict[str, dict[str, Any]]
    layouts: list[Layout]
    own: dict[str, dict[str, Tensor]]
    offsets: dict[str, dict[str, Sequence[int]]]

    @property
    def writers(self) -> list[int]:
        """The ranks that write, the first of all among them."""
        return sorted({0, *(rank for layout in self.layouts for rank in layout.files)})


def is_cut(tensors: Tensors) -> bool:
    """Say whether any tensor is sharded over ranks.

    Args:
        tensors: By file, names to tensors.

    Returns:
        True if so.

    Example:
        >>> import torch
        >>> is_cut({"model.safetensors": {"x": torch.ones(2)}})
        False
    """
    return any(is_sharded(t) for named in tensors.values() for t in named.values())


def parts_of(tensors: Tensors, rank: int) -> Parts:
    """Return the parts of a state that one rank writes; a part that several ranks hold is written by the first of them.

    Args:
        tensors: By file, names to tensors, whole or in parts.
        rank: This rank among all processes.

    Returns:
        Its parts.

    Example:
        >>> import torch
        >>> parts_of({"model.safetensors": {"x": torch.ones(2)}}, rank=0).entries
        {'model.safetensors': {'tensors': {'x': ['float32', [2]]}, 'cut': {}}}
    """
    known: dict[Any, tuple[int, bool]] = {}
    found = Parts({}, [], {}, {})
    for file, named in tensors.items():
        entry = found.entries[file] = {"tensors": {name: describe(t) for name, t in named.items()}, "cut": {}}
        own, offsets = found.own.setdefault(file, {}), found.offsets.setdefault(file, {})
        for name, tensor in named.items():
            if is_sharded(tensor):
                number, writes = _known(tensor, rank, known, found.layouts)
                entry["cut"][name] = number
                here = box(tensor)
                writes = writes and 0 not in here[1]
            else:
                here, writes = ((0,) * tensor.dim(), tuple(tensor.shape)), rank == 0
            if writes:
                own[name], offsets[name] = local(tensor), here[0]
    return found


def _known(tensor: Any, rank: int, known: dict[Any, tuple[int, bool]], layouts: list[Layout]) -> tuple[int, bool]:
    """The number of a tensor's layout, and whether this rank writes its part."""
    key = (tensor.device_mesh, tensor.placements)
    if key not in known:
        layout = layout_of(tensor)
        if layout not in layouts:
            layouts.append(layout)
        # what does not reach the first rank is a copy, for other layers are cut across: those that it reaches write theirs
        known[key] = layouts.index(layout), rank in layout.files and 0 in tensor.device_mesh.mesh
    return known[key]


def write_together(folder: Folder | Bucket, body: Mapping[str, Any], parts: Parts, ranks: Any, overwrite: bool = True) -> None:
    """Write a checkpoint; all ranks must call this at the same time. It succeeds on all of them, or raises an error on all.

    Args:
        folder: Where to: a folder that all ranks see.
        body: The sections of the manifest, without the list of files; those of the first rank are written.
        parts: What this rank writes.
        ranks: All processes, such as a `World`.
        overwrite: False refuses to replace a checkpoint.

    Raises:
        CheckpointError: If one of them cannot write, or has ended.

    Example:
        >>> import tempfile, torch
        >>> from fnlight.checkpoint import parse
        >>> class Alone:
        ...     rank = 0
        ...     def gather(self, tree): return [tree]
        >>> with tempfile.TemporaryDirectory() as path:
        ...     write_together(Folder(path).child("a"), {"seed": 0}, parts_of({"model.safetensors": {"x": torch.ones(2)}}, 0), Alone())
        ...     Folder(path).child("a").names()
        ['model.safetensors', 'state.json']
    """
    try:
        if ranks.rank == 0:
            _lead(folder, body, parts, ranks=ranks, overwrite=overwrite)
        else:
            _follow(parts, ranks)
    except RuntimeError as error:
        raise CheckpointError(
            f"cannot write {folder.path}: rank {ranks.rank} lost the connection to another rank: {error!s:.200}. Older checkpoints are unchanged."
        ) from error


def _lead(folder: Folder | Bucket, body: Mapping[str, Any], parts: Parts, ranks: Any, overwrite: bool) -> None:
    try:
        with folder.replacing(overwrite) as place:
            ranks.gather({"path": place.path, "writers": parts.writers})
            found = ranks.gather(_attempt(lambda: _written(place, parts, parts.writers, 0)))
            files = _entries(place, parts, found)
            layouts = [{**layout.data(), "files": [parts.writers.index(rank) for rank in layout.files]} for layout in parts.layouts]
            place.write(STATE, [render({**body, "layouts": layouts, "files": files})])
    except CheckpointError as error:
        with suppress(RuntimeError):  # a rank that has died cannot be told
            ranks.gather({"error": str(error)})
        raise
    ranks.gather({"error": None})


def _follow(parts: Parts, ranks: Any) -> None:
    told = ranks.gather(None)[0]
    _raise(told)
    ranks.gather(_attempt(lambda: _written(_place(told["path"]), parts, told["writers"], ranks.rank)))
    _raise(ranks.gather(None)[0])


def _place(path: str) -> Folder | Bucket:
    return Bucket(path) if "://" in path else Folder(path)


def _raise(told: Mapping[str, Any]) -> None:
    if told.get("error") is not None:
        raise CheckpointError(told["error"])


def _attempt(fn: Callable[[], Any]) -> dict[str, Any]:
    """What a rank has written, or why it could not: the others wait for its word either way."""
    try:
        return {"files": fn()}
    except Exception as error:  # noqa: BLE001  # each store has errors of its own, and the others wait for a word
        return {"error": f"{error}"}


def _written(place: Folder | Bucket, parts: Parts, writers: list[int], rank: int) -> dict[str, Any]:
    """Write the files of a rank: names to sizes and digests."""
    names = {
        file: part_name(file, writers.index(rank), len(writers)) for file in parts.own if parts.entries[file]["cut"] and rank in writers
    }
    names |= {file: file for file in parts.own if not parts.entries[file]["cut"] and rank == 0}
    return {file: place.write(name, chunks(parts.own[file], parts.offsets[file] if name != file else None)) for file, name in names.items()}


def _entries(place: Folder | Bucket, parts: Parts, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the files, once the first rank has seen all of them."""
    failed = {rank: each["error"] for rank, each in enumerate(found) if "error" in each}
    if failed:
        told = "; ".join(f"rank {rank}: {error}" for rank, error in list(failed.items())[:4])
        raise CheckpointError(f"cannot write {place.path}: {told}. Older checkpoints are unchanged.")
    writers, files = parts.writers, {}
    for file, entry in parts.entries.items():
        if not entry["cut"]:
            files[file] = {**found[0]["files"][file], "tensors": entry["tensors"]}
            continue
        each = [found[rank]["files"][file] for rank in writers]
        files[file] = {"parts": [[part["size"], part["digest"]] for part in each], **entry}
        for index, (rank, part) in enumerate(zip(writers, each, strict=True)):
            name = part_name(file, index, len(writers))
            if place.size(name) != part["size"]:
                raise CheckpointError(
                    f"cannot write {place.path}: rank {rank} has written {name}, but rank 0 does not see it; give a folder that all ranks "
                    "share, or the URL of a remote store"
                )
    return files
