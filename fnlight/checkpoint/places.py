"""The paths of checkpoints, ``DIR/checkpoints/step-00000500``; which of them are valid, and which is the newest."""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.folder import Folder, cannot_write, hidden_siblings, make, refuse_links
from fnlight.checkpoint.head import history_of
from fnlight.checkpoint.listing import FILES
from fnlight.checkpoint.manifest import STATE, belongs
from fnlight.checkpoint.reader import Opened, compare_all, examine, fetched
from fnlight.checkpoint.retry import WAITS
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning, ConfigError, check_type, warn

_STEP = re.compile(r"step-([0-9]{8,})")
_ASIDE = re.compile(r"\.(step-[0-9]{8,})\.old-[0-9a-f]+")

WRITTEN = (".lock", "config.json", "checkpoints", "bundles", "traces")
"""What a run writes in its directory."""

Path = str | os.PathLike[str]
T = TypeVar("T")


def at(path: Path) -> Folder | Bucket:
    """Return the folder at a path: on this machine, or, for a URL, in a remote store.

    Args:
        path: A path, or a URL such as ``s3://bucket/runs/a``.

    Returns:
        Something to read and write files in.

    Example:
        >>> at("runs/a"), at("memory://runs/a")
        (Folder(path='runs/a'), Bucket(path='memory://runs/a'))
    """
    check_type("the path of a checkpoint", path, str | os.PathLike, "a str or os.PathLike")
    text = os.fspath(path)
    text = text.removeprefix("file://")
    return Bucket(text) if "://" in text else Folder(text)


def step_path(dir: Path, step: int) -> str:
    """Return the path of the checkpoint of a step in a run's directory.

    Args:
        dir: The run's directory, or a URL.
        step: Completed optimizer updates.

    Returns:
        The path, eight digits at least.

    Example:
        >>> step_path("runs/a", 500)
        'runs/a/checkpoints/step-00000500'
    """
    return at(dir).child("checkpoints").child(f"step-{step:08d}").path


def own_path(dir: Path, step: int) -> str:
    """The path of the checkpoint of a step, to be written or deleted: there is no link on the way to it from the run's directory.

    Args:
        dir: The run's directory, or a URL.
        step: Completed optimizer updates.

    Returns:
        The path.

    Raises:
        CheckpointError: If there is a link.

    Example:
        >>> own_path("runs/a", 500)
        'runs/a/checkpoints/step-00000500'
    """
    run, path = at(dir), step_path(dir, step)
    if isinstance(run, Folder):
        refuse_links(run.path, "checkpoints", os.path.join("checkpoints", os.path.basename(path)))
    return path


def checkpoints(dir: Path) -> list[tuple[int, str]]:
    """List the checkpoints of a run, oldest first, by their names alone; `verify` says which are valid.

    Args:
        dir: The run's directory, or its ``checkpoints`` directory, or a URL.

    Returns:
        Pairs of step and path.

    Example:
        >>> checkpoints("no/such/run")
        []
    """
    folder = at(dir)
    inside = folder.child("checkpoints")
    folder = inside if inside.exists() else folder
    found = [_STEP.fullmatch(name) or _ASIDE.fullmatch(name) for name in folder.names()]
    names = {match[1] if match.re is _ASIDE else match[0] for match in found if match}
    return sorted((int(name.removeprefix("step-")), folder.child(name).path) for name in names)


def is_run(path: Path) -> bool:
    """Say whether a path is a run's directory, whatever else lies there, such as exported weights, rather than a checkpoint or a file.

    Args:
        path: A path or URL.

    Returns:
        True if it holds checkpoints.

    Example:
        >>> is_run("no/such/run")
        False
    """
    return STATE not in at(path).names() and bool(checkpoints(path))


def newest(dir: Path) -> str | None:
    """Find the newest valid checkpoint of a run; a `CheckpointWarning` names each broken one that is skipped.

    Args:
        dir: The run's directory, or its ``checkpoints`` directory, or a URL.

    Returns:
        Its path; None if there is no valid one.

    Example:
        >>> newest("no/such/run")
    """
    found = next(_sound(dir), None)
    return found and found.path


def best_checkpoint(dir: Path, monitor: str, mode: str = "min") -> str | None:
    """Find the valid checkpoint of a run with the best value of a metric at its step; NaN is worst, and of equals the earlier is better.

    Args:
        dir: The run's directory, or its ``checkpoints`` directory, or a URL.
        monitor: A name in the history, such as ``"val/loss"``.
        mode: ``"min"`` if less is better, ``"max"`` if more is.

    Returns:
        Its path; None if no checkpoint has such a value. Each broken one that is skipped is named in a `CheckpointWarning`.

    Raises:
        ConfigError: If the mode is neither.

    Example:
        >>> best_checkpoint("no/such/run", "val/loss")
    """
    if mode not in ("min", "max"):
        raise ConfigError(f"best_checkpoint(..., mode=) must be 'min' or 'max', but got {mode!r}")
    check_type("best_checkpoint(monitor)", monitor, str, 'the name of a metric, such as "val/loss"')
    found: list[tuple[bool, float, int, str]] = []
    for opened in _sound(dir):
        step = opened.body["progress"]["step"]
        for record in history_of(opened.body):
            if record.step == step and monitor in record.metrics:
                value = float(record.metrics[monitor]) * (1 if mode == "min" else -1)
                found.append((math.isnan(value), 0.0 if math.isnan(value) else value, step, opened.path))
    return min(found)[3] if found else None


def _sound(dir: Path, files: tuple[str, ...] = FILES, hold: bool = False, ranks: Any = None) -> "Iterator[Opened]":
    for _, path in reversed(checkpoints(dir)):
        try:
            yield _open_one(path, files, hold, ranks)
        except BrokenCheckpointError as error:
            _pass_over(error)


def _pass_over(error: BrokenCheckpointError) -> None:
    warn(f"skipped a broken checkpoint: {error}", CheckpointWarning)


def open_checkpoint(path: Path, files: tuple[str, ...] = FILES, hold: bool = False, ranks: Any = None) -> Opened:
    """Find a checkpoint and check all of it.

    Args:
        path: A checkpoint, or a run's directory, whose newest valid checkpoint is taken.
        files: What will be read of one in a remote store; the others stay there.
        hold: True reads these files once and keeps their tensors, as the store always does; False maps them when they are asked for.
        ranks: All processes that open it at the same time, such as a `World`: each checks a share of the files. Of a remote store only the
            sizes are checked then.

    Returns:
        The checkpoint.

    Raises:
        BrokenCheckpointError: If it is damaged, or all of a run are.
        CheckpointError: If there is none.

    Example:
        >>> open_checkpoint("no/such/run")
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: no checkpoint at no/such/run: there is no such directory
    """
    return read_checkpoint(path, lambda opened: opened, files, hold=hold, ranks=ranks)


def read_checkpoint(
    path: Path, read: Callable[[Opened], T], files: tuple[str, ...] = FILES, hold: bool = False, ranks: Any = None
) -> T:  # fmt: skip
    """Find a checkpoint, check it and read it; of a run, the newest one with which that works.

    Args:
        path: As for `open_checkpoint`.
        read: Makes something of it. One that it finds broken, a process that is alone passes over for the one before.
        files: As for `open_checkpoint`.
        hold: As for `open_checkpoint`.
        ranks: As for `open_checkpoint`.

    Returns:
        What was made.

    Raises:
        BrokenCheckpointError: If it is damaged, or all of a run are.
        CheckpointError: If there is none.

    Example:
        >>> read_checkpoint("no/such/run", lambda opened: opened.path)
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: no checkpoint at no/such/run: there is no such directory
    """
    folder = at(path)
    if is_run(path):
        for found in _sound(path, files, hold, ranks):
            try:
                return read(found)
            except BrokenCheckpointError as error:
                if ranks is not None:
                    raise
                _pass_over(error)
        raise BrokenCheckpointError(
            f"none of the {len(checkpoints(path))} checkpoints in {folder.path} is valid, see the warnings above; check them with "
            "fl.verify(path), restore them from a backup, or start again in another directory"
        )
    present = folder.names()
    if any(map(belongs, present)) or hidden_of(folder):
        return read(_open_one(folder.path, files, hold, ranks))
    raise CheckpointError(
        f"no checkpoint at {folder.path}: {f'it contains {present[:5]}' if folder.exists() else 'there is no such directory'}"
    )


def hidden_of(folder: Folder | Bucket) -> list[Folder]:
    """What stands in for a checkpoint whose replacement was cut short between two renames: the new one, else the old one.

    Args:
        folder: The checkpoint's place.

    Returns:
        Folders to try, best first; none if the place is taken.

    Example:
        >>> hidden_of(Folder("no/such/folder"))
        []
    """
    if isinstance(folder, Bucket) or folder.exists() or not hidden_siblings(folder, "old"):
        return []
    return [folder.parent().child(name) for kind in ("tmp", "old") for name in hidden_siblings(folder, kind)]


def _open_one(path: str, files: tuple[str, ...], hold: bool, ranks: Any = None) -> Opened:
    folder = at(path)
    if ranks is not None:
        return _open_together(folder, ranks)
    if isinstance(folder, Bucket):
        return _open_remote(folder, files)
    problems: list[str] = []
    for place in (*hidden_of(folder), folder):
        body, problems = examine(place, digests=not hold)
        held, problems = fetched(place, body, problems, files, others=True) if hold else ({}, problems)
        if body is not None and not problems:
            if place != folder:
                warn(f"checkpoint {path} was being replaced when its writer ended; it is read from {place.path}", CheckpointWarning)
            return Opened(path, place, body, held)
    raise BrokenCheckpointError(f"checkpoint {path} is broken: {'; '.join(problems)}. Load its run's directory to use the newest valid one")


def _open_together(folder: Folder | Bucket, ranks: Any) -> Opened:
    """Check a checkpoint among all ranks, each a share of its files; they agree on what is wrong."""
    body, problems = examine(folder, digests=False, sizes=ranks.rank == 0)
    if body is not None and not problems and isinstance(folder, Folder):
        problems += compare_all(folder, body, digests=True, share=slice(ranks.rank, None, ranks.size))
    found = [problem for each in ranks.gather(problems) for problem in each]
    if body is not None and not found:
        return Opened(folder.path, folder, body)
    raise BrokenCheckpointError(
        f"checkpoint {folder.path} is broken: {'; '.join(dict.fromkeys(found))}. Load its run's directory to use the newest valid one"
    )


def _open_remote(folder: Bucket, files: tuple[str, ...]) -> Opened:
    """Read what is asked for, once, and check that very data; where a writer replaced it meanwhile, begin again."""
    for wait in (*WAITS, None):
        body, problems = examine(folder, digests=False)
        held, problems = fetched(folder, body, problems, files, others=False)
        if body is not None and not problems:
            return Opened(folder.path, folder, body, held)
        if wait is None or body is None or examine(folder, digests=False)[0] == body:
            raise BrokenCheckpointError(
                f"checkpoint {folder.path} is broken: {'; '.join(problems)}. Load its run's directory to use the newest valid one"
            )
        folder.sleep(wait)
    raise AssertionError("unreachable")


def verify(path: Path) -> list[str]:
    """Check a checkpoint: all that its manifest says, and the size, the header and the digest of every file.

    What `load` refuses whatever the task is, this names, too.

    Args:
        path: The checkpoint's directory, or a URL.

    Returns:
        What is wrong, one line per problem; an empty list if it is valid.

    Example:
        >>> verify("no/such/checkpoint")
        ['there is no directory no/such/checkpoint']
    """
    return examine(at(path))[1]


def writable(dir: Path) -> None:
    """Check before any work is done that a run's checkpoints can be written.

    Args:
        dir: The run's directory, which is made if need be, or a URL, of which nothing is tried.

    Raises:
        CheckpointError: If it cannot be made, no file can be written there, or a link is in the place of what a run writes.

    Example:
        >>> writable("memory://runs/a")
    """
    run, folder = at(dir), at(dir).child("checkpoints")
    if isinstance(folder, Bucket):
        return
    refuse_links(run.path, *WRITTEN)
    try:
        make(folder)
        probe = folder.child(".probe")
        with suppress(FileExistsError):  # of a run that was killed here, or that begins at this moment
            os.mkdir(probe.path)
        with suppress(FileNotFoundError):
            os.rmdir(probe.path)
    except OSError as error:
        raise cannot_write(folder.path, error) from error
