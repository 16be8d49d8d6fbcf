"""How an optimizer computes: which of torch's kernels it uses, and its step."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fnlight.optim.fused import fused_step
from fnlight.tensors import has_step_hooks, is_profiling, is_sharded, say_fused

_FUSED = {
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.SGD: ("cpu", "cuda"),
    torch.optim.Adagrad: ("cpu",),
}
"""Optimizers that have a fused form, and the devices on which it is chosen."""


def leaves_open(optimizer: Optimizer) -> bool:
    """Say whether the user left it to fnlight which kernels an optimizer uses.

    Args:
        optimizer: Any optimizer, as the user made it.

    Returns:
        False where there is nothing to choose, or he chose.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> leaves_open(torch.optim.AdamW([weight])), leaves_open(torch.optim.AdamW([weight], foreach=True))
        (True, False)
    """
    return type(optimizer) in _FUSED and not any(
        group.get("fused") is not None or group.get("foreach") is not None or group.get("differentiable") or group.get("capturable")
        for group in optimizer.param_groups
    )


def choose_fused(optimizer: Optimizer, module: nn.Module) -> None:
    """Switch the fused form of a torch optimizer on where its parameters allow it, and off where they do not.

    Args:
        optimizer: One that `leaves_open` what it uses; changed in place.
        module: The module whose parameters it holds.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> choose_fused(optimizer, model); optimizer.param_groups[0]["fused"]
        True
    """
    fused = True if _can_fuse(optimizer, module) else None
    for group in optimizer.param_groups:
        group["fused"] = fused
    optimizer.defaults["fused"] = fused
    say_fused(optimizer, bool(fused))


def _can_fuse(optimizer: Optimizer, module: nn.Module) -> bool:
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in module.modules()):
        return False  # fused kernels refuse sparse gradients
    if type(optimizer) is torch.optim.SGD and any(group["momentum"] for group in optimizer.param_groups):
        return False  # torch's fused kernel fails where a parameter gets its first gradient later than others
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(p.is_floating_point() and (type(p) is nn.Parameter or is_sharded(p)) for p in params):
        return False
    places = {p.device.type for p in params}
    return len(places) == 1 and places <= set(_FUSED[type(optimizer)])


def take_step(optimizer: Any, memo: dict[str, Any] | None = None) -> None:
    """Let an optimizer step; where nobody listens, without the wrapper that torch puts around a step for profilers and hooks.

    The wrapper costs a small model a tenth of its step; what a fused optimizer looks up before it computes, another fifth.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; its parameters have their gradients.
        memo: Where what a fused optimizer has looked up is kept from one step to the next; None keeps nothing.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> take_step(torch.optim.SGD([weight], lr=0.5)); weight.tolist()
        [0.5]
    """
    step: Any = type(optimizer).step
    listening = not getattr(step, "hooked", False) or "step" in vars(optimizer) or is_profiling() or has_step_hooks(optimizer)
    if listening:
        optimizer.step()
    elif memo is None or not fused_step(optimizer, memo):
        step.__wrapped__(optimizer)
