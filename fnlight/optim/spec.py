"""`Optim`: an optimizer with the course of its learning rate, as `configure_optimizers` returns it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import attrs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fnlight.errors import OptimizerError
from fnlight.schedules import Plateau, TorchSchedule

Interval = Literal["step", "epoch", "samples"]


def _is_scheduled(optim: Any) -> bool:
    return optim.schedule is not None or bool(optim.schedules)


@attrs.frozen(eq=False)
class Course:
    """What one option of some groups does in the course of a training; made by `prepare`.

    Args:
        key: The option, such as ``"lr"``.
        schedule: Maps a count to a factor, or is a `Plateau`.
        bases: By the index of a group, the value that is multiplied.

    Example:
        >>> Course("weight_decay", lambda step: 0.5, {0: 0.1}).key
        'weight_decay'
    """

    key: str
    schedule: Any
    bases: Mapping[int, Any]


@attrs.frozen(eq=False)
class Optim:
    """An optimizer with the course of its learning rate, and of other options if need be.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, made from the parameters of the model that was given.
        schedule: Maps completed steps (or epochs, or samples) to a factor of the learning rate; or `plateau`, or `from_torch`; or a
            mapping of group names to such functions and `plateau`, with ``"*"`` for all other groups.
        interval: What a schedule counts: ``"step"`` (optimizer steps), ``"epoch"`` or ``"samples"``.
        monitor: For `plateau`: the name in the history that it watches, such as ``"val/loss"``.
        frequency: How many of them count as one: with 10, a schedule of steps moves on every ten steps.
        schedules: The same for other options, such as ``{"weight_decay": linear(1, 0, 1000)}``: factors of what the groups were
            made with. ``"momentum"`` is the first of the ``betas`` where an optimizer has those.
        create_graph: True computes gradients that can be differentiated again, as optimizers of second order need; None finds out.
        offload: True keeps the optimizer's memory on the host and takes its step there; see `fnlight.optim.host`.
        closure: True lets the optimizer compute the loss itself, several times a step, as LBFGS does; None finds out.
        configured: The groups as `configure_optimizers` made them; filled by `prepare`.
        courses: Which option of which group follows which schedule; filled by `prepare`.
        chooses: Whether it is fnlight that chooses the kernels, on each device anew; filled by `prepare`.

    Raises:
        OptimizerError: If a schedule is a torch scheduler object or no function, or lacks or does not use its monitor.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> Optim(torch.optim.SGD(model.parameters(), lr=0.1), schedule=lambda step: 0.5**step).interval
        'step'
    """

    optimizer: Any
    schedule: Any = None
    interval: Interval = attrs.field(default="step", validator=attrs.validators.in_(get_args(Interval)))
    monitor: str | None = None
    frequency: int = attrs.field(default=1, kw_only=True)
    schedules: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    create_graph: bool | None = attrs.field(default=None, kw_only=True)
    closure: bool | None = attrs.field(default=None, kw_only=True)
    offload: bool = attrs.field(default=False, kw_only=True)
    configured: Sequence[Mapping[str, Any]] = attrs.field(default=(), kw_only=True)
    courses: Sequence[Course] = attrs.field(default=(), kw_only=True)
    chooses: bool = attrs.field(default=False, kw_only=True)
    scheduled: bool = attrs.field(init=False, default=attrs.Factory(_is_scheduled, takes_self=True))
    _memo: dict[Any, Any] = attrs.field(factory=dict, init=False, repr=False)  # of a pure function: the last history and what was found
    bound: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)  # what the optimizer works on, looked up once; never copied

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.frequency, int) or isinstance(self.frequency, bool) or self.frequency < 1:
            raise OptimizerError(f"frequency must be a whole number of at least 1, but got {self.frequency!r}")
        if not isinstance(self.offload, bool):
            raise OptimizerError(f"offload must be True or False, but got {self.offload!r}")
        if not isinstance(self.schedules, Mapping):
            raise OptimizerError(f"schedules must map options to schedules, as in {{'weight_decay': fn}}, but got {self.schedules!r:.80}")
        if "lr" in self.schedules:
            raise OptimizerError("schedules={'lr': ...} is for other options; give the schedule of the learning rate as schedule=...")
        parts = list(_parts(self))
        for where, schedule in parts:
            _check_schedule(where, schedule, alone=schedule is self.schedule)
        if isinstance(self.schedule, TorchSchedule) and not self.configured and _has_lr(self.optimizer):
            object.__setattr__(self, "schedule", self.schedule.resolved(self.optimizer.param_groups))
            parts[0] = ("schedule", self.schedule)
        watching = [s for _, s in parts if isinstance(s, Plateau) or (isinstance(s, TorchSchedule) and s.monitored)]
        if watching and self.monitor is None:
            raise OptimizerError(f'{watching[0]} watches a metric: say which, as Optim(..., monitor="val/loss")')
        if self.monitor is not None and not watching:
            raise OptimizerError(f"monitor={self.monitor!r} is for plateau schedules, but the schedule is {self.schedule!r}; leave it out")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optim":
        optimizer = copy_optimizer(self.optimizer, memo)
        return attrs.evolve(self, optimizer=optimizer, schedule=copy.deepcopy(self.schedule, memo))


def _parts(optim: Optim) -> Iterator[tuple[str, Any]]:
    """Every single schedule, with where it was written."""
    found = {"schedule": optim.schedule, **{f"schedules[{key!r}]": s for key, s in optim.schedules.items()}}
    for where, given in found.items():
        if isinstance(given, Mapping):
            yield from ((f"{where}[{name!r}]", schedule) for name, schedule in given.items())
        elif given is not None:
            yield where, given


def _check_schedule(where: str, schedule: Any, alone: bool) -> None:
    if isinstance(schedule, LRScheduler | ReduceLROnPlateau):
        name = type(schedule).__name__
        raise OptimizerError(
            f"{where} must be a pure function, but got a torch scheduler, {name}, which counts for itself; "
            f"pass fl.from_torch(lambda optimizer: {name}(optimizer, ...)) instead"
        )
    if isinstance(schedule, TorchSchedule) and not alone:
        raise OptimizerError(f"{where}={schedule} changes all groups and options by itself; give it as schedule=..., alone")
    if not callable(schedule) and not isinstance(schedule, Plateau | TorchSchedule):
        raise OptimizerError(f"{where} must map completed steps to a factor, but got {schedule!r}")


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
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and id(inner) not in memo:
            copy_optimizer(inner, memo)
    held = {k: v for k, v in vars(optimizer).items() if k != "step"}  # a torch scheduler patches `step` with one bound to the original
    twin.__dict__.update(copy.deepcopy(held, memo))
    return twin
