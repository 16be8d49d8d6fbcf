"""Restore an optimizer: slots are matched by parameter name, group values by the parameters of a group; values changed in the code win."""

import copy
import enum
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.checkpoint.encode import decode
from fnlight.checkpoint.listing import OPTIMIZER
from fnlight.checkpoint.placeholder import fitted
from fnlight.checkpoint.reader import Opened
from fnlight.errors import MismatchError
from fnlight.optim import HOST, OTHER, RAW, Optim, class_name, named_groups, place_slot
from fnlight.tensors import equal, map_tensors, spread_like

_ABSENT = object()
_SLOTS = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
_KERNELS = ("fused", "foreach")  # how it is computed: the business of this machine, never of a file


def place_optimizers(
    optims: Mapping[str, Optim], module: nn.Module, opened: Opened, loaded: frozenset[str], known: Mapping[str, torch.dtype], afresh: bool
) -> list[str]:
    """Load the optimizer state and the group values of each optimizer from a checkpoint, by its name, in place.

    Args:
        optims: The prepared optimizers by name; a single one has the name ``""``.
        module: Their module.
        opened: The checkpoint.
        loaded: Names of the parameters whose values were taken.
        known: Names of the parameters in the checkpoint to their dtypes there.
        afresh: Whether an optimizer of another class may start afresh.

    Returns:
        What differs, one line each.

    Raises:
        MismatchError: Unless `afresh`, if both sides have an optimizer, of different classes.

    Example:
        >>> from fnlight.checkpoint import Folder
        >>> place_optimizers({"": Optim(None)}, nn.Linear(1, 1), Opened("a", Folder("a"), {"optimizer": None, "files": {}}), frozenset(), {}, afresh=False)
        []
    """
    whole = opened.body["optimizer"]
    saved = whole["phases"] if whole is not None and "phases" in whole else {"": whole}
    if ("" in saved) != ("" in optims):
        return [
            f"the optimizers changed: {_kinds(saved)} in the checkpoint, {', '.join(filter(None, optims)) or 'a single one'} now; all optimizer state starts empty"
        ]
    tensors = opened.tensors(OPTIMIZER)
    notes = [f"the task no longer has the optimizer {name!r}; its state is dropped" for name in saved if name not in optims]
    for name, optim in optims.items():
        if name not in saved:
            notes.append(f"the checkpoint has no optimizer {name!r}; its state starts empty")
            continue
        found = _place_optimizer(
            optim, module, saved[name], path=opened.path, tensors=tensors, loaded={each: known.get(each) for each in loaded}, afresh=afresh
        )
        notes += [f"{name}: {line}" for line in found] if name else found
    return notes


def _kinds(saved: Mapping[str, Any]) -> str:
    return ", ".join(name or ("none" if section is None else section["class"]) for name, section in saved.items())


def _place_optimizer(
    optim: Optim,
    module: nn.Module,
    section: Any,
    path: str,
    tensors: dict[str, Tensor],
    loaded: Mapping[str, torch.dtype | None],
    afresh: bool,
) -> list[str]:
    saved_class = "none" if section is None else section["class"]
    own_class = class_name(optim.optimizer)
    if not _same_class(saved_class, own_class):
        if section is not None and optim.optimizer is not None and not afresh:
            raise MismatchError(_another(path, saved_class, own_class))
        return [f"optimizer changed: {saved_class} in the checkpoint, {own_class} now; its state starts empty"]
    if section is None:
        return []
    _place_slots(optim, module, section, tensors=tensors, loaded=loaded)
    notes = _place_groups(optim, module, section["groups"], tensors)
    return notes + _begin_slots(optim) + _unheld(optim, module, section, loaded)


def _another(path: str, saved: str, own: str) -> str:
    return (
        f"optimizer changed: checkpoint {path} was trained with {saved}, but the task now has {own}, which cannot use its optimizer state; create "
        'the task with the optimizer that was saved, or start the new one with empty state with allow=("optimizer",): an argument of '
        "fl.restore(path, like=state, ...) and of fl.FitConfig(resume=True, ...)"
    )


def _same_class(a: str, b: str) -> bool:
    """Say whether two optimizers are of one class; a script that is imported is no longer ``__main__``."""
    (module_a, _, name_a), (module_b, _, name_b) = a.partition("."), b.partition(".")
    last = name_a.rpartition(".")[2] == name_b.rpartition(".")[2]
    return last and (module_a == module_b or "__main__" in (module_a, module_b))


def _held(optim: Optim) -> dict[int, Mapping[str, Any]]:
    return {id(p): group for group in optim.optimizer.param_groups for p in group["params"]}


def _place_slots(
    optim: Optim, module: nn.Module, section: Any, tensors: dict[str, Tensor], loaded: Mapping[str, torch.dtype | None]
) -> None:
    groups, state = _held(optim), optim.optimizer.state
    known = {name for group in section["groups"] for name in group["params"]}
    for name, p in module.named_parameters():
        if id(p) not in groups or name not in known or name not in loaded:
            continue  # it keeps what the optimizer gave it when it was made
        state.pop(p, None)
        if name in section["slots"]:
            slots = decode(section["slots"][name], tensors.pop)
            raw = slots.pop(RAW, None)
            if raw is not None:
                p.data.copy_(raw)
                if not slots:
                    continue
            group = groups[id(p)]
            state[p] = {
                slot: _like(slot, _of_dtype(value, loaded[name], p), p, group=group, offload=optim.offload) for slot, value in slots.items()
            }
    for key, value in decode(section["slots"].get(OTHER, {}), tensors.pop).items():
        state[key] = value


def _begin_slots(optim: Optim) -> list[str]:
    """Begin the slots that an option needs which was off when the checkpoint was saved: with zeros, as torch does at the first step."""
    begun: dict[str, str] = {}
    if not type(optim.optimizer).__module__.startswith("torch.optim"):
        return []  # what an option of another library needs is not known
    for group in optim.optimizer.param_groups:
        for option, slot in _SLOTS.items():
            lacking = [p for p in group["params"] if optim.optimizer.state.get(p) and slot not in optim.optimizer.state[p]]
            for p in lacking if group.get(option) else ():
                optim.optimizer.state[p][slot] = torch.zeros_like(p.detach(), device=HOST if optim.offload else p.device)
                begun[option] = slot
    return [f"{option} was off in the checkpoint and is on now: its {slot} begins with zeros" for option, slot in begun.items()]


def _of_dtype(value: Any, saved: torch.dtype | None, p: Tensor) -> Any:
    """A slot that was of the dtype of its parameter still is."""
    same = isinstance(value, Tensor) and value.shape == p.shape and value.dtype == saved
    return value.to(p.dtype) if same else value


def _like(slot: str, value: Any, p: Tensor, group: Mapping[str, Any], offload: bool) -> Any:
    """A slot's value in live memory; one of the parameter's shape gets its strides too, which fused kernels take for granted."""
    if not isinstance(value, Tensor):
        return map_tensors(lambda t: t.to(HOST if offload else p.device), value)
    if group.get("fused") and not _kernel_may_read(slot, value, p):
        raise ValueError(f"the slot {slot!r} of a parameter of shape {list(p.shape)} is {value.dtype} {list(value.shape)}")
    if value.shape == p.shape and not offload:
        value = spread_like(value, p)
    value = place_slot(slot, value, p, group=group, offload=offload)
    return value if value.shape != p.shape else fitted(value, p, same_kind=False)


def _kernel_may_read(slot: str, value: Tensor, p: Tensor) -> bool:
    """Fused kernels do not look at shapes: they would read and write beyond the end of a smaller tensor."""
    if slot == "step":
        return value.shape == () and value.dtype == torch.float32
    return value.shape == p.shape and value.dtype == p.dtype


def _place_groups(optim: Optim, module: nn.Module, saved: list[Any], tensors: dict[str, Tensor]) -> list[str]:
    owner = {name: i for i, group in enumerate(saved) for name in group["params"]}
    parts = [tuple(decode(group[part], tensors.pop) for part in ("values", "configured")) for group in saved]
    notes: list[str] = []
    for group, names, configured in zip(optim.optimizer.param_groups, named_groups(optim, module), optim.configured, strict=True):
        sources = {owner[name] for name in names["params"] if name in owner}
        if len(sources) == 1:
            (source,) = sources
            notes += _place_values(group, configured, *parts[source])
        elif sources:
            notes.append(f"a parameter group has parameters from {len(sources)} groups of the checkpoint; its values are those of the code")
    return list(dict.fromkeys(notes))


def _place_values(group: dict[str, Any], configured: Mapping[str, Any], values: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    changed: dict[str, str] = {}
    for key in (key for key in values if key not in _KERNELS):
        now, then = configured.get(key, _ABSENT), before.get(key, _ABSENT)
        if isinstance(now, enum.Enum) and now == then:
            continue  # a choice by name, which a file holds as its number
        if equal(_host(now), _host(then)):
            _assign(group, key, values[key])
            continue
        if now is not _ABSENT:
            _assign(group, key, now)
        changed[key] = f"{key}: {_say(then)} in the checkpoint, {_say(now)} now; {_say(now)} is used"
    if "lr" in changed:
        changed.pop("initial_lr", None)  # it follows
    return list(changed.values())


def _host(value: Any) -> Any:
    return map_tensors(lambda t: t.cpu(), value)


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    current = group.get(key)
    home: Any = current if isinstance(current, Tensor) else next(iter(group["params"]), torch.empty(0))
    group[key] = map_tensors(lambda t: t.to(home.device, copy=True), copy.deepcopy(value))


def _say(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        return f"{value.item():g}"
    return "not set" if value is _ABSENT else f"{value!r:.60}"


def _unheld(optim: Optim, module: nn.Module, section: Any, loaded: Collection[str]) -> list[str]:
    """Parameters with optimizer state in the checkpoint that the optimizer no longer has, and the other way round."""
    held = {name for group in named_groups(optim, module) for name in group["params"]}
    left = [name for name in section["slots"] if name != OTHER and name in loaded and name not in held]
    new = [name for name in held if name in loaded and not any(name in group["params"] for group in section["groups"])]
    lines = [f"the optimizer no longer has these parameters; their state is dropped: {', '.join(left[:8])}"] if left else []
    return lines + ([f"the checkpoint has no optimizer state for these; it starts empty: {', '.join(sorted(new)[:8])}"] if new else [])
