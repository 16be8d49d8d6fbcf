"""The content of a path: tensors and manifest of a checkpoint, or the tensors of a plain safetensors file."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from fnlight.checkpoint import FILES, MODEL, STATE, at, decode, history_of, open_checkpoint, physical
from fnlight.errors import BrokenCheckpointError
from fnlight.state import History


@attrs.frozen(eq=False)
class Content:
    """The content of a checkpoint or file.

    Args:
        path: The checkpoint, or the file.
        tensors: By file, names to tensors.
        body: The sections of the manifest; None of a plain file.
        sizes: Bytes by file.

    Example:
        >>> Content("a.safetensors", {"model.safetensors": {}}, None, {}).history
        ()
    """

    path: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    body: Mapping[str, Any] | None
    sizes: Mapping[str, int]

    @property
    def history(self) -> History:
        """The records of the manifest."""
        return history_of(self.body) if self.body is not None else History()

    def memory(self, key: str) -> Any:
        """The tree that a combinator owned; None if there is none."""
        if self.body is None or key not in self.body["memory"]:
            return None
        return decode(self.body["memory"][key], self.tensors["memory.safetensors"].__getitem__)


def content(path: str) -> Content:
    """Read a checkpoint, the newest valid one of a run, or a plain safetensors file; every digest is checked.

    Args:
        path: A path or URL.

    Returns:
        What it holds.

    Raises:
        CheckpointError: If there is nothing.
        BrokenCheckpointError: If it is damaged.

    Example:
        >>> content("no/such/run")
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: no checkpoint at no/such/run: there is no such directory
    """
    file = at(path)
    folder, name = file.parent(), file.name()
    count = folder.size(name)
    if count is not None:
        try:
            return Content(path, {MODEL: folder.tensors(name)}, None, {name: count})
        except Exception as error:  # the safetensors library raises its own class, and others on damage
            raise BrokenCheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    opened = open_checkpoint(path)
    sizes = {name: entry["size"] for name, entry in physical(opened.body["files"]).items()} | {STATE: opened.folder.size(STATE) or 0}
    return Content(opened.path, {name: opened.tensors(name) for name in FILES}, opened.body, sizes)
