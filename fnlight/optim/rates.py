"""The learning rate of the next step: a pure function of completed work and history."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fnlight.errors import MonitorError
from fnlight.optim.spec import Optim
from fnlight.replay import Plateau, TorchSchedule


def set_lr(optim: Optim, progress: Any, history: tuple[Any, ...]) -> None:
    """Give every group the learning rate of the next step: a pure function of completed work and history.

    Args:
        optim: The prepared optimizer.
        progress: Completed steps and epochs.
        history: The records so far, for schedules that monitor a metric.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from fnlight.optim.prepare import prepare
        >>> model = torch.nn.Linear(2, 1)
        >>> optim = prepare(Optim(torch.optim.SGD(model.parameters(), lr=0.1), lambda step: 0.5**step), model)
        >>> set_lr(optim, SimpleNamespace(step=2, epoch=0), ())
        >>> optim.optimizer.param_groups[0]["lr"]
        0.025
    """
    schedule = optim.schedule
    count = progress.step if optim.interval == "step" else progress.epoch
    if isinstance(schedule, TorchSchedule):
        values = _from_history(optim, history, list) if schedule.monitored else None
        for group, found in zip(optim.optimizer.param_groups, schedule.groups(optim.configured, count, values), strict=True):
            for key, value in found.items():
                _assign(group, key, value)
        return
    factor = _from_history(optim, history, schedule.over) if isinstance(schedule, Plateau) else schedule(count)
    for group in optim.optimizer.param_groups:
        _assign(group, "lr", group["initial_lr"] * factor)


def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # a tensor learning rate keeps its place, for compiled and captured steps
    else:
        group[key] = value


def _from_history(optim: Optim, history: tuple[Any, ...], fn: Callable[[list[float]], Any]) -> Any:
    """A function of the monitored values, computed once a history and not once a step."""
    if optim._memo.get("history") is not history:
        optim._memo["history"], optim._memo["found"] = history, fn(monitored(history, optim.monitor or ""))
    return optim._memo["found"]


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
