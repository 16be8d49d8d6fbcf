"""Optimizers rewritten without host syncs: those of torch whose every form reads the value of a tensor in Python."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Optimizer

from fnlight.compile.shadow import UnsettledError


def twin_of(optimizer: Optimizer) -> Callable[[Any], None] | None:
    """Return a rewritten step of an optimizer that reads no tensor values in Python, if its own step does.

    Args:
        optimizer: Any optimizer.

    Returns:
        A function of an optimizer whose state exists and whose learning rates are tensors; None if its own step can be traced.

    Example:
        >>> twin_of(Adafactor([torch.zeros(2)])).__name__, twin_of(torch.optim.SGD([torch.zeros(2)]))
        ('adafactor', None)
    """
    return adafactor if type(optimizer) is Adafactor else None


@torch.no_grad()
def adafactor(optimizer: Any) -> None:
    """One step of ``torch.optim.Adafactor``.

    Args:
        optimizer: Its groups, state and gradients; the learning rates are tensors.

    Raises:
        UnsettledError: If a parameter with a gradient has no optimizer state yet.

    Example:
        >>> p = torch.ones(2, 3, requires_grad=True)
        >>> optimizer = Adafactor([p], lr=torch.tensor(0.1))
        >>> optimizer.state[p] = {"step": torch.zeros(()), "row_var": torch.zeros(2, 1), "col_var": torch.zeros(1, 3)}
        >>> p.grad = torch.ones(2, 3)
        >>> adafactor(optimizer)
        >>> p[0, 0].item()
        0.8999999761581421

    References:
        Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost" (2018), algorithms 4 and 5.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                if not optimizer.state[p]:
                    raise UnsettledError("Adafactor creates its state in this step")
                _adafactor_one(p, -p.grad if group["maximize"] else p.grad, optimizer.state[p], group)


def _adafactor_one(p: Tensor, grad: Tensor, slots: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    lr, (least, floor), size = group["lr"].to(p), group["eps"], math.sqrt(p.numel())
    eps = torch.finfo(p.dtype).eps if least is None else least
    step = slots["step"].add_(1)
    rate = torch.minimum(lr, step.rsqrt().to(p)) * (p.norm() / size).clamp(min=floor)
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    estimate = _second_moment(grad, slots, (step ** group["beta2_decay"]).to(p), eps)
    update = estimate.clamp(min=eps * eps).rsqrt() * grad
    p.sub_(update * (rate / (update.norm() / (size * group["d"])).clamp(min=1.0)))


def _second_moment(grad: Tensor, slots: Mapping[str, Tensor], weight: Tensor, eps: float) -> Tensor:
    """The second moment: of a vector itself; of other tensors the product of means over rows and columns."""
    if grad.dim() < 2:
        return slots["variance"].lerp_(grad * grad, weight)
    row, col = slots["row_var"], slots["col_var"]
    row.lerp_((grad * grad).mean(-1, keepdim=True), weight)
    col.lerp_((grad * grad).mean(-2, keepdim=True), weight)
    return (row @ col) / row.mean(-2, keepdim=True).clamp(min=eps)
