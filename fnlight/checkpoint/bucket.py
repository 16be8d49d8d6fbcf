"""A folder of a remote store, through fsspec: no renames there, so the manifest, written last, is the commit mark."""

import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor

from fnlight.checkpoint.digest import Digest
from fnlight.checkpoint.folder import cannot_write
from fnlight.checkpoint.manifest import FILES, STATE
from fnlight.errors import CheckpointError


@attrs.frozen
class Bucket:
    """A folder of a remote store; the same methods as `Folder`.

    Args:
        path: Its URL, such as ``s3://bucket/runs/a``.

    Example:
        >>> Bucket("memory://runs/a").name()
        'a'
    """

    path: str

    def _at(self, name: str = "") -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise CheckpointError(f"{self.path} needs fsspec: pip install fsspec (and s3fs, gcsfs, ... for the store)") from error
        store, root = url_to_fs(self.path)
        return store, posixpath.join(root, name) if name else root

    def child(self, name: str) -> "Bucket":
        """A folder in this one."""
        return Bucket(f"{self.path.rstrip('/')}/{name}")

    def parent(self) -> "Bucket":
        """The folder that this one is in."""
        return Bucket(self.path.rstrip("/").rpartition("/")[0])

    def name(self) -> str:
        """The last part of the URL."""
        return self.path.rstrip("/").rpartition("/")[2]

    def names(self) -> list[str]:
        """What is in it, sorted; nothing if it does not exist."""
        store, root = self._at()
        store.invalidate_cache(root)
        if not store.isdir(root):
            return []
        return sorted(posixpath.basename(found.rstrip("/")) for found in store.ls(root, detail=False))

    def exists(self) -> bool:
        """Say whether there is anything at the URL."""
        return bool(self.names())

    def size(self, name: str) -> int | None:
        """The bytes of a file; None if there is none."""
        store, path = self._at(name)
        return int(store.size(path)) if store.isfile(path) else None

    def read(self, name: str) -> bytes:
        """The content of a file."""
        store, path = self._at(name)
        return store.cat_file(path)

    def digest(self, name: str, kind: str) -> str:
        """The digest of a file, of one of `KINDS`."""
        digest = Digest(kind)
        digest.update(self.read(name))
        return str(digest)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file."""
        from safetensors.torch import load

        return load(self.read(name))

    def write(self, name: str, chunks: Iterable[memoryview | bytes]) -> dict[str, Any]:
        """Write a file; its size and digest are taken on the way."""
        size, digest = 0, Digest()
        store, path = self._at(name)
        with store.open(path, "wb") as file:
            for chunk in chunks:
                size += len(chunk)
                digest.update(chunk)
                file.write(chunk)
        return {"size": size, "digest": str(digest)}

    @contextmanager
    def replacing(self, overwrite: bool) -> Iterator["Bucket"]:
        """This folder, its old commit mark deleted; on failure what was written is deleted."""
        if STATE in self.names() and not overwrite:
            raise CheckpointError(
                f"cannot write a checkpoint to {self.path}: there is one already; pass overwrite=True or give another path"
            )
        try:
            self._clear()
            yield self
        except CheckpointError:
            self._clear()
            raise
        except Exception as error:  # each store has errors of its own
            self._clear()
            raise cannot_write(self.path, error) from error

    def _clear(self) -> None:
        present = self.names()
        for name in (STATE, *FILES):
            if name in present:
                store, path = self._at(name)
                store.rm_file(path)

    def rewrite(self, name: str, data: bytes) -> None:
        """Replace the content of one file."""
        try:
            self.write(name, [data])
        except Exception as error:
            raise cannot_write(f"{self.path}/{name}", error) from error

    def remove(self) -> None:
        """Delete it, its commit mark first."""
        self._clear()
        store, root = self._at()
        if store.exists(root):
            store.rm(root, recursive=True)
