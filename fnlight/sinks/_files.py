"""Shared by the sinks that write files: checks of paths, clear errors, appends that write all or nothing, and where to cut a log."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fnlight.errors import ConfigError, StepError
from fnlight.metrics import MEDIA

_ADVICE = {
    errno.ENOSPC: "free some space and resume the run",
    errno.EDQUOT: "free some of your quota and resume the run",
    errno.EISDIR: "give the name of a file in that directory",
    errno.EEXIST: "give a path that is free",
    errno.ENOTDIR: "a part of that path is a file; give another path",
}


def local_path(sink: str, path: Any) -> str:
    """The path as text; an error if it is not a local path."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{sink}(path) must be the path of a file or directory to write to, but got {path!r}")
    if "://" in text:
        raise ConfigError(f"{sink} writes to local paths only, but got {text!r}; write to a local directory and copy it after the run")
    return text


@contextmanager
def explained(sink: Any, path: str) -> Iterator[None]:
    """Add to errors of the operating system which sink failed, at which path, and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "give a path that this process may write to")
        raise OSError(error.errno, f"{sink!r} cannot write {os.path.abspath(path)!r}: {error.strerror}; {advice}") from error


def opened(path: str | Path) -> Any:
    """A file to append to, without a buffer: no data waits in memory, and a forked process cannot write it twice."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path).open("ab", buffering=0)


def append(file: Any, data: bytes) -> None:
    """Append all of the data, or nothing if that fails."""
    before = os.fstat(file.fileno()).st_size
    try:
        done = file.write(data)
        while done < len(data):
            done += file.write(data[done:])
    except OSError:
        with suppress(OSError):
            file.truncate(before)
        raise


def sync(file: Any) -> None:
    """Write the data to the disk itself; devices and pipes have none."""
    with suppress(OSError):
        os.fsync(file.fileno())


def kept(data: bytes, start: int, step: int, step_of: Callable[[bytes], int]) -> int:
    """How many bytes of a log remain after dropping its incomplete last line and the lines of step `step` and later.

    Args:
        data: The log; steps never decrease in it.
        start: Where its lines begin.
        step: The first step to drop.
        step_of: The step of a line; raises ValueError if the line is not from a log.

    Returns:
        The end of the last line that stays.
    """
    end = max(data.rfind(b"\n") + 1, start)
    while end > start:
        begin = max(data.rfind(b"\n", start, end - 1) + 1, start)
        if step_of(data[begin : end - 1]) < step:
            return end
        end = begin
    return start


def scalars(record: Any) -> dict[str, float]:
    """The metrics of a record that are numbers, without media; an error for any other value."""
    found: dict[str, float] = {}
    for name, value in record.metrics.items():
        if isinstance(value, MEDIA):
            continue
        try:
            if isinstance(value, str):
                raise TypeError  # a string of digits is not a number
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StepError(
                f"metric {name!r} at step {record.step} must be one number or media such as fl.Image, but is {type(value).__name__}: {value!r:.60}"
            ) from error
    return found
