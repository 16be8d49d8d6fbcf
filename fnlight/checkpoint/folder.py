"""A folder on this machine, in which files are written crash-safe: flushed to disk, then renamed into place."""

import errno
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.checkpoint.digest import Digest, digest_of_file
from fnlight.checkpoint.header import read_header
from fnlight.checkpoint.manifest import MAX_BYTES, STATE, belongs
from fnlight.checkpoint.tensors import fetch, memory_of_machine
from fnlight.errors import CheckpointError

_PIECE = 1 << 20  # bytes hashed and written at a time: they are still in the processor's cache when they are written
_AHEAD = 1 << 24  # bytes after which the system is asked to begin with the disk, so that the last flush has little left to wait for
_HINTS = {
    errno.ENOSPC: "free disk space and save again",
    errno.EDQUOT: "raise the quota or free disk space, and save again",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "change the permissions of the directory, or choose another path",
    errno.EPERM: "change the permissions of the directory, or choose another path",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENOTDIR: "choose a path whose parents are directories",
}


def cannot_write(path: str, error: Exception) -> CheckpointError:
    """Return the error for a failed write: what failed, and what to do.

    Args:
        path: The checkpoint or directory that was to be written.
        error: What the system said.

    Returns:
        The error to raise.

    Example:
        >>> str(cannot_write("runs/a", OSError(errno.ENOSPC, "No space left on device")))
        'cannot write runs/a: [Errno 28] No space left on device; free disk space and save again. Older checkpoints are unchanged.'
    """
    hint = _HINTS.get(getattr(error, "errno", None) or 0, "see the cause above")
    return CheckpointError(f"cannot write {path}: {error or type(error).__name__}; {hint}. Older checkpoints are unchanged.")


@attrs.frozen
class Folder:
    """A directory on this machine.

    Args:
        path: Its path; it need not exist.

    Example:
        >>> Folder("no/such/folder").names()
        []
    """

    path: str

    def child(self, name: str) -> "Folder":
        """A folder in this one."""
        return Folder(os.path.join(self.path, name))

    def parent(self) -> "Folder":
        """The folder that this one is in."""
        return Folder(os.path.dirname(os.path.abspath(self.path)))

    def name(self) -> str:
        """The last part of the path."""
        return os.path.basename(os.path.abspath(self.path))

    def names(self) -> list[str]:
        """What is in it, sorted; nothing if it does not exist."""
        return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []

    def exists(self) -> bool:
        """Say whether there is anything at the path."""
        return os.path.lexists(self.path)

    def size(self, name: str) -> int | None:
        """The bytes of a regular file; None if there is none."""
        path = os.path.join(self.path, name)
        return os.path.getsize(path) if os.path.isfile(path) else None

    def hollow(self, name: str) -> str | None:
        """What is wrong with a file that is larger than any memory, but hardly there: reading it would take hours, for nothing."""
        found = os.stat(os.path.join(self.path, name))
        blocks = getattr(found, "st_blocks", 0)  # 0 where the file system does not say
        if found.st_size <= memory_of_machine() or not 0 < blocks * 512 < found.st_size // 2:
            return None
        return f"{name} is said to have {found.st_size} bytes, but only {blocks * 512} of them are on the disk"

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """The content of a regular file, which is refused where it is larger."""
        with self._open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, more than the {limit} that are read", name)
            data = file.read(size + 1)
        if len(data) != size:  # as in /proc, where files say that they are empty
            raise OSError(errno.EINVAL, f"it is no plain file: it has {size} bytes, but more or fewer can be read", name)
        return data

    def _open(self, name: str) -> io.BufferedReader:
        """A plain file, or one that a link leads to; opening another kind, such as a pipe, would wait for a writer, and reading it for data."""
        path = os.path.join(self.path, name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "no regular file", path)
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            _check_plain(path, file)
            return os.fdopen(file, "rb")  # the caller closes it
        except BaseException:
            os.close(file)
            raise

    def part(self, name: str, start: int, end: int) -> bytearray:
        """The bytes of a file from a start to an end, and no others."""
        data = bytearray(end - start)
        self.into(name, start, memoryview(data))
        return data

    def into(self, name: str, start: int, view: memoryview) -> None:
        """Fill memory with the bytes of a file from a start on."""
        with self._open(name) as file:
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(errno.EIO, f"the file ends {len(view)} bytes too early", name)
                view = view[count:]

    def digest(self, name: str, kind: str) -> str:
        """The digest of a file, of one of `KINDS`."""
        with self._open(name) as file:
            return digest_of_file(file.readinto, kind)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, whose header is checked first; they are views of the mapped file, to be copied."""
        with self._open(name) as file:
            size = os.fstat(file.fileno()).st_size
            places = read_header(lambda start, end: (file.seek(start), file.read(end - start))[1], size)
        storage: Any = torch.UntypedStorage.from_file(os.path.join(self.path, name), False, size)
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        return {key: place.mapped(whole) for key, place in places.items()}

    def fetch(self, name: str, kind: str) -> tuple[dict[str, Tensor], str]:
        """The tensors of a safetensors file in memory of their own, and the digest of what they were filled with."""
        with self._open(name) as file:
            return fetch(file.readinto, os.fstat(file.fileno()).st_size, kind)

    def write(self, name: str, chunks: Iterable[memoryview | bytes]) -> dict[str, Any]:
        """Write a new file and flush it to disk; its size and digest are taken on the way."""
        size, begun, digest = 0, 0, Digest()
        file = os.open(os.path.join(self.path, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            for chunk in chunks:
                for start in range(0, len(chunk), _PIECE):
                    piece = memoryview(chunk)[start : start + _PIECE]
                    size += len(piece)
                    digest.update(piece)
                    while piece:
                        piece = piece[os.write(file, piece) :]
                    if size - begun >= _AHEAD:
                        _begin(file, begun, size - begun)
                        begun = size
            os.fsync(file)
        finally:
            os.close(file)
        return {"size": size, "digest": str(digest)}

    @contextmanager
    def replacing(self, overwrite: bool) -> Iterator["Folder"]:
        """A hidden sibling to write into; it becomes this folder if all goes well, and disappears if not."""
        target = Folder(os.path.realpath(self.path))
        _check_target(target, self.path, overwrite)
        hidden = _hidden(target, "tmp")
        try:
            make(target.parent())
            os.mkdir(hidden.path)
            yield hidden
            _sync(hidden.path)
            _publish(hidden, target)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            shutil.rmtree(hidden.path, ignore_errors=True)
        for name in hidden_siblings(target):
            shutil.rmtree(os.path.join(target.parent().path, name), ignore_errors=True)

    def rewrite(self, name: str, data: bytes) -> None:
        """Replace the content of one file, atomically."""
        hidden = f".{name}.tmp-{secrets.token_hex(4)}"
        try:
            self.write(hidden, [data])
            os.replace(os.path.join(self.path, hidden), os.path.join(self.path, name))
            _sync(self.path)
        except OSError as error:
            raise cannot_write(os.path.join(self.path, name), error) from error
        finally:
            if self.size(hidden) is not None:
                with suppress(OSError):  # where not even this works, the error above says why
                    os.unlink(os.path.join(self.path, hidden))

    def remove(self) -> None:
        """Delete it: first out of sight in one move, so that no reader sees half of it."""
        if os.path.islink(self.path):
            os.unlink(self.path)  # what it leads to is not ours
        elif self.exists():
            os.rename(self.path, _hidden(self, "gone").path)
        for name in hidden_siblings(self):
            shutil.rmtree(self.parent().child(name).path)


def _check_plain(path: str, file: int) -> None:
    """Refuse what is no file with a content of its own: what took its place meanwhile, and links to what the system makes up as it is read."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "no regular file", path)
    if os.path.islink(path) and os.name != "nt" and os.fstatvfs(file).f_blocks == 0:
        raise OSError(errno.EINVAL, "a link to what is no plain file, for its file system has no room for any", path)


def _hidden(folder: Folder, kind: str) -> Folder:
    return folder.parent().child(f".{folder.name()}.{kind}-{secrets.token_hex(4)}")


def hidden_siblings(folder: Folder, *kinds: str) -> list[str]:
    """Return the names of what an interrupted save or deletion of a folder has left next to it.

    Args:
        folder: The folder that was being written or deleted.
        *kinds: ``tmp`` (being written), ``old`` (set aside) or ``gone`` (being deleted); all of them if left out.

    Returns:
        Names, sorted.

    Example:
        >>> hidden_siblings(Folder("no/such/folder"))
        []
    """
    heads = tuple(f".{folder.name()}.{kind}-" for kind in kinds or ("tmp", "old", "gone"))
    return [name for name in folder.parent().names() if name.startswith(heads)]


def _check_target(target: Folder, path: str, overwrite: bool) -> None:
    if not target.exists():
        return
    if not os.path.isdir(target.path):
        raise CheckpointError(f"cannot write a checkpoint to {path}: it is a file; give the path of a new directory, or delete the file")
    foreign = [name for name in target.names() if not belongs(name) and not name.startswith(f".{STATE}.tmp-")]
    if foreign:
        raise CheckpointError(
            f"cannot write a checkpoint to {path}: it contains {', '.join(foreign[:3])}, which are not files of a checkpoint and would be lost; "
            "give the path of a new directory"
        )
    if not overwrite:
        raise CheckpointError(f"cannot write a checkpoint to {path}: one exists already; pass overwrite=True or give another path")


def _publish(hidden: Folder, target: Folder) -> None:
    """Replace the old folder by the new one; if that fails, the old one is restored."""
    aside = _hidden(target, "old")
    try:
        if target.exists():
            os.rename(target.path, aside.path)
        os.rename(hidden.path, target.path)
        _sync(target.parent().path)
    except BaseException:
        if not hidden.exists():
            os.rename(target.path, hidden.path)
        if aside.exists():
            os.rename(aside.path, target.path)
        raise


def refuse_links(dir: str, *names: str) -> None:
    """Refuse links in a run's directory where something is to be written: the directory may be a stranger's, and they may lead anywhere.

    Args:
        dir: The run's directory, which may be a link itself.
        *names: What will be written in it.

    Raises:
        CheckpointError: If one of them is a link.

    Example:
        >>> refuse_links("no/such/run", "config.json")
    """
    for name in names:
        path = os.path.join(dir, name)
        if os.path.islink(path):
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)!r:.200}, and nothing is written through links that are in a run's directory; delete the link, "
                f"or make {dir} itself the link"
            )


def make(folder: Folder) -> None:
    """Make a directory and its parents, each flushed to disk.

    Args:
        folder: What shall exist afterwards.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     make(Folder(path).child("a").child("b"))
        ...     Folder(path).child("a").names()
        ['b']
    """
    if os.path.isdir(folder.path):
        return
    make(folder.parent())
    try:
        os.mkdir(folder.path)
    except FileExistsError:
        if not os.path.isdir(folder.path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder.path) from None
    _sync(folder.parent().path)


def _begin(file: int, start: int, count: int) -> None:
    """Let the system begin to write a part of a file to disk; nobody waits, and what cannot be begun is done by the flush in the end."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)  # pages are written first, and not dropped before they are


def _sync(path: str) -> None:
    """Flush a directory, so that the names in it survive a crash."""
    if os.name == "nt":
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
