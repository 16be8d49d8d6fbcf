"""Which checkpoints are kept: pure functions of steps and history, joined with ``|``, and the deletion of the others."""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import attrs

from fnlight.checkpoint.folder import Folder, hidden_siblings
from fnlight.checkpoint.manifest import STATE
from fnlight.checkpoint.places import Path, at, own_path, step_path
from fnlight.errors import CheckpointWarning, ConfigError, warn

_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(tmp|old|gone)-[0-9a-f]+")


@attrs.frozen(repr=False)
class Retention:
    """Which checkpoints are kept; made by `last`, `best` and `every`, joined with ``|``.

    Args:
        text: Its source text.
        choose: Maps the steps and the history to the steps that stay.
        monitors: Names in the history that it needs.
        made_of: What two of them are compared by: a name with its arguments, ``"|"`` with its parts; the function if left out.

    Example:
        >>> keep = last(1) | every(100)
        >>> keep, sorted(keep([50, 100, 150, 200, 250], ()))
        (last(1) | every(100), [100, 200, 250])
    """

    text: str = attrs.field(eq=False)
    choose: Callable[[Sequence[int], Iterable[Any]], set[int]] = attrs.field(eq=False)
    monitors: tuple[str, ...] = attrs.field(default=(), eq=False)
    made_of: tuple[Any, ...] = attrs.field(default=attrs.Factory(lambda self: ("", self.choose), takes_self=True))

    def __call__(self, steps: Sequence[int], history: Iterable[Any]) -> set[int]:
        """Choose those of the steps whose checkpoints stay."""
        return self.choose(steps, history)

    def __or__(self, other: "Retention") -> "Retention":
        """What either of both keeps."""
        if not isinstance(other, Retention):
            return NotImplemented
        parts = tuple(part for each in (self, other) for part in (each.made_of[1:] if each.made_of[0] == "|" else (each.made_of,)))
        either: Any = lambda steps, history: self(steps, history) | other(steps, history)  # noqa: E731  # too short for a name
        return Retention(f"{self} | {other}", either, _both(self, other), ("|", *parts))

    def __repr__(self) -> str:
        return self.text


def _both(a: Retention, b: Retention) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*a.monitors, *b.monitors)))


def last(n: int) -> Retention:
    """Keep the newest n checkpoints.

    Args:
        n: How many, at least 1.

    Returns:
        A retention.

    Raises:
        ConfigError: If n is below 1.

    Example:
        >>> sorted(last(2)([10, 20, 30], ()))
        [20, 30]
    """
    _count("last", n)
    return Retention(f"last({n})", lambda steps, history: set(sorted(steps)[-n:]), made_of=("last", n))


def every(n: int) -> Retention:
    """Keep the checkpoints whose step is a multiple of n.

    Args:
        n: In optimizer steps, at least 1.

    Returns:
        A retention.

    Raises:
        ConfigError: If n is below 1.

    Example:
        >>> sorted(every(20)([10, 20, 30, 40], ()))
        [20, 40]
    """
    _count("every", n)
    return Retention(f"every({n})", lambda steps, history: {step for step in steps if step % n == 0}, made_of=("every", n))


def best(monitor: str, n: int = 1, mode: str = "min") -> Retention:
    """Keep the n checkpoints with the best value of a metric at their step; NaN is worst, and of equals the earlier is better.

    Args:
        monitor: A name in the history, such as ``"val/loss"``; steps without it are not among the best.
        n: How many, at least 1.
        mode: ``"min"`` if less is better, ``"max"`` if more is.

    Returns:
        A retention.

    Raises:
        ConfigError: If n is below 1, the mode is neither, or the monitor is no name.

    Example:
        >>> from fnlight.state import Record
        >>> history = [Record(10, 1, {"val/loss": 0.5}), Record(20, 2, {"val/loss": 0.25}), Record(30, 3, {"val/loss": 0.75})]
        >>> sorted(best("val/loss", 2)([10, 20, 30], history))
        [10, 20]
    """
    _count("best", n)
    if not isinstance(monitor, str) or not monitor:
        raise ConfigError(f'best(monitor, n) needs the name of a metric such as "val/loss", but got {monitor!r}')
    if mode not in ("min", "max"):
        raise ConfigError(f"best(..., mode=) must be 'min' or 'max', but got {mode!r}")
    sign = 1.0 if mode == "min" else -1.0

    def choose(steps: Sequence[int], history: Iterable[Any]) -> set[int]:
        values = {record.step: sign * float(record.metrics[monitor]) for record in history if monitor in record.metrics}
        held = [step for step in set(steps) if step in values]
        return set(
            sorted(held, key=lambda step: (math.isnan(values[step]), math.inf if math.isnan(values[step]) else values[step], step))[:n]
        )

    tail = "" if mode == "min" else ", mode='max'"
    return Retention(f"best({monitor!r}, {n}{tail})", choose, (monitor,), ("best", monitor, n, mode))


def _count(name: str, n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"{name}(n) must be a whole number of at least 1, but got {n!r}; the newest checkpoint of a run is always kept")


def prune(dir: Path, steps: Sequence[int], keep: Retention, history: Iterable[Any]) -> list[int]:
    """Delete the checkpoints of a run that need not be kept; the newest is always kept, and no other file is touched.

    Args:
        dir: The run's directory, or a URL.
        steps: The steps that this run has saved.
        keep: Which of them stay.
        history: The records so far.

    Returns:
        The steps whose checkpoints are still there, in order. One that could not be deleted is among them, with a
        `CheckpointWarning`, so that the next call tries again.

    Example:
        >>> prune("no/such/run", [10, 20], last(1), ())
        []
    """
    there = [step for step in sorted(set(steps)) if is_there(dir, step)]
    stay = staying(there, keep, history)
    left = delete(dir, [step for step in there if step not in stay])
    for problem in left.values():
        warn(problem, CheckpointWarning)
    return [step for step in there if step in stay or step in left]


def sweep(dir: Path) -> None:
    """Delete what interrupted saves and deletions have left in a run's directory; the caller must hold its lock.

    A file that may be the only copy of a checkpoint that was being replaced is kept.

    Args:
        dir: The run's directory, or a URL, where nothing is done.

    Example:
        >>> sweep("no/such/run")
    """
    folder = at(dir).child("checkpoints")
    names = folder.names() if isinstance(folder, Folder) else []
    for name in names:
        hidden, inside = _HIDDEN.fullmatch(name), folder.child(name)
        if hidden is None:
            torn = [inner for inner in inside.names() if inner.startswith(f".{STATE}.tmp-")] if name.startswith("step-") else []
            for inner in torn:
                with suppress(OSError):
                    os.unlink(os.path.join(inside.path, inner))
        elif hidden[2] == "gone" or hidden[1] in names or not hidden_siblings(Folder(folder.child(hidden[1]).path), "old"):
            shutil.rmtree(inside.path, ignore_errors=True)


def staying(steps: Sequence[int], keep: Retention, history: Iterable[Any]) -> set[int]:
    """Which of a run's checkpoints stay: what is to be kept, and the newest.

    Args:
        steps: The steps of the checkpoints.
        keep: Which of them stay.
        history: The records so far.

    Returns:
        Those that stay.

    Example:
        >>> sorted(staying([10, 20, 30], every(20), ()))
        [20, 30]
    """
    return keep(steps, history) | set(sorted(steps)[-1:])


def is_there(dir: Path, step: int) -> bool:
    """Say whether there is anything of the checkpoint of a step.

    Args:
        dir: The run's directory, or a URL.
        step: The step.

    Returns:
        True also for what an interrupted save or deletion has left.

    Example:
        >>> is_there("no/such/run", 10)
        False
    """
    folder = at(step_path(dir, step))
    return folder.exists() or (isinstance(folder, Folder) and bool(hidden_siblings(folder)))


def delete(dir: Path, steps: Iterable[int]) -> dict[int, str]:
    """Delete checkpoints of a run.

    Args:
        dir: The run's directory, or a URL.
        steps: Whose checkpoints.

    Returns:
        Those that could not be deleted, and why.

    Example:
        >>> delete("no/such/run", [10])
        {}
    """
    left: dict[int, str] = {}
    for step in steps:
        path = step_path(dir, step)
        try:
            at(own_path(dir, step)).remove()
        except Exception as error:  # noqa: BLE001  # remote stores have errors of their own; a file too many is no reason to end a run
            left[step] = f"cannot delete checkpoint {path}: {error}; delete it by hand, or fnlight tries again at the next save"
    return left
