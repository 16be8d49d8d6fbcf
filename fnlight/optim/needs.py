"""What a class of optimizers needs of a step, and which classes do not fit."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

_SECOND_ORDER = ("torch_optimizer.Adahessian", "pytorch_optimizer.AdaHessian", "pytorch_optimizer.SophiaH")
_CLOSURES = ("pytorch_optimizer.AliG",)  # those that a signature does not give away


def is_second_order(optimizer: Any) -> bool:
    """Say whether an optimizer differentiates the gradients once more.

    Args:
        optimizer: Any optimizer.

    Returns:
        True for the Hessian-based classes of torch_optimizer and pytorch_optimizer.

    Example:
        >>> import torch
        >>> is_second_order(torch.optim.SGD([torch.ones(1)], lr=0.1))
        False
    """
    return public_name(type(optimizer)) in _SECOND_ORDER


def wants_closure(optimizer: Any) -> bool:
    """Say whether an optimizer computes the loss itself: its step cannot be called without a closure.

    Args:
        optimizer: Any optimizer.

    Returns:
        True for LBFGS and whatever else demands a closure.

    Example:
        >>> import torch
        >>> wants_closure(torch.optim.LBFGS([torch.ones(1)]))
        True
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    demanded = closure is not None and closure.default is closure.empty
    return demanded or public_name(type(optimizer)) in _CLOSURES


def by_itself(optim: Any) -> bool:
    """Say whether an optimizer treats each parameter by itself: updating them one by one is updating them all.

    Args:
        optim: A prepared `Optim`.

    Returns:
        True for the classes of torch.optim but LBFGS; others may keep what parameters share, such as a count, in their groups.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> model = torch.nn.Linear(1, 1)
        >>> by_itself(prepare(torch.optim.SGD(model.parameters(), lr=0.1), model))
        True
    """
    return public_name(type(optim.optimizer)).startswith("torch.optim.") and not optim.closure and not optim.create_graph


def public_name(kind: type) -> str:
    """The name of a class of optimizers, without the module inside its package.

    Args:
        kind: The class.

    Returns:
        Such as ``"pytorch_optimizer.SOAP"``.

    Example:
        >>> import torch
        >>> public_name(torch.optim.AdamW)
        'torch.optim.AdamW'
    """
    root = "torch.optim" if f"{kind.__module__}.".startswith("torch.optim.") else kind.__module__.partition(".")[0]
    return f"{root}.{kind.__name__}"


_WRAPPER = "wraps another optimizer, whose memory it keeps apart"
UNFIT: Mapping[str, str] = {
    "torch_optimizer.Lookahead": 'wraps another optimizer, and its own state_dict() fails; take fl.optimizer("lookahead", model, base="adamw")',
    "pytorch_optimizer.Lookahead": 'wraps another optimizer; take fl.optimizer("lookahead", model, base="adamw")',
    "pytorch_optimizer.AdaShift": "keeps a queue as its memory, which is no data for a checkpoint",
    "pytorch_optimizer.Conda": "keeps objects of its own as its memory, which are no data for a checkpoint",
    "pytorch_optimizer.ScalableShampoo": "keeps objects of its own as its memory, which are no data for a checkpoint",
    "pytorch_optimizer.Magma": "keeps a part of its memory outside of its state, so it cannot be resumed",
    "pytorch_optimizer.Ranger21": "keeps a part of its memory outside of its state, so it cannot be resumed",
    "pytorch_optimizer.StableSPAM": "keeps a part of its memory outside of its state, so it cannot be resumed",
    "pytorch_optimizer.BSAM": "wants gradients to be there before it computes the loss itself",
    "pytorch_optimizer.LOMO": "updates the weights during the backward pass and has no step",
    "pytorch_optimizer.AdaLOMO": "updates the weights during the backward pass and has no step",
    "pytorch_optimizer.DeMo": "is for several processes, and exchanges gradients itself",
    "pytorch_optimizer.DistributedMuon": "is for several processes, and exchanges gradients itself",
    "pytorch_optimizer.SafeFP16Optimizer": _WRAPPER,
    "pytorch_optimizer.ScheduleFreeWrapper": _WRAPPER,
    "pytorch_optimizer.TRAC": _WRAPPER,
    "pytorch_optimizer.OrthoGrad": _WRAPPER,
    "pytorch_optimizer.PCGrad": _WRAPPER,
    "pytorch_optimizer.SAM": _WRAPPER,
    "pytorch_optimizer.GSAM": _WRAPPER,
    "pytorch_optimizer.WSAM": _WRAPPER,
    "pytorch_optimizer.LookSAM": _WRAPPER,
    "pytorch_optimizer.FriendlySAM": _WRAPPER,
}
"""Classes that cannot train, be copied or be resumed as values, each with the reason; they are refused before any work."""


def why_unfit(optimizer: Any) -> str | None:
    """Say why an optimizer could not be copied, saved and resumed, if it could not.

    Args:
        optimizer: Any optimizer.

    Returns:
        The reason, or None.

    Example:
        >>> import torch
        >>> why_unfit(torch.optim.SGD([torch.ones(1)], lr=0.1)) is None
        True
    """
    known = UNFIT.get(public_name(type(optimizer)))
    if known is not None:
        return known
    apart = [type(held).__name__ for held in vars(optimizer).values() if isinstance(held, Optimizer) and held.state is not optimizer.state]
    return f"wraps another optimizer, {apart[0]}, whose memory it keeps apart" if apart else None
