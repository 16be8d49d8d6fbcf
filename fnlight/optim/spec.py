"""`Optim`: an optimizer with the course of its learning rate, as `configure_optimizers` returns it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fnlight.errors import OptimizerError
from fnlight.replay import Plateau, TorchSchedule


@attrs.frozen(eq=False)
class Optim:
    """An optimizer with the course of its learning rate.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, made from the parameters of the model that was given.
        schedule: Maps completed steps (or epochs) to a factor of the learning rate; or `plateau`, or `from_torch`.
        interval: What the schedule counts: ``"step"`` (optimizer steps) or ``"epoch"``.
        monitor: For `plateau`: the name in the history that it watches, such as ``"val/loss"``.
        configured: The groups as `configure_optimizers` made them; filled by `prepare`.

    Raises:
        OptimizerError: If the schedule is a torch scheduler object, or lacks or does not use its monitor.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> Optim(torch.optim.SGD(model.parameters(), lr=0.1), schedule=lambda step: 0.5**step).interval
        'step'
    """

    optimizer: Any
    schedule: Any = None
    interval: Literal["step", "epoch"] = attrs.field(default="step", validator=attrs.validators.in_(("step", "epoch")))
    monitor: str | None = None
    configured: Sequence[Mapping[str, Any]] = ()
    _memo: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)  # of a pure function: the last history and what was found

    def __attrs_post_init__(self) -> None:
        if isinstance(self.schedule, LRScheduler | ReduceLROnPlateau):
            name = type(self.schedule).__name__
            raise OptimizerError(
                f"schedule must be a pure function, but got a torch scheduler, {name}, which counts for itself; "
                f"pass fl.from_torch(lambda optimizer: {name}(optimizer, ...)) instead"
            )
        if self.schedule is not None and not callable(self.schedule) and not isinstance(self.schedule, Plateau | TorchSchedule):
            raise OptimizerError(f"schedule must map completed steps to a factor, but got {self.schedule!r}")
        if isinstance(self.schedule, TorchSchedule) and not self.configured and _has_lr(self.optimizer):
            object.__setattr__(self, "schedule", self.schedule.resolved(self.optimizer.param_groups))
        wants = isinstance(self.schedule, Plateau) or (isinstance(self.schedule, TorchSchedule) and self.schedule.monitored)
        if wants and self.monitor is None:
            raise OptimizerError(f'{self.schedule} watches a metric: say which, as Optim(..., monitor="val/loss")')
        if self.monitor is not None and not wants:
            raise OptimizerError(f"monitor={self.monitor!r} is for plateau schedules, but the schedule is {self.schedule!r}; leave it out")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optim":
        optimizer = copy_optimizer(self.optimizer, memo)
        return Optim(optimizer, copy.deepcopy(self.schedule, memo), self.interval, self.monitor, self.configured)


def _has_lr(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and all(group.get("lr") is not None for group in optimizer.param_groups)


def copy_optimizer(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Copy an optimizer with every attribute, bound to the parameters that `memo` maps its own ones to.

    ``copy.deepcopy`` would keep no more than state and groups, and lose what LBFGS or AdaBound hold as attributes.

    Args:
        optimizer: Any optimizer, or None.
        memo: The memo of a ``deepcopy`` that has copied the module.

    Returns:
        A new optimizer.

    Example:
        >>> import torch
        >>> model, memo = torch.nn.Linear(2, 1), {}
        >>> optimizer = torch.optim.LBFGS(model.parameters())
        >>> twin = copy.deepcopy(model, memo)
        >>> copy_optimizer(optimizer, memo).param_groups[0]["params"][0] is twin.weight
        True
    """
    if optimizer is None:
        return None
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    held = {k: v for k, v in vars(optimizer).items() if k != "step"}  # a torch scheduler patches `step` with one bound to the original
    twin.__dict__.update(copy.deepcopy(held, memo))
    return twin
