"""Optimizer offload: the optimizer state and the step are on the host; weights and gradients are copied."""

from typing import Any

import torch
from torch import Tensor, nn

from fnlight.optim.kernels import take_step

HOST = torch.device("cpu")
"""The device of the optimizer state when the step is taken on the host."""


def take_step_on_host(optimizer: Any) -> None:
    """Take an optimizer step on copies of the parameters in host memory, and copy the weights back.

    There are no master copies: weights and gradients are copied for the step, and the copies are freed after it. So other code may change
    the weights between steps. The result equals that of the same optimizer on the host.

    Args:
        optimizer: Any ``torch.optim.Optimizer`` that needs no closure; its parameters have gradients.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> take_step_on_host(torch.optim.SGD([weight], lr=0.5)); weight.tolist()
        [0.5]
    """
    groups, state = optimizer.param_groups, optimizer.state
    held = [group["params"] for group in groups]
    copies = {id(p): _on_host(p) for params in held for p in params if p.grad is not None}
    moved = [p for params in held for p in params if id(p) in copies]
    _hand_over(state, moved, [copies[id(p)] for p in moved])
    for group, params in zip(groups, held, strict=True):
        group["params"] = [copies.get(id(p), p) for p in params]
    try:
        take_step(optimizer)
        with torch.no_grad():
            for p in moved:
                p.copy_(copies[id(p)])
    finally:
        for group, params in zip(groups, held, strict=True):
            group["params"] = params
        _hand_over(state, [copies[id(p)] for p in moved], moved)


def _on_host(p: Tensor) -> Tensor:
    copy = nn.Parameter(p.detach().to(HOST, copy=True), requires_grad=p.requires_grad)
    assert p.grad is not None
    copy.grad = p.grad.detach().to(HOST)
    return copy


def _hand_over(state: Any, before: list[Tensor], after: list[Tensor]) -> None:
    """Move optimizer state from one list of parameters to another."""
    for old, new in zip(before, after, strict=True):
        if old in state:
            state[new] = state.pop(old)
