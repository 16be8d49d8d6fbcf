"""The learning rate and other options of the next step: a pure function of completed work and history."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fnlight.errors import MonitorError, OptimizerError
from fnlight.optim.spec import Course, Optim
from fnlight.schedules import Curve, Plateau, TorchSchedule

REST = "*"  # the name under which a schedule is given for all groups that have none of their own


def set_lr(optim: Optim, progress: Any, history: tuple[Any, ...]) -> None:
    """Give every group the learning rate of the next step, and what else is scheduled: a pure function of completed work and history.

    Args:
        optim: The prepared optimizer.
        progress: Completed steps, epochs and samples.
        history: The records so far, for schedules that monitor a metric.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from fnlight.optim import prepare
        >>> model = torch.nn.Linear(2, 1)
        >>> optim = prepare(Optim(torch.optim.SGD(model.parameters(), lr=0.1), lambda step: 0.5**step), model)
        >>> set_lr(optim, SimpleNamespace(step=2, epoch=0), ())
        >>> optim.optimizer.param_groups[0]["lr"]
        0.025
    """
    groups = optim.optimizer.param_groups
    count = _completed(optim, progress)
    if isinstance(optim.schedule, TorchSchedule):
        values = _from_history(optim, history, list) if optim.schedule.monitored else None
        for group, found in zip(groups, optim.schedule.groups(optim.configured, count, values), strict=True):
            for key, value in found.items():
                _assign(group, key, value)
    for course in optim.courses:
        schedule, key = course.schedule, course.key
        factor = _from_history(optim, history, schedule.over) if isinstance(schedule, Plateau) else schedule(count)
        for i, base in course.bases.items():
            if key == "lr":
                _assign(groups[i], "lr", groups[i]["initial_lr"] * factor)
            else:
                _assign(groups[i], key, (base[0] * factor, *base[1:]) if key == "betas" else base * factor)


def _completed(optim: Optim, progress: Any) -> int:
    done = progress.step if optim.interval == "step" else progress.epoch if optim.interval == "epoch" else progress.samples
    return done if optim.frequency == 1 else done // optim.frequency


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # a tensor learning rate keeps its place, for compiled and captured steps
    else:
        group[key] = value


def _from_history(optim: Optim, history: tuple[Any, ...], fn: Callable[[list[float]], Any]) -> Any:
    """A function of the monitored values, computed once a history and not once a step."""
    memo = optim._memo
    if memo.get("history") is not history:
        memo.clear()
        memo["history"] = history
    if fn not in memo:
        memo[fn] = fn(monitored(history, optim.monitor or ""))
    return memo[fn]


def courses_of(optim: Optim) -> list[Course]:
    """Say which option of which group follows which schedule, having checked that there are such groups and options.

    Args:
        optim: Its `configured` is filled.

    Returns:
        The courses; none for a schedule of torch, which changes groups in its own way.

    Raises:
        OptimizerError: If a schedule is for a group or an option that does not exist, or gives no number.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> model = torch.nn.Linear(2, 1)
        >>> made = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> [course.bases for course in courses_of(prepare(Optim(made, schedules={"weight_decay": lambda step: 1.0}), model))]
        [{0: 0.1}]
    """
    names = [group_name(group, i) for i, group in enumerate(optim.configured)]
    given = {} if isinstance(optim.schedule, TorchSchedule | None) else {"lr": optim.schedule}
    found: list[Course] = []
    for key, schedule in {**given, **optim.schedules}.items():
        single = schedule if isinstance(schedule, Mapping) else {REST: schedule}
        unknown = [name for name in single if name != REST and name not in names]
        if unknown:
            raise OptimizerError(f"the schedule of {key!r} is for the groups {unknown}, but the optimizer has {names}")
        for name, fn in single.items():
            members = [i for i, own in enumerate(names) if own == name or (name == REST and own not in single)]
            bases = [(_option(key, optim.configured[i], names[i]), i) for i in members]
            fn = _checked(fn, key)
            options = dict.fromkeys(option for (option, _), _ in bases)
            found += [Course(option, fn, {i: base for (own, base), i in bases if own == option}) for option in options]
    return found


def _option(key: str, group: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """The option of a group that a schedule is for, and its value."""
    if key == "momentum" and key not in group and isinstance(group.get("betas"), tuple):
        return "betas", group["betas"]
    value = group.get(key)
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return key, value
    known = sorted(k for k, v in group.items() if isinstance(v, float) and k != "initial_lr")
    raise OptimizerError(f"a schedule multiplies {key!r}, but in group {name!r} of the optimizer it is {value!r}; numbers are {known}")


def _checked(fn: Any, key: str) -> Any:
    if not isinstance(fn, Plateau):
        factor = fn(0)
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not math.isfinite(factor):
            raise OptimizerError(
                f"the schedule of {key!r} must map a count to a finite number, but maps 0 to {factor!r}; is a `return` missing?"
            )
    return fn


def ends(optim: Optim) -> list[tuple[str, Any, int, bool]]:
    """The schedules that have an end.

    Args:
        optim: A prepared optimizer.

    Returns:
        For each the option that it is for, itself, the count of its end, and whether it holds its last value from there on; a
        scheduler of torch may fail instead.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> from fnlight.schedules import cosine
        >>> model = torch.nn.Linear(2, 1)
        >>> ends(prepare(Optim(torch.optim.SGD(model.parameters(), lr=0.1), cosine(100)), model))
        [('lr', cosine(100, final=0.0), 100, True)]
    """
    found: list[tuple[str, Any, int, bool]] = [
        (c.key, c.schedule, c.schedule.total, True) for c in optim.courses if isinstance(c.schedule, Curve) and c.schedule.total
    ]
    if isinstance(optim.schedule, TorchSchedule) and (last := optim.schedule.last(optim.configured)):
        found.append(("lr", optim.schedule, last, False))
    return found


def group_name(group: Mapping[str, Any], index: int) -> str:
    """What a parameter group is called: its ``name``, or else its index.

    Args:
        group: A group of an optimizer.
        index: Which one it is.

    Returns:
        The name.

    Example:
        >>> group_name({"name": "head"}, 0), group_name({}, 1)
        ('head', '1')
    """
    return str(group.get("name", index))


def reported(optim: Optim, phase: str = "") -> dict[str, float]:
    """The learning rate of each group, and what else is scheduled, as a log shows them.

    Args:
        optim: A prepared optimizer, or one of None.
        phase: What it is called, where there are several.

    Returns:
        ``lr``, or ``lr/NAME`` for each of several groups, behind ``lr/PHASE`` of a phase; the same for other options with a schedule.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> groups = [{"params": a.parameters(), "name": "trunk"}, {"params": b.parameters(), "lr": 0.5}]
        >>> reported(prepare(torch.optim.SGD(groups, lr=0.25), torch.nn.ModuleList([a, b])))
        {'lr/trunk': 0.25, 'lr/1': 0.5}
    """
    groups = [] if optim.optimizer is None else optim.optimizer.param_groups
    found: dict[str, float] = {}
    for key in dict.fromkeys(["lr", *(course.key for course in optim.courses)]):
        held = {group_name(group, i): group[key] for i, group in enumerate(groups) if group.get(key) is not None}
        shown = "momentum" if key == "betas" else key
        for name, value in held.items():
            where = (shown, phase, name if len(held) > 1 else "")
            found["/".join(filter(None, where))] = float(value[0] if key == "betas" else value)
    return found


def monitored(history: tuple[Any, ...], name: str) -> list[float]:
    """The values of one name in a history, oldest first.

    Args:
        history: Records with ``metrics``.
        name: Such as ``"val/loss"``.

    Returns:
        A list of floats, empty before the first record that could hold it.

    Raises:
        MonitorError: If records of the same kind (``val/...``) exist but do not hold the name.

    Example:
        >>> from types import SimpleNamespace
        >>> monitored((SimpleNamespace(metrics={"val/loss": 0.5}),), "val/loss")
        [0.5]
    """
    values = [record.metrics[name] for record in history if name in record.metrics]
    if not values:
        kind = name.split("/", maxsplit=1)[0] + "/"
        known = sorted({key for record in history for key in record.metrics})
        if any(key.startswith(kind) for key in known):
            raise MonitorError(f"{name!r} is monitored, but no evaluation yields it; there are {known}")
    return values
