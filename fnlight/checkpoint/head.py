"""What the sections of a manifest must be: checked in one place, so that all who read checkpoints agree on which of them are sound.

It is no part of `manifest`, which knows bytes, digests and formats, but not what is said in them; nor of `listing`, which knows files.
Sections that are not known are left alone. A fault is a `ValueError` that names the field.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from fnlight.checkpoint.encode import decode, is_real, no_tensor
from fnlight.checkpoint.header import uncollected
from fnlight.checkpoint.listing import MEMORY, MODEL, OPTIMIZER, Listed, check_files
from fnlight.optim import OTHER, RAW
from fnlight.state import History, Progress, Record
from fnlight.tensors import DTYPES

Get = Callable[[str], Listed]
"""Gives what is listed of a tensor, once: a second reference to it is none that fnlight wrote."""

SECTIONS = (
    "fnlight", "torch", "progress", "seed", "stopped", "history", "parameters", "optimizer", "memory", "buffers", "extra", "layouts", "files",
)  # fmt: skip
"""What a manifest holds; ``times`` came later and may be missing."""

_COUNTS = ("step", "epoch", "batch", "samples")
_MOST = 1 << 62  # no run does more steps
_ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
}  # fmt: skip
"""Optimizers of torch whose slots are tensors: of the shape of their parameter, or one number."""


def check(body: Mapping[str, Any]) -> None:
    """Check every section of a manifest of the present format.

    Args:
        body: The sections; they stay as they are.

    Raises:
        ValueError: If one is missing, or is not what fnlight writes; the field is named.

    Example:
        >>> check({"seed": 0})
        Traceback (most recent call last):
        ValueError: the section 'fnlight' is missing
    """
    missing = [section for section in SECTIONS if section not in body]
    if missing:
        raise ValueError(f"the section {missing[0]!r} is missing")
    for section in ("fnlight", "torch"):
        _must(isinstance(body[section], str), section, "a version", body[section])
    _must(type(body["seed"]) is int and body["seed"] >= 0, "seed", "a whole number of at least 0", body["seed"])
    _must(isinstance(body["stopped"], str | None), "stopped", "a reason, or null", body["stopped"])
    _check_progress(body["progress"])
    _check_times(body.get("times", {}))
    _check_history(body["history"])
    listed = check_files(body["files"], body["layouts"])
    params = _parameters(body["parameters"], listed[MODEL])
    _check_optimizers(body["optimizer"], params, dict(listed.get(OPTIMIZER, {})).pop)
    _check_trees(body, dict(listed.get(MEMORY, {})).pop)


def casts(memory: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a run says in which precision its model is kept; of several optimizers, each remembers it.

    Args:
        memory: The section ``memory``.

    Returns:
        The trees of `fnlight.cast`.

    Example:
        >>> casts({"cast": {"dtype": "bfloat16"}})
        [{'dtype': 'bfloat16'}]
    """
    return [tree["cast"] for tree in (memory, *memory.get("phases", {}).values()) if "cast" in tree]


def _must(good: bool, field: str, expected: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{field} must be {expected}, but is {value!r:.80}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _check_progress(found: Any) -> None:
    _must(isinstance(found, dict), "progress", "counts by name", found)
    for name in (*_COUNTS, "seconds"):
        _must(name in found, "progress", f"counts, {name} among them", found)
    unknown = found.keys() - attrs.fields_dict(Progress).keys()
    if unknown:
        raise ValueError(f"progress holds {min(unknown)!r:.80}, which is not known")
    for name in found.keys() - {"seconds", "updates"}:
        _must(_is_count(found[name]), f"progress.{name}", "a whole number of at least 0", found[name])
    seconds, updates = found["seconds"], found.get("updates", {})
    _must(type(seconds) in (int, float) and is_real(seconds) and seconds >= 0, "progress.seconds", "a number of at least 0", seconds)
    good = isinstance(updates, dict) and all(map(_is_count, updates.values()))
    _must(good, "progress.updates", "whole numbers of at least 0 by name", updates)


def _check_times(found: Any) -> None:
    _must(isinstance(found, dict), "times", "seconds by cause", found)
    for name, value in found.items():
        _must(type(value) in (int, float) and is_real(value) and value >= 0, f"times.{name:.80}", "a number of at least 0", value)
    _must(_is_count(found.get("runs", 0)), "times.runs", "a whole number of at least 0", found.get("runs"))


def _check_history(found: Any) -> None:
    _must(isinstance(found, list), "history", "a list of records", found)
    for i, record in enumerate(found):
        good = isinstance(record, list) and len(record) == 3 and _is_count(record[0]) and _is_count(record[1])
        _must(good and isinstance(record[2], dict), f"history.{i}", "a step, an epoch and metrics", record)
        for name, value in record[2].items():
            plain = type(value) is float or is_real(value)
            if not plain or name[:1] == "$":
                _must(name[:1] != "$" and is_metric(value), f"history.{i}.{name:.80}", "a number", value)


def history_of(body: Mapping[str, Any]) -> History:
    """The records of a manifest.

    Args:
        body: Its sections, which are checked.

    Returns:
        The history.

    Example:
        >>> history_of({"history": [[10, 1, {"val/loss": 0.5}]]})[0].step
        10
    """
    with uncollected():
        return History(Record(step, epoch, decode(metrics, no_tensor)) for step, epoch, metrics in body["history"])


def is_metric(value: Any) -> bool:
    """Say whether a value of a manifest is one that a history may hold.

    Args:
        value: What `encode` gave.

    Returns:
        True for numbers, NaN and infinities among them.

    Example:
        >>> is_metric(0.5), is_metric({"$float": "nan"}), is_metric("0.5")
        (True, True, False)
    """
    return is_real(value) or (isinstance(value, dict) and value.keys() == {"$float"} and value["$float"] in ("nan", "inf", "-inf"))


def _parameters(found: Any, model: Mapping[str, Listed]) -> dict[str, Listed]:
    good = isinstance(found, list) and all(isinstance(name, str) for name in found) and len(set(found)) == len(found)
    _must(good, "parameters", "a list of names, none of them twice", found)
    for name in found:
        _must(name in model, "parameters", f"names of tensors in {MODEL}", name)
    return {name: model[name] for name in found}


def _decoded(field: str, value: Any, get: Get) -> Any:
    try:
        return decode(value, get)
    except KeyError as error:
        raise ValueError(f"{field} refers to the tensor {error!s:.80}, which is not listed, or for the second time") from error
    except (TypeError, ValueError, AttributeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{field}: {error}") from error


def _check_optimizers(section: Any, params: Mapping[str, Listed], get: Get) -> None:
    _must(isinstance(section, dict | None), "optimizer", "a section, or null", section)
    if section is None or "phases" not in section:
        _check_optimizer("optimizer", section, params, get)
        return
    _must(isinstance(section["phases"], dict), "optimizer.phases", "sections by name", section["phases"])
    for name, each in section["phases"].items():
        _check_optimizer(f"optimizer.phases.{name:.80}", each, params, get)


def _check_optimizer(field: str, section: Any, params: Mapping[str, Listed], get: Get) -> None:
    if section is None:
        return
    good = isinstance(section, dict) and isinstance(section.get("class"), str)
    _must(
        good and isinstance(section.get("slots"), dict) and isinstance(section.get("groups"), list),
        field,
        "class, slots and groups",
        section,
    )
    slots: dict[str, dict[Any, Any]] = {}
    for name, value in section["slots"].items():
        _must(name in params or name == OTHER, f"{field}.slots", "by the names of parameters", name)
        slots[name] = _decoded(f"{field}.slots.{name:.80}", value, get)
        _must(isinstance(slots[name], dict), f"{field}.slots.{name:.80}", "slots by name", value)
    fused = _check_groups(f"{field}.groups", section["groups"], params, get)
    elementwise = section["class"].startswith("torch.optim.") and section["class"].rpartition(".")[2] in _ELEMENTWISE
    for name, found in slots.items():
        for slot, value in found.items() if name != OTHER else ():
            strict = name in fused or slot == RAW
            if strict or elementwise:
                good = _is_slot(slot, value, params[name], strict)
                _must(good, f"{field}.slots.{name:.80}.{slot!s:.80}", f"a tensor for one of shape {list(params[name].shape)}", value)


def _is_slot(slot: Any, value: Any, param: Listed, strict: bool) -> bool:
    """Say whether a slot is one that a kernel may read which trusts its shape, or that at least goes element by element."""
    if value is None and slot != RAW:
        return True  # the momentum of a parameter that has had no gradient
    if not isinstance(value, Listed):
        return False
    if strict and slot == "step":
        return value == Listed(torch.float32, ())
    return value.shape == param.shape if strict else value.shape in ((), param.shape)


def _check_groups(field: str, groups: list[Any], params: Mapping[str, Listed], get: Get) -> set[str]:
    """Check the groups of an optimizer; give the parameters whose kernels are fused."""
    seen: set[str] = set()
    fused: set[str] = set()
    for i, group in enumerate(groups):
        good = isinstance(group, dict) and isinstance(group.get("params"), list) and {"values", "configured"} <= group.keys()
        _must(good, f"{field}.{i}", "params, values and configured", group)
        for name in group["params"]:
            good = isinstance(name, str) and name in params and name not in seen
            _must(good, f"{field}.{i}.params", "names of parameters, none of them twice", name)
            seen.add(name)
        values, configured = (_decoded(f"{field}.{i}.{part}", group[part], get) for part in ("values", "configured"))
        for part, found in (("values", values), ("configured", configured)):
            _must(isinstance(found, dict), f"{field}.{i}.{part}", "values by name", found)
        for key in values.keys() & configured.keys():
            _must(
                _alike(values[key], configured[key]),
                f"{field}.{i}.values.{key!s:.80}",
                f"of the kind of {configured[key]!r:.40}",
                values[key],
            )
        if values.get("fused") is True:
            fused.update(group["params"])
    return fused


def _alike(value: Any, configured: Any) -> bool:
    """Say whether a value may have come of what was configured: a number of numbers, which may be tensors, and a text of texts."""
    if configured is None or value is None or isinstance(configured, dict | bytes):
        return True  # None leaves a choice to torch
    if isinstance(configured, int | float | complex | Listed):
        return isinstance(value, complex | Listed) or is_real(value)
    if isinstance(configured, tuple | list):
        return isinstance(value, tuple | list | Listed)
    return type(value) is type(configured)


def _check_trees(body: Mapping[str, Any], get: Get) -> None:
    """Check what lies in the file of the memory: that of combinators, buffers outside the ``state_dict``, and extra states."""
    _must(isinstance(body["memory"], dict), "memory", "trees by name", body["memory"])
    memory = {key: _decoded(f"memory.{key:.80}", tree, get) for key, tree in body["memory"].items()}
    buffers, extra = (_decoded(section, body[section], get) for section in ("buffers", "extra"))
    _must(isinstance(buffers, dict) and all(isinstance(each, Listed) for each in buffers.values()), "buffers", "tensors by name", buffers)
    _must(isinstance(extra, dict), "extra", "trees by name", extra)
    for key, tree in memory.items():
        if isinstance(tree, dict) and {"saved", "permanent"} <= tree.keys():
            _check_lists(f"memory.{key:.80}", tree)
    phases = memory.get("phases", {})
    _must(isinstance(phases, dict) and all(isinstance(each, dict) for each in phases.values()), "memory.phases", "memory by name", phases)
    for tree in casts(memory):
        _must(
            isinstance(tree, dict) and isinstance(tree.get("dtype"), str) and tree["dtype"] in DTYPES,
            "memory: the cast",
            "a precision",
            tree,
        )


def _check_lists(field: str, tree: Mapping[str, Any]) -> None:
    """The lists of what a run has saved: by them, files are deleted."""
    for name in ("saved", "permanent"):
        _must(isinstance(tree[name], list) and all(map(_is_count, tree[name])), f"{field}.{name}", "a list of steps", tree[name])
    _must(_is_count(tree.get("skipped", 0)), f"{field}.skipped", "a whole number of at least 0", tree.get("skipped"))
