"""The choice of torch's fused optimizer kernels, and the call of an optimizer step."""

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
"""Optimizers with a fused form, and the devices on which it is used."""


def leaves_open(optimizer: Optimizer) -> bool:
    """Whether fnlight may choose the kernels of an optimizer.

    Args:
        optimizer: Any optimizer, as the user made it.

    Returns:
        False if there is no choice, or the user has made it.

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
    """Switch the fused form of a torch optimizer on if its parameters allow it, and off if they do not.

    Args:
        optimizer: An optimizer for which `leaves_open` is True; changed in place.
        module: The module with its parameters.

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
        return False  # torch's fused kernel fails if a parameter gets its first gradient later than others
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(p.is_floating_point() and (type(p) is nn.Parameter or is_sharded(p)) for p in params):
        return False
    devices = {p.device.type for p in params}
    return len(devices) == 1 and devices <= set(_FUSED[type(optimizer)])


def take_step(optimizer: Any, memo: dict[str, Any] | None = None) -> None:
    """Take an optimizer step, without torch's wrapper for profilers and hooks if there are none.

    For a small model, the wrapper costs a tenth of the step, and the lookups of a fused optimizer another fifth.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` whose parameters have gradients.
        memo: A cache for the lookups of a fused optimizer, kept from step to step; None: no cache.

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
