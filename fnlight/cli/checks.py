"""``fnlight verify`` and ``fnlight diff``: check that a checkpoint is valid and its steps can be repeated; compare two checkpoints."""

import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.checkpoint import FILES, MODEL, at, checkpoints, describe_state, is_run, load, open_checkpoint
from fnlight.checkpoint import verify as problems_of
from fnlight.cli.compare import HEAD, Gap, gaps
from fnlight.cli.content import Content, content
from fnlight.cli.given import Given, given
from fnlight.cli.page import Code, Place, count, line, table
from fnlight.errors import CheckpointError, ConfigError
from fnlight.fit import FitConfig, fit
from fnlight.state import Task, TrainState

_ROWS = 40
_ASIDE = (
    "max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "stop", "sanity_batches", "dir", "save_every", "keep", "resume",
    "log_every", "log_times", "sinks", "progress", "fast_dev_run", "detect_anomaly", "donate", "gc", "signals", "signals_deadline", "debug_bundle",
    "workers_ahead", "profile_steps", "permanent", "save_in_background", "allow", "rename",
)  # fmt: skip
"""Fields of a configuration about files, ends and what is shown; the others decide what a step does."""


def verify(
    path: Place,
    replay: int = 0,
    task: Code = None,
    loaders: Code = None,
    config: Code = None,
) -> int:
    """Check that checkpoints are valid: digests, structure and finite values; or that the last steps of a run can be repeated.

    Args:
        path: A run's directory, all of whose checkpoints are checked, or a checkpoint; or the URL of one.
        replay: Train this many steps again, at least, from an older checkpoint of the run, and compare with the newest bitwise.
        task: For --replay: module:name of the task, or of a function that gives it, or a tuple with loaders and a FitConfig as well.
        loaders: For --replay: module:name of the loaders, if --task does not give them.
        config: For --replay: module:name of the FitConfig; the config.json of the run if left out.

    Returns:
        0 if everything is valid, 1 if not.

    Raises:
        CheckpointError: If there is no checkpoint.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> from fnlight.testing import tiny_task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     code = verify(save(TrainState.create(tiny_task()), f"{folder}/a"))
        /.../a: valid
    """
    if replay:
        return _replayed(path, replay, given(task, loaders, config))
    if task or loaders or config:
        raise ConfigError("--task, --loaders and --config need --replay; give a number of steps, as in --replay 10")
    if not at(path).exists():
        raise CheckpointError(f"no checkpoint at {path}: there is no such directory")
    places = [place for _, place in checkpoints(path)] if is_run(path) else [path]
    broken = 0
    for place in places:
        problems = problems_of(place) or _values(content(place))
        line(f"{place}: {'; '.join(problems) or 'valid'}")
        broken += bool(problems)
    return 1 if broken else 0


def _values(found: Content) -> list[str]:
    """What is wrong with the values of a valid checkpoint; infinities in a buffer, such as a mask, are allowed."""
    problems = []
    params = set(found.body["parameters"] if found.body is not None else ())
    for file, tensors in found.tensors.items():
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            bad = torch.isnan(tensor) if file == MODEL and name not in params else ~torch.isfinite(tensor)
            if bool(bad.any()):
                problems.append(f"{name} in {file} has {int(bad.sum()):,} of {tensor.numel():,} values that are NaN or infinite")
    try:
        _ = found.history, [found.memory(key) for key in (found.body["memory"] if found.body is not None else ())]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problems.append(f"state.json has content that fnlight does not write: {error!r:.200}")
    return problems


def _replayed(path: str, steps: int, code: Given) -> int:
    if code.task is None or code.loaders is None:
        raise ConfigError(
            "--replay trains again, so it needs your code: give --task module:function that returns (task, loaders), or --task and --loaders"
        )
    newest = open_checkpoint(path)
    end = newest.body["progress"]["step"]
    older = [place for step, place in checkpoints(path) if step <= end - steps and not problems_of(place)]
    if not older:
        raise CheckpointError(
            f"--replay {steps} needs a checkpoint of step {max(0, end - steps)} or before, but {path} has "
            f"{[step for step, _ in checkpoints(path)]}; keep more of them, as with keep=fl.last(2), or replay fewer steps"
        )
    config = code.config if code.config is not None else _config_of(path)
    before = load(older[-1], code.task)
    known = before.progress.step
    after = fit(before, code.loaders, decisive(config, end))
    unlike, compared = _against(newest.path, code.task, after, known)
    if not unlike:
        line(f"{path}: {count(end - known, 'step')} from step {known} to {end} trained again: {count(compared, 'tensor')} bit-identical")
        return 0
    line(f"{path}: {count(end - known, 'step')} from step {known} to {end} trained again give a different result than {newest.path}")
    _show(unlike)
    return 1


def decisive(config: FitConfig, max_steps: int) -> FitConfig:
    """Return the part of a configuration that decides what a step does, without files, sinks, stop rules and signals.

    Args:
        config: How a run was trained.
        max_steps: Where training ends.

    Returns:
        A configuration that trains on the very state it is given.

    Example:
        >>> chosen = decisive(FitConfig(max_epochs=3, dir="runs/a", clip_norm=1.0), 10)
        >>> chosen.max_steps, chosen.dir, chosen.clip_norm
        (10, None, 1.0)
    """
    fields = {name: getattr(config, name) for name in attrs.fields_dict(FitConfig) if name not in _ASIDE}
    if config.nonfinite == "rollback":  # there is no directory to go back to
        fields |= {"nonfinite": "raise", "max_nonfinite": None}
    return FitConfig(**fields, max_steps=max_steps, progress=False, donate=True)


def _config_of(path: str) -> FitConfig:
    for folder in (path, os.path.dirname(os.path.abspath(path)), os.path.dirname(os.path.dirname(os.path.abspath(path)))):
        file = os.path.join(folder, "config.json")
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as opened:
                return FitConfig.from_json(opened.read())
    raise ConfigError(f"{path} has no config.json, so its configuration is unknown; give --config module:name")


def _against(path: str, task: Task, after: TrainState, known: int) -> tuple[list[Gap], int]:
    """Compare what was trained again with a checkpoint, as data: memory only of combinators that both have."""
    expected, tensors = describe_state(load(path, task))
    body, found = describe_state(after)
    owned = {c.key for c in after.store.owner.combinators if c.init is not None} & expected["memory"].keys()
    sides = [_flat(part, owned) for part in (tensors, found)]
    unlike = gaps(*sides)
    rows = [{record[0]: record[2] for record in part["history"] if record[0] > known} for part in (expected, body)]
    for step in sorted(rows[0].keys() & rows[1].keys()):
        names = [n for n in rows[0][step] if n in rows[1][step] and rows[0][step][n] != rows[1][step][n]]
        unlike += [Gap(f"{name} at step {step}", f"{rows[0][step][name]} against {rows[1][step][name]}") for name in names]
    counts = [{k: v for k, v in part["progress"].items() if k != "seconds"} for part in (expected, body)]
    unlike += [Gap(f"progress {k}", f"{v} against {counts[1].get(k)}") for k, v in counts[0].items() if counts[1].get(k) != v]
    return unlike, len(sides[0])


def _flat(tensors: Mapping[str, Mapping[str, Tensor]], owned: set[str]) -> dict[str, Tensor]:
    return {
        f"{file.removesuffix('.safetensors')}/{name}": tensor
        for file, held in tensors.items()
        for name, tensor in held.items()
        if file != FILES[2] or name.partition("/")[0] in owned or name.startswith("buffers/")
    }


def _show(unlike: list[Gap]) -> None:
    table("", HEAD, [gap.cells() for gap in unlike[:_ROWS]], left=2)
    if len(unlike) > _ROWS:
        line(f"... and {len(unlike) - _ROWS} more")


def diff(a: Place, b: Place) -> int:
    """Compare the tensors and counts of two checkpoints or safetensors files, bit by bit.

    Args:
        a: A checkpoint, a run, or a file; or the URL of one.
        b: Another one.

    Returns:
        0 if they are the same, 1 if they differ.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"bias": torch.zeros(3)}, f"{folder}/a.safetensors")
        ...     save_file({"bias": torch.tensor([0.0, 0.5, 0.25])}, f"{folder}/b.safetensors")
        ...     code = diff(f"{folder}/a.safetensors", f"{folder}/b.safetensors")
        tensor  shape  elements that differ  largest difference  relative
        bias    [3]                  2 of 3                 0.5         1
    """
    left, right = content(a), content(b)
    whole = left.body is not None and right.body is not None
    unlike: list[Gap] = []
    for file in FILES if whole else (MODEL,):
        prefix = "" if file == MODEL else f"{file.removesuffix('.safetensors')}/"
        pair = gaps(left.tensors.get(file, {}), right.tensors.get(file, {}))
        unlike += [attrs.evolve(gap, name=prefix + gap.name) for gap in pair]
    if left.body is not None and right.body is not None:
        unlike += _counts(left.body, right.body)
    if not unlike:
        line(f"{count(sum(map(len, left.tensors.values())), 'tensor')} bit-identical")
        return 0
    _show(unlike)
    return 1


def _counts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Gap]:
    sides = [{**{k: v for k, v in body["progress"].items() if k != "seconds"}, "seed": body["seed"]} for body in (a, b)]
    found = [Gap(name, f"{value} against {sides[1].get(name)}") for name, value in sides[0].items() if sides[1].get(name) != value]
    if a["history"] != b["history"]:
        found.append(Gap("history", f"{len(a['history'])} records against {len(b['history'])}"))
    return found
