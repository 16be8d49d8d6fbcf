"""Optimizers: what `configure_optimizers` may return, checked against its model, with memory by qualified parameter name.

An optimizer keeps memory in ``state`` and, some of them, in ``param_groups``; both are saved. What the user configured is kept
beside it (`Optim.configured`), so that a value that was changed in the code wins over the one in a checkpoint.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fnlight.errors import MonitorError, OptimizerError, OptimizerWarning
from fnlight.replay import Plateau, TorchSchedule

OTHER = "*"  # the name under which memory lies that belongs to no parameter


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
        >>> model = nn.Linear(2, 1)
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
        >>> model, memo = nn.Linear(2, 1), {}
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


def prepare(made: Any, module: nn.Module) -> Optim:
    """Check what `configure_optimizers` returned against the module, and complete it.

    The fused form of a torch optimizer is switched on where it has one, all parameters allow it and the user did not choose.

    Args:
        made: An optimizer, an `Optim`, or None where nothing is trainable.
        module: The module whose parameters it must hold.

    Returns:
        An `Optim` whose groups have ``initial_lr`` and whose `configured` is filled.

    Raises:
        OptimizerError: If it is no optimizer, holds parameters of another model, or has a torch scheduler on it.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> prepare(torch.optim.SGD(model.parameters(), lr=0.1), model).configured[0]["lr"]
        0.1
    """
    optim = made if isinstance(made, Optim) else Optim(made)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if optim.optimizer is None:
        if trainable:
            raise OptimizerError(
                f"configure_optimizers must return an optimizer or Optim, but returned None; trainable: {_some(trainable)}"
            )
        return Optim(None)
    if not isinstance(optim.optimizer, Optimizer):
        raise OptimizerError(
            f"configure_optimizers must return a torch.optim.Optimizer or fl.Optim(optimizer, schedule), but returned {_describe(made)}"
        )
    if getattr(optim.optimizer.step, "_wrapped_by_lr_sched", False):
        raise OptimizerError(
            f"a torch scheduler was made on this {type(optim.optimizer).__name__}, and nobody would step it; "
            "return fl.Optim(optimizer, schedule=fl.from_torch(lambda optimizer: Scheduler(optimizer, ...))) instead"
        )
    _check_parameters(optim.optimizer, module, trainable)
    _choose_fused(optim.optimizer, module)
    for group in optim.optimizer.param_groups:
        if optim.schedule is not None and group.get("lr") is None:
            raise OptimizerError(f"a schedule multiplies a learning rate, but {type(optim.optimizer).__name__} has lr=None; give it one")
        group.setdefault("initial_lr", _plain(group.get("lr")))
    configured = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optim.optimizer.param_groups]
    return attrs.evolve(optim, configured=configured)


def _check_parameters(optimizer: Optimizer, module: nn.Module, trainable: Mapping[str, Tensor]) -> None:
    own = {id(p): name for name, p in module.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [list(p.shape) for p in held if id(p) not in own]
    if foreign:
        raise OptimizerError(
            f"configure_optimizers(model) must use the parameters of the model it is given, but {type(optimizer).__name__} holds "
            f"{len(foreign)} of another one (shapes {foreign[:5]}); write model.parameters() of the argument, not of a model outside"
        )
    ids = {id(p) for p in held}
    missing = [name for name, p in trainable.items() if id(p) not in ids]
    if missing:
        warnings.warn(
            f"{type(optimizer).__name__} holds no {_some(missing)}, which require gradients but will never change; "
            "give them to the optimizer, or freeze them with requires_grad_(False)",
            OptimizerWarning,
            stacklevel=3,
        )


def _choose_fused(optimizer: Optimizer, module: nn.Module) -> None:
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in module.modules()):
        return  # fused kernels refuse sparse gradients
    for group in optimizer.param_groups:
        chosen = group.get("foreach") is not None or group.get("differentiable") or group.get("capturable")
        if "fused" not in group or group["fused"] is not None or chosen:
            return
        if type(optimizer) is torch.optim.SGD and group["momentum"]:
            return  # torch's fused kernel fails where a parameter gets its first gradient later than others
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") and type(p) is nn.Parameter for p in params):
        return
    if len({p.device.type for p in params}) != 1 or (type(optimizer) is torch.optim.Adagrad and params[0].device.type != "cpu"):
        return
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        return
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.defaults["fused"] = True
    setattr(optimizer, "_step_supports_amp_scaling", True)  # noqa: B010  # what the constructor sets with fused=True; unknown to type stubs


def take_step(optimizer: Any) -> None:
    """Let an optimizer step; where nobody listens, without the wrapper that torch puts around a step for profilers and hooks.

    The wrapper costs a small model a tenth of its step.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; its parameters have their gradients.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> take_step(torch.optim.SGD([weight], lr=0.5)); weight.tolist()
        [0.5]
    """
    step: Any = type(optimizer).step
    listening = (
        not getattr(step, "hooked", False)
        or "step" in vars(optimizer)
        or profiler._is_profiler_enabled
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
    if listening:
        optimizer.step()
    else:
        step.__wrapped__(optimizer)


def set_lr(optim: Optim, progress: Any, history: tuple[Any, ...]) -> None:
    """Give every group the learning rate of the next step: a pure function of completed work and history.

    Args:
        optim: The prepared optimizer.
        progress: Completed steps and epochs.
        history: The records so far, for schedules that monitor a metric.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(2, 1)
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


def named_state(optim: Optim, module: nn.Module) -> dict[str, dict[str, Any]]:
    """The memory of an optimizer by qualified parameter name.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        Names to the slots of that parameter; what belongs to no parameter stands under ``"*"``.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optim = prepare(torch.optim.Adam(model.parameters()), model)
        >>> model(torch.ones(1, 2)).sum().backward(); optim.optimizer.step()
        >>> sorted(named_state(optim, model)["weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """
    if optim.optimizer is None:
        return {}
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for key, slots in optim.optimizer.state.items():
        if id(key) in names:
            found[names[id(key)]] = dict(slots)
        else:
            found.setdefault(OTHER, {})[key] = slots
    return found


def named_groups(optim: Optim, module: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups with names in the place of parameters.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        One dict a group.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> named_groups(prepare(torch.optim.SGD(model.parameters(), lr=0.1), model), model)[0]["params"]
        ['weight', 'bias']
    """
    if optim.optimizer is None:
        return []
    names = {id(p): name for name, p in module.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optim.optimizer.param_groups]


def place_slot(slot: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Any:
    """Put a slot's tensor where the optimizer wants it: step counts stay on the CPU unless the kernel is fused or captured.

    Args:
        slot: The slot's name, such as ``exp_avg``.
        value: The slot's value.
        param: The parameter it belongs to.
        group: The parameter's group.

    Returns:
        The value on its device.

    Example:
        >>> place_slot("step", torch.tensor(1.0), torch.zeros(2), {"fused": True}).device.type
        'cpu'
    """
    if not isinstance(value, Tensor):
        return value
    if slot == "step" and value.dim() == 0 and not group.get("capturable") and not group.get("fused"):
        return value.cpu()
    return value.to(param.device)


def to_device(optimizer: Any) -> None:
    """Move the memory of an optimizer to where its parameters are now, in place.

    Args:
        optimizer: Any optimizer, or None.

    Example:
        >>> to_device(None)
    """
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            slots = optimizer.state.get(param)
            for slot, value in (slots or {}).items():
                slots[slot] = place_slot(slot, value, param, group)


def _plain(lr: Any) -> Any:
    return float(lr) if isinstance(lr, Tensor) else lr


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _describe(made: Any) -> str:
    if isinstance(made, Mapping):
        return f"a dict of {sorted(map(str, made))}"
    return f"{type(made).__name__}: {made!r:.80}"
