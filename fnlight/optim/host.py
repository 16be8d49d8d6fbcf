"""An optimizer that works on the host: its memory lies there, and weights and gradients come and go."""

from typing import Any

import torch
from torch import Tensor, nn

from fnlight.optim.kernels import take_step

HOST = torch.device("cpu")
"""Where the memory of an optimizer lies whose step is taken on the host."""


def take_step_on_host(optimizer: Any) -> None:
    """Let an optimizer step on copies of its parameters in the host's memory, and copy the weights back.

    There are no master copies: weights and gradients are copied for the step and the copies freed, so what else changes a weight
    need not know of it, and the numbers are those of the same optimizer on the host.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` that is no wrapper of a closure; its parameters have their gradients.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> take_step_on_host(torch.optim.SGD([weight], lr=0.5)); weight.tolist()
        [0.5]
    """
    groups, state = optimizer.param_groups, optimizer.state
    held = [group["params"] for group in groups]
    twins = {id(p): _on_host(p) for params in held for p in params if p.grad is not None}
    moved = [p for params in held for p in params if id(p) in twins]
    _hand_over(state, moved, [twins[id(p)] for p in moved])
    for group, params in zip(groups, held, strict=True):
        group["params"] = [twins.get(id(p), p) for p in params]
    try:
        take_step(optimizer)
        with torch.no_grad():
            for p in moved:
                p.copy_(twins[id(p)])
    finally:
        for group, params in zip(groups, held, strict=True):
            group["params"] = params
        _hand_over(state, [twins[id(p)] for p in moved], moved)


def _on_host(p: Tensor) -> Tensor:
    twin = nn.Parameter(p.detach().to(HOST, copy=True), requires_grad=p.requires_grad)
    assert p.grad is not None
    twin.grad = p.grad.detach().to(HOST)
    return twin


def _hand_over(state: Any, before: list[Tensor], after: list[Tensor]) -> None:
    """Let memory belong to other parameters."""
    for old, new in zip(before, after, strict=True):
        if old in state:
            state[new] = state.pop(old)
