"""The lock of a run's directory: two runs into one directory are detected before any work; a dead process leaves no lock.

The lock is the system's (``flock``), held on the file ``.lock`` for as long as a run lasts. It goes with the process, however that ends. Forked
workers of a loader inherit it; where they outlive their parent, the lock is taken from them, for the file says whose it was.

The library filelock, which torch installs in any version, would replace about 45 lines, but cannot say who holds a lock. If a forked worker
outlives a process that was killed (SIGKILL), filelock 3.29 and portalocker 4.4.2 keep the directory locked; filelock 4.3.1 does not. Their imports
take 73 and 75 ms.
"""

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.folder import cannot_write, make, refuse_links
from fnlight.checkpoint.places import Path, at
from fnlight.errors import CheckpointError, CheckpointWarning, LockedError, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

NAME = ".lock"
_WITHOUT = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@attrs.define(eq=False, repr=False)
class Lock:
    """A lock that is held; made by `hold`.

    Args:
        path: The locked file; empty where nothing can be locked.
        file: Its descriptor.
        pid: The process that holds it; a fork of it cannot release it.

    Example:
        >>> Lock("", None, 0).release()
    """

    path: str
    file: int | None
    pid: int

    def release(self) -> None:
        """Let others in, and delete the file; once is enough."""
        file, self.file = self.file, None
        if file is None or self.pid != os.getpid():
            return
        try:
            if _is_at(file, self.path):
                os.unlink(self.path)
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where workers have inherited it
        except OSError:
            pass  # the directory is gone, and the lock with it
        finally:
            os.close(file)

    def look(self) -> None:
        """Make sure that the directory is still held, before something is written into it.

        Whoever deletes it deletes the lock with it. It is made again, unless another run has taken the directory meanwhile.

        Raises:
            LockedError: If one has.
        """
        if self.file is None or self.pid != os.getpid() or _is_at(self.file, self.path):
            return
        try:
            again = hold(os.path.dirname(self.path))
        except LockedError as error:
            raise LockedError(f"the lock of this run was deleted, and another run has begun since: {error}") from None
        os.close(self.file)
        self.file = again.file

    def close(self, _: BaseException | None) -> None:
        """Release it at the end of a run."""
        self.release()


def hold(dir: Path, clock: Callable[[], float] = time.time) -> Lock:
    """Lock a run's directory, which is created if it does not exist.

    Args:
        dir: The run's directory; a URL cannot be locked and gives a lock that holds nothing.
        clock: Gives the seconds since 1970, for the error that others get.

    Returns:
        The lock; release it.

    Raises:
        LockedError: If a run holds it that is not over; its process, host and beginning are named.
        CheckpointError: If the directory cannot be written, or the lock is a link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = hold(folder)
        ...     lock.release()
        ...     os.listdir(folder)
        []
    """
    folder = at(dir)
    if isinstance(folder, Bucket) or fcntl is None:
        return Lock("", None, os.getpid())
    path = os.path.join(os.path.realpath(folder.path), NAME)
    refuse_links(os.path.dirname(path), NAME)
    file = None
    try:
        make(folder)
        while file is None:
            file = _attempt(path, folder.path, clock)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise cannot_write(path, error) from error
        warn(f"the file system of {folder.path} has no locks, so a second run into this directory is not detected", CheckpointWarning)
    return Lock(path, file, os.getpid())


@contextmanager
def held(dir: Path | None) -> Iterator[dict[str, Lock]]:
    """Hold the lock of a run's directory, under its name among the resources of a run.

    Args:
        dir: The directory; None holds nothing.

    Yields:
        A mapping to put among the resources of a run.

    Raises:
        LockedError: If another run holds it.

    Example:
        >>> with held(None) as locks:
        ...     locks
        {}
    """
    lock = None if dir is None else hold(dir)
    try:
        yield {} if dir is None or lock is None else {name_of(dir): lock}
    finally:
        if lock is not None:
            lock.release()


def name_of(dir: Path) -> str:
    """Return the name of a directory's lock among the resources of a run.

    Args:
        dir: A run's directory.

    Returns:
        The name, one for all ways to write the path.

    Example:
        >>> name_of("runs/a") == name_of("runs/../runs/a")
        True
    """
    folder = at(dir)
    return f"lock {folder.path if isinstance(folder, Bucket) else os.path.realpath(folder.path)}"


def _attempt(path: str, dir: str, clock: Callable[[], float]) -> int | None:
    """Open the file, lock and sign it; None if it was deleted meanwhile, so that another one must be opened."""
    file, mine = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), False
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise CheckpointError(f"{path} is no file of its own, but something with another name as well, or of another kind; delete it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _take_over(file, path, dir)
        else:
            mine = _is_at(file, path)
        if mine:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_signature(clock)).encode(), 0)
    except BaseException:
        mine = False
        raise
    finally:
        if not mine:
            os.close(file)
    return file if mine else None


def _take_over(file: int, path: str, dir: str) -> None:
    """Delete a lock that only forks of a dead process still hold; of several that try it, one does."""
    holder = _read(file)
    try:
        if not _is_dead(holder):
            raise BlockingIOError
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process alone, so no fork has it
    except BlockingIOError:
        raise LockedError(_held_by(dir, path, holder)) from None
    if _is_at(file, path):
        os.unlink(path)


def _held_by(dir: str, path: str, holder: dict[str, Any]) -> str:
    if not holder:
        who, what = "another process, which has just started", "wait until it has ended"
    elif (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
        who = f"a run of this same process, since {holder.get('since')}"
        what = "end that run first (if its loop was left by an error, close the generator of fl.run with its close())"
    else:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        what = f"wait until it has ended, or end it; if you are sure that it no longer runs, delete {path}"
    return f"{dir} is in use by {who}; two runs into one directory would delete each other's checkpoints: {what}, or give another dir"


def _signature(clock: Callable[[], float]) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock()))
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "machine": _machine(), "begun": _begun(os.getpid())}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Say whether the process that signed a lock is surely gone: only where this machine can know."""
    pid, machine = holder.get("pid"), _machine()
    return machine is not None and holder.get("machine") == machine and isinstance(pid, int) and _begun(pid) != holder.get("begun")


def _machine() -> str | None:
    """This boot of this machine, and the processes that one sees here; None if the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _begun(pid: int) -> str | None:
    """When a process began, in the clock of the system; None if there is none that lives."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
