"""A folder of a remote store, through fsspec. Remote stores have no renames, so the manifest, written last, is the commit mark."""

import errno
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs
from torch import Tensor

from fnlight.checkpoint.digest import Digest
from fnlight.checkpoint.folder import cannot_write
from fnlight.checkpoint.header import Place, read_header
from fnlight.checkpoint.manifest import MAX_BYTES, STATE, belongs
from fnlight.checkpoint.retry import retried
from fnlight.checkpoint.tensors import fetch
from fnlight.errors import CheckpointError

T = TypeVar("T")

_PIECE = 1 << 26  # bytes that are asked for at once


@attrs.frozen
class Bucket:
    """A folder of a remote store; the same methods as `Folder`.

    Args:
        path: Its URL, such as ``s3://bucket/runs/a``.
        sleep: Waits before an attempt is repeated.

    Example:
        >>> Bucket("memory://runs/a").name()
        'a'
    """

    path: str
    sleep: Callable[[float], Any] = attrs.field(default=time.sleep, eq=False, repr=False)

    def _at(self, name: str = "") -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            store, root = url_to_fs(self.path)
        except ImportError as error:
            extra = (
                "pip install 'fnlight[s3]'" if self.path.startswith(("s3://", "s3a://")) else "install the package that this message names"
            )
            raise CheckpointError(f"{self.path} needs a package that is not installed: {error}; {extra}") from error
        return store, posixpath.join(root, name) if name else root

    def _retried(self, fn: Callable[[], T]) -> T:
        return retried(fn, self.sleep)

    def child(self, name: str) -> "Bucket":
        """A folder in this one."""
        return Bucket(f"{self.path.rstrip('/')}/{name}", self.sleep)

    def parent(self) -> "Bucket":
        """The folder that this one is in."""
        return Bucket(self.path.rstrip("/").rpartition("/")[0], self.sleep)

    def name(self) -> str:
        """The last part of the URL."""
        return self.path.rstrip("/").rpartition("/")[2]

    def names(self) -> list[str]:
        """What is in it, sorted; nothing if it does not exist."""
        store, root = self._at()

        def listed() -> list[str]:
            store.invalidate_cache(root)
            return store.ls(root, detail=False) if store.isdir(root) else []

        return sorted(posixpath.basename(found.rstrip("/")) for found in self._retried(listed))

    def exists(self) -> bool:
        """Say whether there is anything at the URL."""
        return bool(self.names())

    def size(self, name: str) -> int | None:
        """The bytes of a file; None if there is none."""
        store, path = self._at(name)

        def measured() -> int | None:
            store.invalidate_cache(posixpath.dirname(path))
            return int(store.size(path)) if store.isfile(path) else None

        return self._retried(measured)

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """The content of a file, which is refused where it is larger."""
        size = self.size(name)
        if size is None or size > limit:
            raise OSError(errno.EFBIG, "no such file" if size is None else f"it has {size} bytes, more than the limit of {limit}", name)
        return self.part(name, 0, size)

    def part(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from a start to an end, and no others."""
        store, path = self._at(name)
        return self._retried(lambda: store.cat_file(path, start=start, end=end)) if end > start else b""

    def digest(self, name: str, kind: str) -> str:
        """The digest of a file, of one of `KINDS`."""
        digest, size = Digest(kind), self.size(name) or 0
        for start in range(0, size, _PIECE):
            digest.update(self.part(name, start, min(size, start + _PIECE)))
        return str(digest)

    def fetch(self, name: str, kind: str) -> tuple[dict[str, Tensor], str]:
        """The tensors of a safetensors file, asked for a piece at a time, and the digest of what they were filled with."""
        size = self.size(name) or 0
        return fetch(_Pieces(lambda start, end: self.part(name, start, end), size).readinto, size, kind)

    def tensors(self, name: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The tensors of a safetensors file; those that are not wanted are not read, and come without values, on the meta device."""
        size = self.size(name) or 0
        places = read_header(lambda start, end: self.part(name, start, end), size)
        found = {key: place.meta() for key, place in places.items()}
        for keys in _neighbours({key: place for key, place in places.items() if wanted(key)}):
            start = places[keys[0]].start
            data = bytearray(self.part(name, start, places[keys[-1]].end))
            found |= {key: places[key].tensor(data, start) for key in keys}
        return found

    def write(self, name: str, chunks: Iterable[memoryview | bytes]) -> dict[str, Any]:
        """Write a file, from the start again where a connection was lost; its size and digest are taken on the way."""
        store, path = self._at(name)

        def written() -> dict[str, Any]:
            size, digest = 0, Digest()
            with store.open(path, "wb") as file:
                for chunk in chunks:
                    size += len(chunk)
                    digest.update(chunk)
                    file.write(chunk)
            return {"size": size, "digest": str(digest)}

        return self._retried(written)

    @contextmanager
    def replacing(self, overwrite: bool) -> Iterator["Bucket"]:
        """This folder, its old commit mark deleted; on failure what was written is deleted."""
        if STATE in self.names() and not overwrite:
            raise CheckpointError(f"cannot write a checkpoint to {self.path}: one exists already; pass overwrite=True or give another path")
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
        for name in sorted(present, key=lambda name: name != STATE):
            if belongs(name):
                store, path = self._at(name)
                self._retried(lambda store=store, path=path: store.rm_file(path) if store.isfile(path) else None)

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


class _Pieces:
    """The bytes of a file one after the other, of which a large piece is asked for at a time."""

    def __init__(self, part: Callable[[int, int], bytes], size: int) -> None:
        self._part, self._size = part, size
        self._start, self._held = 0, memoryview(b"")

    def readinto(self, view: memoryview) -> int:
        """Fill a view, or the front of it."""
        if not self._held:
            self._held = memoryview(self._part(self._start, min(self._size, self._start + _PIECE)))
            self._start += len(self._held)
        count = min(len(view), len(self._held))
        view[:count], self._held = self._held[:count], self._held[count:]
        return count


def _neighbours(places: Mapping[str, Place]) -> list[list[str]]:
    """Names of tensors that lie side by side, in groups that are read at once."""
    groups: list[list[str]] = []
    for name in sorted(places, key=lambda name: places[name].start):
        last = groups[-1] if groups else []
        if last and places[last[-1]].end == places[name].start and places[name].end - places[last[0]].start <= _PIECE:
            last.append(name)
        else:
            groups.append([name])
    return groups
