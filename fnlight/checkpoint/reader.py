"""Checkpoint verification: the manifest is read, and every file is compared with it, whole or in parts."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.folder import Folder
from fnlight.checkpoint.layout import Layout, physical, read_layouts
from fnlight.checkpoint.manifest import MODEL, STATE, parse
from fnlight.checkpoint.pieces import Like, joined, read_pieces
from fnlight.checkpoint.tensors import as_listed
from fnlight.errors import BrokenCheckpointError


@attrs.frozen(eq=False, repr=False)
class Opened:
    """A checkpoint whose manifest and digests were verified.

    Args:
        path: Its path, for messages.
        folder: Where its files are.
        body: The sections of its manifest.
        held: By file, the tensors that were read to check it: they are nobody else's.
        like: Gives, for a name and a shape, the tensor that one shall lie like: only the parts that lie here are read then.

    Example:
        >>> Opened("a", Folder("a"), {"files": {}}).tensors("memory.safetensors")
        {}
    """

    path: str
    folder: Folder | Bucket
    body: Mapping[str, Any]
    held: Mapping[str, Mapping[str, Tensor]] = attrs.field(factory=dict)
    like: Like | None = None

    @property
    def layouts(self) -> list[Layout]:
        """How its tensors are cut."""
        return layouts_of(self.body)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files: those that are held, else mapped where possible; none if it was not written."""
        if name not in self.body["files"]:
            return {}
        entry = self.body["files"][name]
        try:
            if self.like is not None and name not in self.held:
                into = self.folder.into if isinstance(self.folder, Folder) else None
                return read_pieces(self.folder.part, self.folder.size, name, entry=entry, layouts=self.layouts, like=self.like, into=into)
            if name in self.held:
                found = self.held[name]
            elif "parts" in entry:
                found = joined(name, entry, self.layouts, self.folder.tensors)
            else:
                found = self.folder.tensors(name)
            return as_listed(found, entry["tensors"])
        except Exception as error:  # the safetensors library raises its own class, and others on damage
            raise BrokenCheckpointError(f"checkpoint {self.path} is broken: {name} cannot be read: {error}") from error


def fetched(
    folder: Folder | Bucket, body: Mapping[str, Any] | None, problems: list[str], files: tuple[str, ...], others: bool
) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
    """Read files once, check what was read, and keep it.

    Args:
        folder: The checkpoint.
        body: The sections of its manifest, if it can be read.
        problems: What is wrong so far; nothing is read then.
        files: The names of what is kept.
        others: Whether the rest is looked through as well.

    Returns:
        By file, names to tensors; and what is wrong.

    Example:
        >>> fetched(Folder("no/such/folder"), None, ["it is broken"], (), others=True)
        ({}, ['it is broken'])
    """
    held: dict[str, Mapping[str, Tensor]] = {}
    found = list(problems)
    if body is None or problems:
        return held, found
    for name, entry in body["files"].items():
        if name in files and not found:
            try:
                held[name] = _fetch(folder, name, entry, layouts=layouts_of(body), found=found)
            except (OSError, ValueError) as error:
                found += compare_all(folder, {name: entry}, digests=True) or [f"{name} cannot be read: {error}"]
        elif name in files or others:
            found += compare_all(folder, {name: entry}, digests=True)
    return ({} if found else held), found


def _fetch(folder: Folder | Bucket, name: str, entry: Mapping[str, Any], layouts: list[Layout], found: list[str]) -> Mapping[str, Tensor]:
    """The tensors of a file, or of all of its parts, read once; what is altered is added to `found`."""
    digests = {each: part["digest"] for each, part in physical({name: entry}).items()}

    def fetch(each: str) -> Mapping[str, Tensor]:
        tensors, digest = folder.fetch(each, digests[each].partition(":")[0])
        if digest != digests[each]:
            found.append(_altered(each))
        return tensors

    return joined(name, entry, layouts, fetch) if "parts" in entry else fetch(name)


def layouts_of(body: Mapping[str, Any]) -> list[Layout]:
    """Return how the tensors of a checkpoint are split into files.

    Args:
        body: The sections of its manifest, which are checked.

    Returns:
        The layouts that its files refer to by number.

    Example:
        >>> layouts_of({"layouts": []})
        []
    """
    found = body.get("layouts", ())
    return read_layouts(found, 1 + max((number for each in found for number in each["files"]), default=0))


def compare_all(folder: Folder | Bucket, files: Mapping[str, Any], digests: bool) -> list[str]:
    """Compare files with their entries in the manifest, part by part.

    Args:
        folder: The checkpoint.
        files: The section of the manifest, or some of it.
        digests: Whether every byte is read, too.

    Returns:
        What is wrong, one line a problem.

    Example:
        >>> compare_all(Folder("no/such/folder"), {"model.safetensors": {"size": 8, "digest": "xxh3:0"}}, digests=False)
        ['model.safetensors is missing']
    """
    return [problem for name, entry in physical(files).items() if (problem := _compare(folder, name, entry, digests))]


def _altered(name: str) -> str:
    return f"{name} is altered: its digest differs from the one in state.json"


def examine(folder: Folder | Bucket, digests: bool = True, sizes: bool = True) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Read the manifest of a checkpoint and compare every file with it.

    Args:
        folder: The checkpoint.
        digests: Whether every byte is read, too.
        sizes: False looks at the manifest alone.

    Returns:
        The sections of the manifest, None if it cannot be read, and what is wrong, one line a problem.

    Example:
        >>> examine(Folder("no/such/folder"))
        (None, ['there is no directory no/such/folder'])
    """
    try:
        if folder.size(STATE) is None:
            gone = "state.json is missing: the save was interrupted, or the file was deleted"
            return None, [gone if folder.exists() else f"there is no directory {folder.path}"]
        body = parse(folder.read(STATE))
    except (BrokenCheckpointError, OSError) as error:
        return None, [str(error) if isinstance(error, BrokenCheckpointError) else f"state.json cannot be read: {error}"]
    missing = [f"state.json does not list {MODEL}"] if MODEL not in body["files"] else []
    return body, missing + (compare_all(folder, body["files"], digests) if sizes else [])


def _compare(folder: Folder | Bucket, name: str, entry: Mapping[str, Any], digests: bool) -> str | None:
    try:
        size = folder.size(name)
        if size is None:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} bytes, but {entry['size']} were written"
        if digests and folder.digest(name, entry["digest"].partition(":")[0]) != entry["digest"]:
            return _altered(name)
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None
