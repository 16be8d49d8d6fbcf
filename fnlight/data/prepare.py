"""Data that is made once: downloaded, unpacked or preprocessed by one process of a machine, while the others wait.

Not part of `fnlight.parallel`: processes need not train together, nor know of each other, to share a folder.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fnlight.errors import LoaderError, check_type


def prepare(path: str | os.PathLike[str], make: Callable[[str], Any]) -> str:
    """Make a file or a folder, unless it is there; of several processes that ask for it, one makes it and the others wait.

    It appears at once and whole: `make` writes to another name beside it, which is renamed. What a killed process has left is made again.
    The path must be on a file system that knows locks, such as a disk of the machine; on another machine it is made there.

    Args:
        path: What is to be there.
        make: ``(path) -> None``: writes a file or a folder to the path that it is given.

    Returns:
        The path.

    Raises:
        LoaderError: If `make` has written nothing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = prepare(f"{folder}/rows.txt", lambda path: Path(path).write_text("1 2 3"))
        ...     Path(prepare(path, max)).read_text()  # it is there: nothing is called
        '1 2 3'
    """
    check_type("prepare(path)", path, str | os.PathLike, "the path of a file or folder to make")
    check_type("prepare(make)", make, Callable, "a function of a path, which writes to it")
    wanted = os.path.abspath(os.fspath(path))
    if os.path.exists(wanted):
        return wanted
    os.makedirs(os.path.dirname(wanted), exist_ok=True)
    with _locked(f"{wanted}.lock"):
        if not os.path.exists(wanted):  # another process may have made it meanwhile
            part = f"{wanted}.part"
            _remove(part)
            make(part)
            if not os.path.exists(part):
                raise LoaderError(
                    f"prepare({wanted!r}, make): make must write a file or a folder to the path that it is given, but {part} is not there"
                )
            os.replace(part, wanted)
    return wanted


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock that the system takes back from a process that dies."""
    import fcntl  # of Unix

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
