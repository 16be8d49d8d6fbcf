"""Optimizer state by qualified parameter name, and its device."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fnlight.optim.host import HOST
from fnlight.optim.spec import Optim, copy_optimizer

OTHER = "*"  # the name for state that belongs to no parameter


def named_state(optim: Optim, module: nn.Module) -> dict[str, dict[str, Any]]:
    """The state of an optimizer by qualified parameter name.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        Parameter names to their state; state that belongs to no parameter is under ``"*"``.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
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
    """The parameter groups with names instead of parameters.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        One dict per group.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> model = nn.Linear(2, 1)
        >>> named_groups(prepare(torch.optim.SGD(model.parameters(), lr=0.1), model), model)[0]["params"]
        ['weight', 'bias']
    """
    if optim.optimizer is None:
        return []
    names = {id(p): name for name, p in module.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optim.optimizer.param_groups]


def place_slot(slot: str, value: Any, param: Tensor, group: Mapping[str, Any], offload: bool = False) -> Any:
    """Move a state tensor to the device that the optimizer expects: step counts stay on the CPU unless the kernel is fused or captured.

    Args:
        slot: The name in the optimizer state, such as ``exp_avg``.
        value: Its value.
        param: The parameter it belongs to.
        group: The parameter's group.
        offload: Whether the optimizer state is on the host.

    Returns:
        The value on its device.

    Example:
        >>> import torch
        >>> place_slot("step", torch.tensor(1.0), torch.zeros(2), {"fused": True}).device.type
        'cpu'
    """
    if not isinstance(value, Tensor):
        return value
    if slot == "step" and value.dim() == 0 and not group.get("capturable") and not group.get("fused"):
        return value.cpu()
    return value.to(HOST if offload else param.device)


def to_device(optim: Optim) -> None:
    """Move optimizer state to the device of the parameters, or to the host, in place.

    Args:
        optim: A prepared optimizer, or ``Optim(None)``.

    Example:
        >>> to_device(Optim(None))
    """
    optimizer = optim.optimizer
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            slots = optimizer.state.get(param)
            for slot, value in (slots or {}).items():
                slots[slot] = place_slot(slot, value, param, group=group, offload=optim.offload)


def class_name(optimizer: Any) -> str:
    """The class name of an optimizer, with that of its inner optimizer, if any.

    Args:
        optimizer: Any optimizer, or None.

    Returns:
        A name such as ``"torch.optim.adamw.AdamW"``; ``"none"`` for None.

    Example:
        >>> import torch
        >>> class_name(torch.optim.AdamW(nn.Linear(1, 1).parameters()))
        'torch.optim.adamw.AdamW'
    """
    if optimizer is None:
        return "none"
    kind = type(optimizer)
    inner = [class_name(held) for held in vars(optimizer).values() if isinstance(held, Optimizer)]
    return f"{kind.__module__}.{kind.__qualname__}" + "".join(f"[{name}]" for name in inner)


RAW = "raw"  # the key in a checkpoint of the trained weight, if another weight is used for evaluation


def weights_to_use(optims: Iterable[Optim], module: nn.Module) -> dict[str, Tensor]:
    """The weights for evaluation and export of schedule-free optimizers: those of their mode ``eval``.

    They are computed on a copy, because switching between the modes would change the last bits of the trained weights.

    Args:
        optims: The prepared optimizers.
        module: The module; it is not changed.

    Returns:
        Names to averaged tensors; empty for all other optimizers.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> model = nn.Linear(1, 1)
        >>> weights_to_use([prepare(torch.optim.SGD(model.parameters(), lr=0.1), model)], model)
        {}
    """
    found: dict[str, Tensor] = {}
    for optim in optims:
        if callable(getattr(optim.optimizer, "eval", None)) and optim.optimizer.state:  # before the first step there is no average
            memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in module.parameters()}
            copied = copy_optimizer(optim.optimizer, memo)
            copied.eval()
            held = {id(p) for group in copied.param_groups for p in group["params"]}
            found |= {name: memo[id(p)].detach() for name, p in module.named_parameters() if id(memo[id(p)]) in held}
    return found
