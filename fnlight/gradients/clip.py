"""Gradients kept within bounds: combinators between `accumulate` and `apply`, by foreach kernels."""

import math
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError, StepError, check_type
from fnlight.pipe import Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.state import Store
from fnlight.tensors import (
    entries,
    foreach_clamp_max_,
    foreach_clamp_min_,
    foreach_div_,
    foreach_mul_,
    foreach_norm,
    listed,
    local_parts,
    sparse_names,
)


def clip_norm(max_norm: float) -> Combinator:
    """Scale the gradients down so that their joint 2-norm is at most `max_norm`; the norm before is the metric ``grad_norm``.

    Args:
        max_norm: The largest norm let through.

    Returns:
        A combinator from `GradFn` to `GradFn`; it sees true gradients, after accumulation.

    Raises:
        ConfigError: If the norm is not above 0.

    Example:
        >>> print(clip_norm(1.0))
        clip_norm(1.0)

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    _positive("clip_norm", max_norm)

    def wrap(grad_fn: GradFn) -> GradFn:
        def clipped(store: StoreView, batches: Any, key: int) -> Gradients:
            found = grad_fn(store, batches, key)
            values, held = entries(found.values)
            norm = _joint_norm(store, held)
            if held:
                foreach_mul_(local_parts(held), torch.clamp(max_norm / (norm + 1e-6), max=1.0))
            found.metrics["grad_norm"] = norm
            return found._replace(values=values)

        return clipped

    return Combinator("clip_norm", wrap, "grad", "grad", args=str(max_norm))


def clip_value(max_value: float) -> Combinator:
    """Clamp every entry of the gradients to between ``-max_value`` and ``max_value``.

    Args:
        max_value: The largest absolute value let through.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If the value is not above 0.

    Example:
        >>> print(clip_value(0.5))
        clip_value(0.5)
    """
    _positive("clip_value", max_value)

    def wrap(grad_fn: GradFn) -> GradFn:
        def clipped(store: StoreView, batches: Any, key: int) -> Gradients:
            found = grad_fn(store, batches, key)
            values, held = entries(found.values)
            if held:
                held = local_parts(held)
                foreach_clamp_min_(held, -max_value)
                foreach_clamp_max_(held, max_value)
            return found._replace(values=values)

        return clipped

    return Combinator("clip_value", wrap, "grad", "grad", args=str(max_value))


def _joint_norm(store: StoreView, held: list[Tensor]) -> Tensor:
    if not held and store.place is None:
        return torch.zeros((), device=store.device)  # torch's own would be on the CPU
    return torch.nn.utils.get_total_norm(held) if store.place is None else store.place.norm(held)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0 or math.isinf(value):
        raise ConfigError(f"{name} must be a finite number above 0, but got {value!r}; leave it out to switch it off")


def clip_each(max_norm: float) -> Combinator:
    """Scale each parameter's gradient down so that its own 2-norm is at most `max_norm`.

    Args:
        max_norm: The largest norm of one gradient that is let through.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If the norm is not above 0.

    Example:
        >>> print(clip_each(1.0))
        clip_each(1.0)
    """
    _positive("clip_each", max_norm)

    def clip(store: StoreView, values: Sequence[Tensor | None]) -> None:
        _, held = entries(values)
        if held:
            norms = _norms(held) if store.place is None else [store.place.norms(held)]
            for norm in norms:
                norm.add_(1e-6).reciprocal_().mul_(max_norm).clamp_(max=1.0)
            factors = norms[0].unbind() if norms[0].dim() else norms
            foreach_mul_(local_parts(held), factors)

    return Combinator("clip_each", _changed(clip), "grad", "grad", args=str(max_norm))


def _norms(held: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor; in one tensor, shape [tensors], where they are of one kind: few large kernels instead of many small ones."""
    norms = foreach_norm(held)
    return [torch.stack(list(norms))] if len({(n.device, n.dtype) for n in norms}) == 1 else list(norms)


def clip_adaptive(clipping: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> Combinator:
    """Scale the gradient of each unit down to a fraction of the norm of the unit's weights (AGC).

    A unit is a row of a matrix or an output channel of a convolution; a vector is one unit.

    Args:
        clipping: The largest ratio of the gradient's norm to the weights' norm.
        eps: The least norm of weights that is assumed, so that zeros can grow.
        exclude: Patterns of parameter names that are left alone, such as ``"head.*"``; the paper leaves out the last layer.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If a number is not above 0.

    Example:
        >>> print(clip_adaptive(0.02, exclude=["head.*"]))
        clip_adaptive(0.02, exclude=['head.*'])

    References:
        Brock, De, Smith and Simonyan, "High-performance large-scale image recognition without normalization" (2021).
    """
    _positive("clip_adaptive", clipping)
    _positive("clip_adaptive(eps=...)", eps)
    check_type("clip_adaptive(exclude=...)", exclude, Collection, "a list of patterns")
    if isinstance(exclude, str):
        raise ConfigError(f"clip_adaptive(exclude=...) must be a list of patterns, but got the string {exclude!r}; write [{exclude!r}]")

    def clip(store: StoreView, values: Sequence[Tensor | None]) -> None:
        names = [name for name, p in store.named.items() if p.requires_grad]
        sparse = sparse_names(names, values)
        if sparse:
            raise StepError(
                f"clip_adaptive compares the rows of a gradient with those of the weights, but the gradients of {listed(sparse)} are sparse; "
                "leave sparse=True out, or clip with clip_norm or clip_each"
            )
        both = [
            (p.detach(), v)
            for name, p, v in zip(names, store.params, values, strict=True)
            if v is not None and not any(fnmatchcase(name, pattern) for pattern in exclude)
        ]
        if not both:
            return
        unit_norms = _unit_norms if store.place is None else store.place.unit_norms
        weights, held = [unit_norms(p) for p, _ in both], local_parts([v for _, v in both])
        norms = [unit_norms(v) for _, v in both]
        foreach_clamp_min_(weights, eps)
        foreach_mul_(weights, clipping)
        foreach_clamp_min_(norms, 1e-6)
        foreach_div_(weights, norms)
        foreach_clamp_max_(weights, 1.0)
        foreach_mul_(held, weights)

    label = f"{clipping}" + (f", eps={eps}" if eps != 1e-3 else "") + (f", exclude={list(exclude)}" if exclude else "")
    return Combinator("clip_adaptive", _changed(clip), "grad", "grad", args=label)


def _unit_norms(tensor: Tensor) -> Tensor:
    """The 2-norm of each unit, in a shape that multiplies the tensor."""
    if tensor.dim() <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)


def clip_quantile(quantile: float = 0.1, window: int = 1000) -> Combinator:
    """Clip the joint norm at a quantile of the norms so far (AutoClip); the norm before is the metric ``grad_norm``.

    Args:
        quantile: Which share of the norms lies below the limit, in 0..1.
        window: How many of the last norms are kept; norms that are NaN or infinite are not.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(clip_quantile(0.1))
        clip_quantile(0.1, window=1000)

    References:
        Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: adaptive gradient clipping for source separation networks" (2020).
    """
    if not isinstance(quantile, int | float) or isinstance(quantile, bool) or not 0 <= quantile <= 1:
        raise ConfigError(f"clip_quantile must be a quantile in 0..1, but got {quantile!r}")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ConfigError(f"clip_quantile(window=...) must be a whole number of at least 1, but got {window!r}")

    def init(store: Store) -> dict[str, Any]:
        seen = torch.zeros(1, dtype=torch.int64, device=store.device)
        return {"norms": torch.full((window,), torch.nan, device=store.device), "seen": seen}

    def wrap(grad_fn: GradFn) -> GradFn:
        def clipped(store: StoreView, batches: Any, key: int) -> Gradients:
            found = grad_fn(store, batches, key)
            (values, held), tree = entries(found.values), store.memory["clip_quantile"]
            norm = _joint_norm(store, held)
            if isinstance(tree["seen"], int):  # of a state that was saved when the count was a number
                tree["seen"] = torch.tensor([tree["seen"]], device=store.device)
            tree["norms"].scatter_(0, tree["seen"] % window, torch.where(torch.isfinite(norm), norm, torch.nan)[None])
            tree["seen"] += 1
            limit = torch.nanquantile(tree["norms"], quantile)
            if held:
                ratio = torch.clamp(limit / (norm + 1e-6), max=1.0).masked_fill_(torch.isnan(limit), 1.0)
                foreach_mul_(local_parts(held), ratio)
            found.metrics["grad_norm"] = norm
            return found._replace(values=values)

        return clipped

    return Combinator("clip_quantile", wrap, "grad", "grad", args=f"{quantile}, window={window}", init=init)


def _changed(change: Callable[[StoreView, Sequence[Tensor | None]], None]) -> Callable[[GradFn], GradFn]:
    """What wraps a `GradFn` into one whose gradients are changed in place."""

    def wrap(grad_fn: GradFn) -> GradFn:
        def changed(store: StoreView, batches: Any, key: int) -> Gradients:
            found = grad_fn(store, batches, key)
            found = found._replace(values=entries(found.values)[0])
            change(store, found.values)
            return found

        return changed

    return wrap
