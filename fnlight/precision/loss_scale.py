"""Loss scaling for fp16: the loss is multiplied by a scale so that small gradients do not become 0, and the gradients are divided by it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError, NonFiniteError
from fnlight.metrics import Last, Sum, uncounted
from fnlight.optim import buffers_before
from fnlight.pipe import Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.state import Store, TrainState
from fnlight.tensors import local_parts, stored_values, unscale_, update_scale_


def loss_scale(
    init: float = 65536.0, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000, max_consecutive: int = 100
) -> Combinator:
    """Multiply the loss by a scale before the backward pass and divide the gradients by it, as ``torch.amp.GradScaler`` does.

    A step whose gradients are NaN or infinite is skipped: its batches are used up, but there is no update. ``progress.step`` and the
    learning rate schedule do not advance, ``progress.skipped`` counts the step, and the scale is reduced. After `interval` good steps the
    scale grows. A skipped step changes neither buffers nor the means of metrics. There are two more metrics: ``loss_scale``, ``skipped``.

    The host must know before the next step whether this one was skipped, so it waits for one number per step, as ``GradScaler.step`` does.

    Args:
        init: The first scale.
        growth: The multiplier of the scale when it grows, above 1.
        backoff: The multiplier of the scale after a skipped step, in 0..1.
        interval: Number of good steps in a row after which the scale grows.
        max_consecutive: Number of skipped steps in a row after which an error is raised, because the scale is not the cause then.

    Returns:
        A combinator from `GradFn` to `GradFn`. Place it before all others that use gradients, so that they get unscaled ones.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(loss_scale())
        loss_scale

    References:
        Micikevicius et al., "Mixed precision training" (2018).
    """
    _check(init, growth, backoff, interval=interval, max_consecutive=max_consecutive)

    def init_tree(store: Store) -> dict[str, Any]:
        scale = torch.full((), init, dtype=torch.float32, device=store.device)
        return {"scale": scale, "good": torch.zeros((), dtype=torch.int32, device=store.device), "consecutive": 0, "buffers": None}

    def wrap(grad_fn: GradFn) -> GradFn:
        def scaled(store: StoreView, batches: Any, key: int) -> Gradients:
            store.host.refuse("loss_scale must read after every step whether it was skipped, which a graph cannot do")
            tree, buffers = store.memory["loss_scale"], buffers_before(store.module, store.memory["loss_scale"]["buffers"])
            used = tree["scale"].clone()
            store.step.scale = used
            try:
                found = grad_fn(store, batches, key)
            finally:
                store.step.scale = None
            bad = unscale(local_parts(v for v in found.values if v is not None), used)
            if store.place is not None:
                bad = store.place.anywhere(bad)
            update_scale_(tree["scale"], tree["good"], bad, growth, scale_backoff_factor=backoff, growth_interval=interval)
            if tree["buffers"] is None:
                tree["buffers"] = buffers.changing()
            skipped = bool(bad)
            metrics = found.metrics
            if skipped:
                buffers.put_back()
                metrics = uncounted(metrics)
                _count(tree, max_consecutive)
            else:
                tree["consecutive"] = 0
            return found._replace(metrics={**metrics, "loss_scale": Last(used), "skipped": Sum(int(skipped))}, finite=not skipped)

        return scaled

    given = {"init": init, "growth": growth, "backoff": backoff, "interval": interval, "max_consecutive": max_consecutive}
    args = ", ".join(f"{name}={value}" for name, value in given.items() if value != _DEFAULTS[name])
    return Combinator("loss_scale", wrap, "grad", "grad", args=args, init=init_tree, start=_check_weights, validate=_misplaced)


_DEFAULTS = dict(zip(loss_scale.__annotations__, loss_scale.__defaults__ or (), strict=False))


def unscale(values: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Divide gradients by a scale, in place.

    Args:
        values: Tensors of any shape, dtype and device, dense or sparse.
        scale: A scalar tensor, shape [].

    Returns:
        A scalar tensor, shape []: 1.0 if any entry is NaN or infinite, else 0.0.

    Example:
        >>> values = [torch.tensor([2.0, 4.0]), torch.tensor([float("inf")])]
        >>> unscale(values, torch.tensor(2.0)).item(), values[0].tolist()
        (1.0, [1.0, 2.0])
    """
    inverse = scale.double().reciprocal().float()
    bad = torch.zeros_like(scale)
    groups: dict[Any, list[Tensor]] = {}
    for value in values:
        dense = stored_values(value) if value.is_sparse else value
        groups.setdefault((dense.device, dense.dtype), []).append(dense)
    for (device, _), group in groups.items():
        if device == scale.device:
            unscale_(group, bad, inverse)
        else:
            there = torch.zeros_like(bad, device=device)
            unscale_(group, there, inverse.to(device))
            bad = torch.maximum(bad, there.to(bad.device))
    return bad


def _count(tree: dict[str, Any], most: int) -> None:
    tree["consecutive"] += 1
    if tree["consecutive"] >= most:
        raise NonFiniteError(
            f"the gradients of {most} steps in a row were NaN or infinite, at a loss scale of {tree['scale'].item():g} by now, so the scale is not the cause; "
            "check the data, lower the learning rate, or train in bf16, whose range is that of fp32"
        )


def _check_weights(state: TrainState) -> TrainState:
    half = [name for name, p in state.store.named.items() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            f"loss_scale keeps weights in fp32 and only computes in fp16, but {half[:5]} are in fp16; "
            "create the model in fp32: autocast(torch.float16) chooses the operations that run in fp16"
        )
    return state


def _misplaced(combinators: tuple[Combinator, ...]) -> str | None:
    if not any(c.name == "autocast" and c.facts.get("dtype") == torch.float16 for c in combinators):
        return (
            "loss_scale is for fp16, but this step computes in another precision, in which small gradients do not become 0; "
            "put autocast(torch.float16) before grad(), or leave loss_scale out"
        )
    own = next(c for c in combinators if c.name == "loss_scale")
    first = next(c for c in combinators if c.takes == c.gives == "grad" and c.name != "microbatch")
    if first.name != "loss_scale":
        return f"{first} comes before loss_scale and would get scaled gradients; move loss_scale before {first}"
    if any(c.name == "microbatch" for c in combinators[combinators.index(own) :]):
        return "microbatch comes after loss_scale, which would count every attempt; move microbatch before loss_scale"
    return None


def _check(init: Any, growth: Any, backoff: Any, interval: Any, max_consecutive: Any) -> None:
    wrong = [
        f"{name} must be {what}, but got {value!r}"
        for name, value, what, fine in (
            ("init", init, "above 0", lambda v: 0 < v < float("inf")),
            ("growth", growth, "above 1", lambda v: 1 < v < float("inf")),
            ("backoff", backoff, "between 0 and 1", lambda v: 0 < v < 1),
            ("interval", interval, "a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
            ("max_consecutive", max_consecutive, "a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
        )
        if not isinstance(value, int | float) or isinstance(value, bool) or not fine(value)
    ]
    if wrong:
        raise ConfigError(f"loss_scale: {'; '.join(wrong)}")
