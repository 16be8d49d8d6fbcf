"""The memory of an optimizer by qualified parameter name, and where it lives."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fnlight.optim.spec import Optim

OTHER = "*"  # the name under which memory lies that belongs to no parameter


def named_state(optim: Optim, module: nn.Module) -> dict[str, dict[str, Any]]:
    """The memory of an optimizer by qualified parameter name.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        Names to the slots of that parameter; what belongs to no parameter stands under ``"*"``.

    Example:
        >>> import torch
        >>> from fnlight.optim.prepare import prepare
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
        >>> import torch
        >>> from fnlight.optim.prepare import prepare
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
        >>> import torch
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
