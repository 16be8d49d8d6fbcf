"""``fnlight inspect``: show the content of a run, a checkpoint or a safetensors file."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fnlight.checkpoint import FILES, MODEL, STATE, at, checkpoints, is_run, parse, physical, verify
from fnlight.cli.content import Content, content
from fnlight.cli.page import Place, count, line, size, table
from fnlight.errors import BrokenCheckpointError
from fnlight.runtime import WallTime


def inspect(path: Place, rows: int = 20) -> int:
    """Show the tensors, progress, history and sizes of a run, a checkpoint or a safetensors file.

    Args:
        path: A run's directory, whose newest valid checkpoint is shown, a checkpoint, or a file; or the URL of one.
        rows: The largest number of rows of a table; 0 shows all.

    Returns:
        The exit code, 0.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"bias": torch.zeros(3)}, f"{folder}/a.safetensors")
        ...     code = inspect(f"{folder}/a.safetensors")
        /...a.safetensors: 1 tensor of 3 elements, 84 B
        <BLANKLINE>
        model
        name  dtype    shape  elements  bytes
        bias  float32  [3]           3   12 B
    """
    if is_run(path):
        _run(path)
    found = content(path)
    held = [tensor for part in found.tensors.values() for tensor in part.values()]
    elements = count(sum(t.numel() for t in held), "element")
    line(f"{found.path}: {count(len(held), 'tensor')} of {elements}, {size(sum(found.sizes.values()))}")
    if found.body is not None:
        _overview(found, found.body)
    for name in FILES:
        _tensors(name, found.tensors.get(name, {}), rows)
    if found.history:
        _history(found, rows)
    return 0


def _run(path: str) -> None:
    listed = []
    for step, place in checkpoints(path):
        folder = at(place)
        problems = verify(place)
        try:
            body = parse(folder.read(STATE))
        except (BrokenCheckpointError, OSError):
            body = {"progress": {}, "files": {}, "stopped": None}
        whole = sum(entry["size"] for entry in physical(body["files"]).values()) + (folder.size(STATE) or 0)
        epoch = str(body["progress"].get("epoch", ""))
        listed.append([folder.name(), "broken" if problems else "valid", body["stopped"] or "", f"{step:,}", epoch, size(whole)])
    table(f"{path}: {count(len(listed), 'checkpoint')}", ["checkpoint", "files", "stopped", "step", "epoch", "size"], listed, left=3)
    line()


def _overview(found: Content, body: Mapping[str, Any]) -> None:
    at = body["progress"]
    rows = [
        ["step", f"{at['step']:,}"],
        ["epoch", f"{at['epoch']:,}, {at['batch']:,} batches into the next" if at["batch"] else f"{at['epoch']:,}"],
        ["samples", f"{at['samples']:,}"],
        ["time", time.strftime("%H:%M:%S", time.gmtime(at["seconds"])) if at["seconds"] < 86400 else f"{at['seconds'] / 3600:.1f} h"],
        ["goodput", _goodput(WallTime.from_json(body.get("times", {})))],
        ["stopped", body["stopped"] or "-"],
        ["seed", str(body["seed"])],
        ["written by", f"fnlight {body['fnlight']}, torch {body['torch']}"],
        *([name, size(number)] for name, number in found.sizes.items()),
    ]
    rows += _groups(body["optimizer"])
    rows.append(["memory", ", ".join(body["memory"]) or "-"])
    line()
    table("", ["", ""], rows, left=2)


def _groups(section: Mapping[str, Any] | None) -> list[list[str]]:
    """A row for each group of the optimizer, or of each of several."""
    found: list[list[str]] = []
    phases = {"": section} if section is None or "phases" not in section else section["phases"]
    for name, optimizer in phases.items():
        if optimizer is None:
            continue
        for i, group in enumerate(optimizer["groups"]):
            rate = group["values"].get("lr")
            about = f"{optimizer['class'].rpartition('.')[2]}, {count(len(group['params']), 'parameter')}, lr {rate!s:.40}"
            found.append([f"{name} group {i}".lstrip(), about])
    return found


def _goodput(times: WallTime) -> str:
    """The steps' share of all time, and what took the most of the rest."""
    if not times.total:
        return "-"
    seconds = times.seconds()
    others = sorted((taken, cause) for cause, taken in seconds.items() if cause != "step" and taken >= 0.005 * times.total)
    told = "".join(f", {taken / times.total:.0%} {cause}" for taken, cause in reversed(others[-3:]))
    return f"{times.goodput:.0%} of {times.total:,.1f} s in {count(times.runs, 'run')}{told}"


def _tensors(name: str, tensors: Mapping[str, Tensor], rows: int) -> None:
    if not tensors:
        return
    shown = list(tensors.items())[: rows or None]
    line()
    cells = [
        [key, str(t.dtype).removeprefix("torch."), str(list(t.shape)), f"{t.numel():,}", size(t.numel() * t.itemsize)] for key, t in shown
    ]
    table(name.removesuffix(".safetensors") if name != MODEL else "model", ["name", "dtype", "shape", "elements", "bytes"], cells, left=3)
    if len(shown) < len(tensors):
        line(f"... and {len(tensors) - len(shown)} more; --rows 0 shows all")


def _history(found: Content, rows: int) -> None:
    history = found.history
    names = list(dict.fromkeys(name for record in history for name in record.metrics))
    shown = history[-rows:] if rows else history
    line()
    cells = [[str(r.step), str(r.epoch), *(f"{r.metrics[n]:.6g}" if n in r.metrics else "" for n in names)] for r in shown]
    table("history", ["step", "epoch", *names], cells, left=0)
    if len(shown) < len(history):
        line(f"... and {len(history) - len(shown)} before; --rows 0 shows all")
