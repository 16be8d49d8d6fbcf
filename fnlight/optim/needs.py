"""The needs of optimizer classes (closure, second-order gradients), and the classes that are not supported."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

_SECOND_ORDER = ("torch_optimizer.Adahessian", "pytorch_optimizer.AdaHessian", "pytorch_optimizer.SophiaH")
_CLOSURES = ("pytorch_optimizer.AliG",)  # need a closure, although their signature does not show it


def is_second_order(optimizer: Any) -> bool:
    """Whether an optimizer differentiates the gradients.

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
    """Whether an optimizer computes the loss itself, so that its step needs a closure.

    Args:
        optimizer: Any optimizer.

    Returns:
        True for LBFGS and all others whose ``step`` requires a closure.

    Example:
        >>> import torch
        >>> wants_closure(torch.optim.LBFGS([torch.ones(1)]))
        True
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    demanded = closure is not None and closure.default is closure.empty
    return demanded or public_name(type(optimizer)) in _CLOSURES


def by_itself(optim: Any) -> bool:
    """Whether an optimizer updates each parameter independently, so that parameters can be updated one by one.

    Args:
        optim: A prepared `Optim`.

    Returns:
        True for the classes of torch.optim except LBFGS; others may share state, such as a step count, between parameters.

    Example:
        >>> import torch
        >>> from fnlight.optim import prepare
        >>> model = torch.nn.Linear(1, 1)
        >>> by_itself(prepare(torch.optim.SGD(model.parameters(), lr=0.1), model))
        True
    """
    return public_name(type(optim.optimizer)).startswith("torch.optim.") and not optim.closure and not optim.create_graph


def public_name(kind: type) -> str:
    """The name of an optimizer class with its package, without the module.

    Args:
        kind: The class.

    Returns:
        A name such as ``"pytorch_optimizer.SOAP"``.

    Example:
        >>> import torch
        >>> public_name(torch.optim.AdamW)
        'torch.optim.AdamW'
    """
    root = "torch.optim" if f"{kind.__module__}.".startswith("torch.optim.") else kind.__module__.partition(".")[0]
    return f"{root}.{kind.__name__}"


_WRAPPER = "wraps another optimizer and hides its state"
UNFIT: Mapping[str, str] = {
    "torch_optimizer.Lookahead": 'wraps another optimizer, and its own state_dict() fails; use fl.optimizer("lookahead", model, base="adamw")',
    "pytorch_optimizer.Lookahead": 'wraps another optimizer; use fl.optimizer("lookahead", model, base="adamw")',
    "pytorch_optimizer.AdaShift": "keeps its state in a queue, which a checkpoint cannot store",
    "pytorch_optimizer.Conda": "keeps its state in objects of its own, which a checkpoint cannot store",
    "pytorch_optimizer.ScalableShampoo": "keeps its state in objects of its own, which a checkpoint cannot store",
    "pytorch_optimizer.Magma": "keeps a part of its state outside of `state`, so it cannot be resumed",
    "pytorch_optimizer.Ranger21": "keeps a part of its state outside of `state`, so it cannot be resumed",
    "pytorch_optimizer.StableSPAM": "keeps a part of its state outside of `state`, so it cannot be resumed",
    "pytorch_optimizer.BSAM": "needs gradients before it computes the loss itself",
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
"""Classes that cannot be trained, copied or resumed, each with the reason; they are refused before any work."""


def why_unfit(optimizer: Any) -> str | None:
    """The reason why an optimizer cannot be copied, saved or resumed.

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
    hidden = [type(held).__name__ for held in vars(optimizer).values() if isinstance(held, Optimizer) and held.state is not optimizer.state]
    return f"wraps another optimizer, {hidden[0]}, and hides its state" if hidden else None
