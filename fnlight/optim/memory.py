"""The memory of an optimizer by qualified parameter name, and where it lives."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fnlight.optim.host import HOST
from fnlight.optim.spec import Optim, copy_optimizer

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
    """The parameter groups with names in the place of parameters.

    Args:
        optim: The prepared optimizer.
        module: Its module.

    Returns:
        One dict a group.

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
    """Put a slot's tensor where the optimizer wants it: step counts stay on the CPU unless the kernel is fused or captured.

    Args:
        slot: The slot's name, such as ``exp_avg``.
        value: The slot's value.
        param: The parameter it belongs to.
        group: The parameter's group.
        offload: Whether the optimizer keeps its memory on the host.

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
    """Move the memory of an optimizer to where its parameters are now, or to the host, in place.

    Args:
        optim: A prepared optimizer, or none.

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
    """The class of an optimizer, and of the one inside it, if any: whose memory it is.

    Args:
        optimizer: Any optimizer, or None.

    Returns:
        Such as ``"torch.optim.adamw.AdamW"``; ``"none"`` for None.

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


RAW = "raw"  # the slot of a checkpoint that holds the weight that is trained, where the one to use is another


def weights_to_use(optims: Iterable[Optim], module: nn.Module) -> dict[str, Tensor]:
    """The weights to evaluate and to keep, where an optimizer trains others: those of schedule-free optimizers in their mode ``eval``.

    They are computed on a copy, because going to and fro between the modes would change the last bits of what is trained.

    Args:
        optims: The prepared optimizers.
        module: Its module; it stays as it is.

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
        if callable(getattr(optim.optimizer, "eval", None)):
            memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in module.parameters()}
            twin = copy_optimizer(optim.optimizer, memo)
            twin.eval()
            held = {id(p) for group in twin.param_groups for p in group["params"]}
            found |= {name: memo[id(p)].detach() for name, p in module.named_parameters() if id(memo[id(p)]) in held}
    return found
