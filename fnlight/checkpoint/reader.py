"""Checkpoint verification: the manifest is read, and every file is compared with it, whole or in parts."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from torch import Tensor

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.folder import Folder
from fnlight.checkpoint.layout import Layout, physical, read_layouts
from fnlight.checkpoint.listing import FILES
from fnlight.checkpoint.manifest import STATE, parse, printable
from fnlight.checkpoint.pieces import Like, compare_header, joined, read_pieces, stored_in
from fnlight.checkpoint.tensors import as_listed
from fnlight.errors import BrokenCheckpointError, CheckpointError


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
                return dict(self.held[name])
            if "parts" in entry:
                return as_listed(joined(name, entry, self.layouts, self.folder.tensors), entry["tensors"])
            return as_listed(self.folder.tensors(name), entry["tensors"])
        except Exception as error:  # each store has errors of its own
            if isinstance(error, CheckpointError):
                raise
            raise BrokenCheckpointError(f"checkpoint {self.path} is broken: {name} cannot be read: {printable(str(error))}") from error


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
                tensors = _fetch(folder, name, entry, layouts=layouts_of(body), found=found)
                held[name] = {} if found else as_listed(tensors, entry["tensors"])
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:
                found += compare_all(folder, body, digests=True, names=(name,)) or [f"{name} cannot be read: {error}"]
        elif name in files or others:
            found += compare_all(folder, body, digests=True, names=(name,))
    return ({} if found else held), [printable(problem) for problem in found]


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


def compare_all(
    folder: Folder | Bucket, body: Mapping[str, Any], digests: bool, names: Iterable[str] = FILES, share: slice = slice(None)
) -> list[str]:
    """Hold files against what the manifest says of them, parts one by one.

    Args:
        folder: The checkpoint.
        body: The sections of the manifest.
        digests: Whether every byte is read, too: the header, which must list the very tensors of the manifest, and then all of it.
        names: The files of the manifest that are looked at.
        share: Which of these files and parts, counted one after the other.

    Returns:
        What is wrong, one line a problem.

    Example:
        >>> entry = {"size": 8, "digest": "xxh3:0", "tensors": {}}
        >>> compare_all(Folder("no/such/folder"), {"files": {"model.safetensors": entry}, "layouts": []}, digests=False)
        ['model.safetensors is missing']
    """
    layouts = layouts_of(body)
    there = [
        (name, part, lambda entry=entry, index=index: stored_in(entry, layouts, index))
        for file, entry in body["files"].items()
        if file in names
        for index, (name, part) in enumerate(physical({file: entry}).items())
    ]
    problems = (_compare(folder, name, part, held if digests else None) for name, part, held in there[share])
    return [printable(problem) for problem in problems if problem is not None]


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
    return body, compare_all(folder, body, digests) if sizes else []


def _compare(folder: Folder | Bucket, name: str, part: Mapping[str, Any], held: Callable[[], Mapping[str, Any]] | None) -> str | None:
    """Hold one file against its size; and, if it is known what is in it, against that and against its digest."""
    try:
        size = folder.size(name)
        if size is None:
            return f"{name} is missing"
        if size != part["size"]:
            return f"{name} has {size} bytes, but {part['size']} were written"
        hollow = folder.hollow(name) if isinstance(folder, Folder) else None
        if held is None or hollow:
            return hollow
        problem = compare_header(folder.part, name, size, held())
        return _altered(name) if folder.digest(name, part["digest"].partition(":")[0]) != part["digest"] else problem
    except OSError as error:
        return f"{name} cannot be read: {error}"
