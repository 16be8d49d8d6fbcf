"""``fnlight export`` and ``fnlight prune``: the commands that write and remove files."""

import os
import secrets
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fnlight.checkpoint import MODEL, Retention, at, checkpoints, chunks, history_of, open_checkpoint, step_path
from fnlight.checkpoint import prune as remove
from fnlight.cli.content import Content, content
from fnlight.cli.page import Place, count, line, size, table
from fnlight.errors import CheckpointError, ConfigError
from fnlight.fit import parse


def export(path: Place, file: Place, weights: str | None = None, overwrite: bool = False) -> int:
    """Write the weights of a checkpoint to one safetensors file.

    Args:
        path: A run's directory, whose newest valid checkpoint is taken, or a checkpoint; or the URL of one.
        file: The file to write.
        weights: The combinator whose averaged weights replace the parameters, such as ema.
        overwrite: Replace an existing file.

    Returns:
        The exit code, 0.

    Raises:
        CheckpointError: If the file exists, or cannot be written.
        ConfigError: If there are no such averaged weights.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> from fnlight.state import TrainState
        >>> from fnlight.testing import tiny_task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(TrainState.create(tiny_task()), f"{folder}/a")
        ...     code = export(path, f"{folder}/model.safetensors")
        /...model.safetensors: 9 tensors, 1.0 KiB
    """
    if "://" in file:
        raise ConfigError(f"export writes to this machine, but {file} is a URL; give a path, and upload the file afterwards")
    if os.path.exists(file) and not overwrite:
        raise CheckpointError(f"{file} exists; give another name, or pass --overwrite")
    found = content(path)
    tensors = dict(found.tensors[MODEL])
    if weights is not None:
        tensors |= _averaged(found, weights)
    folder = at(os.path.dirname(os.path.abspath(file)))
    if not os.path.isdir(folder.path):
        raise CheckpointError(f"there is no directory {folder.path} for {os.path.basename(file)}; create it, or give another path")
    hidden = f".{os.path.basename(file)}.tmp-{secrets.token_hex(4)}"
    try:
        written = folder.write(hidden, chunks(tensors))
        os.replace(folder.child(hidden).path, file)
    finally:
        if os.path.exists(folder.child(hidden).path):
            os.unlink(folder.child(hidden).path)
    line(f"{file}: {count(len(tensors), 'tensor')}, {size(written['size'])}")
    return 0


def _averaged(found: Content, key: str) -> dict[str, Tensor]:
    """The averaged weights in the memory of a combinator, by parameter name, or one level deeper."""
    names = found.tensors[MODEL].keys()
    tree = found.memory(key)
    for each in (tree, *(tree.values() if isinstance(tree, dict) else ())):
        if isinstance(each, dict) and each and each.keys() <= names and all(isinstance(t, Tensor) for t in each.values()):
            return each
    there = list(found.body["memory"]) if found.body is not None else []
    raise ConfigError(f"--weights {key}: {found.path} has no averaged weights of that name; its memory has {there or 'no entries'}")


def prune(path: Place, keep: str, yes: bool = False, dry_run: bool = False) -> int:
    """Remove the checkpoints of a run that need not be kept; the newest valid one is always kept.

    Args:
        path: The run's directory, or its URL.
        keep: Which checkpoints are kept, such as: last(3) | best('val/loss', 2) | every(1000)
        yes: Do not ask.
        dry_run: Only show what would be removed.

    Returns:
        0, also if nothing had to be removed; 1 if the answer was no.

    Raises:
        ConfigError: If `keep` cannot be parsed, or there is no terminal for the question.
        CheckpointError: If there is no run.

    Example:
        >>> prune("no/such/run", "last(1)")
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: no checkpoint at no/such/run: there is no such directory
    """
    rule = parse(keep)
    if not isinstance(rule, Retention):
        raise ConfigError(f"--keep must be a retention such as \"last(3) | best('val/loss', 2)\", but got {keep}")
    body = open_checkpoint(path).body
    newest, history = body["progress"]["step"], history_of(body)
    unknown = [name for name in rule.monitors if not any(name in record.metrics for record in history)]
    if unknown:
        known = sorted({name for record in history for name in record.metrics})
        raise ConfigError(f"--keep needs {unknown[0]!r}, but the history of this run has {known or 'no metrics'}; nothing was removed")
    there = {step: place for step, place in checkpoints(path) if step in _own(body) and step <= newest}
    stay = rule(sorted(there), history) | {newest}
    rows = [[at(place).name(), "keep" if step in stay else "remove", size(_bytes(place))] for step, place in there.items()]
    table("", ["checkpoint", "", "size"], rows, left=2)
    going = [step for step in there if step not in stay]
    if not going or dry_run:
        line(f"{count(len(going), 'checkpoint')} {'would be removed' if dry_run else 'to remove'}")
        return 0
    if not yes and not _agreed(len(going)):
        line("nothing was removed")
        return 1
    left = remove(path, sorted(there), rule | _only(newest), history)
    failed = [step_path(path, step) for step in going if step in left]
    line(f"{count(len(going) - len(failed), 'checkpoint')} removed")
    return 1 if failed else 0


def _own(body: Mapping[str, Any]) -> set[int]:
    """The steps that this run has saved, and of which its retention decides; what else lies there is not touched."""
    lists = [t["saved"] for t in body["memory"].values() if isinstance(t, dict) and {"saved", "permanent"} <= t.keys()]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise CheckpointError(
            f"the newest checkpoint does not list the checkpoints that its run has saved, so none is removed (found {count(len(lists), 'list')}, "
            "needs one); delete them by hand"
        )
    return {step for step in lists[0] if isinstance(step, int)}


def _only(step: int) -> Retention:
    return Retention(f"step {step}", lambda steps, history: {step})


def _bytes(path: str) -> int:
    folder = at(path)
    return sum(folder.size(name) or 0 for name in folder.names())


def _agreed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal for the question; pass --yes to remove them, or --dry-run to see what would be removed")
    sys.stdout.write(f"remove {count(number, 'checkpoint')}? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
