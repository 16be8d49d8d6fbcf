"""Loss scaling for fp16: gradients too small for sixteen bits are computed from a larger loss, and made small again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    init: float = 65536.0,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
    max_consecutive: int = 100,
    min_scale: float = 2.0**-14,
) -> Combinator:
    """Multiply the loss by a scale before it goes backward, and divide the gradients by it, in the semantics of ``torch.amp.GradScaler``.

    A step whose gradients are NaN or infinite is skipped: its batches are consumed, but there is no update, ``progress.step`` and the
    schedule stay, ``progress.skipped`` counts it, and the scale backs off, to `min_scale` at the lowest. After `interval` good steps in a row it
    grows. Skipped steps are counted until the scale grows, so skips that alternate with good steps end the training too. Nothing of a
    skipped step remains: not in buffers, not in the means of the metrics. The metrics gain ``loss_scale`` and ``skipped``.

    Whether a step counts must be known before the next one, so one number a step is waited for, as ``GradScaler.step`` does.

    Args:
        init: The first scale.
        growth: What the scale is multiplied by to grow, above 1.
        backoff: What it is multiplied by to back off, in 0..1.
        interval: Good steps in a row after which it grows.
        max_consecutive: Skipped steps since the scale last grew after which training fails, for then it is not the scale.
        min_scale: The smallest scale, above 0 and at most `init`; a scale of 0 would make every weight NaN.

    Returns:
        A combinator from `GradFn` to `GradFn`; it stands before all others that see gradients, for they must see true ones.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(loss_scale())
        loss_scale

    References:
        Micikevicius et al., "Mixed precision training" (2018).
    """
    given = dict(zip(_DEFAULTS, (init, growth, backoff, interval, max_consecutive, min_scale), strict=True))
    _check(given)

    def wrap(grad_fn: GradFn) -> GradFn:
        def scaled(store: StoreView, batches: Any, key: int) -> Gradients:
            store.host.refuse("loss_scale must know after every step whether it counts, which a graph does not say")
            tree, buffers = store.memory["loss_scale"], buffers_before(store.module, store.memory["loss_scale"]["buffers"])
            used = tree["scale"].clone()
            found, bad, skipped, good = _unscaled(partial(grad_fn, store, batches, key), store, tree, used)
            update_scale_(tree["scale"], tree["good"], bad, growth, scale_backoff_factor=backoff, growth_interval=interval)
            if tree["buffers"] is None:
                tree["buffers"] = buffers.changing()
            metrics = found.metrics
            if skipped:
                buffers.put_back()
                metrics = uncounted(metrics)
                tree["scale"].clamp_(min=min_scale)
                _count(tree, max_consecutive)
            elif good + 1 >= interval:  # the scale has grown
                tree["consecutive"] = 0
            return found._replace(metrics={**metrics, "loss_scale": Last(used), "skipped": Sum(int(skipped))}, finite=not skipped)

        return scaled

    args = ", ".join(f"{name}={value}" for name, value in given.items() if value != _DEFAULTS[name])
    return Combinator(
        "loss_scale", wrap, "grad", "grad", args=args, init=partial(_no_skips, init), start=_check_weights, validate=_misplaced
    )


_DEFAULTS = dict(zip(loss_scale.__annotations__, loss_scale.__defaults__ or (), strict=False))


def _no_skips(scale: float, store: Store) -> dict[str, Any]:
    good = torch.zeros((), dtype=torch.int32, device=store.device)
    return {"scale": torch.full((), scale, dtype=torch.float32, device=store.device), "good": good, "consecutive": 0, "buffers": None}


def _unscaled(
    grad_fn: Callable[[], Gradients], store: StoreView, tree: Mapping[str, Any], used: Tensor
) -> tuple[Gradients, Tensor, bool, int]:
    """True gradients; whether something in them is not finite, on the device and on the host; and the good steps in a row until now."""
    store.step.scale = used
    try:
        found = grad_fn()
    finally:
        store.step.scale = None
    values = local_parts(v for v in found.values if v is not None)
    bad = _anywhere(store, unscale(values, used))
    skipped, scale, good = torch.stack([bad, used, tree["good"]]).tolist()  # the one copy that is waited for
    if not skipped and scale < 1:  # a gradient that was finite may have become infinite when it was divided
        bad = _anywhere(store, unscale(values, torch.ones_like(used)))
        skipped = bool(bad)
    return found, bad, bool(skipped), int(good)


def _anywhere(store: StoreView, bad: Tensor) -> Tensor:
    """Whether something was bad on any rank, so that all of them skip the same steps."""
    return bad if store.place is None else store.place.anywhere(bad)


def unscale(values: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Divide gradients by a scale, in place.

    Args:
        values: Tensors of any shapes, dtypes and devices; sparse ones too.
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
        dense = torch.view_as_real(dense) if dense.is_complex() else dense
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
            f"the gradients of {most} steps were NaN or infinite, and the loss scale, {tree['scale'].item():g} by now, has not grown in between: "
            "it is not the scale; "
            "look into the data, lower the learning rate, or train in bf16, whose range is that of fp32"
        )


def _check_weights(state: TrainState) -> TrainState:
    half = [name for name, p in state.store.named.items() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            f"loss_scale keeps weights in fp32 and only computes in fp16, but {half[:5]} are fp16 themselves; "
            "make the model in fp32, and let autocast(torch.float16) choose what is computed in fp16"
        )
    return state


def _misplaced(combinators: tuple[Combinator, ...]) -> str | None:
    if not any(c.name == "autocast" and c.facts.get("dtype") == torch.float16 for c in combinators):
        return (
            "loss_scale is for fp16, but this step computes in another precision, whose small gradients do not vanish; "
            "put autocast(torch.float16) in front of grad(), or leave loss_scale out"
        )
    own = next(c for c in combinators if c.name == "loss_scale")
    first = next(c for c in combinators if c.takes == c.gives == "grad" and c.name != "microbatch")
    if first.name != "loss_scale":
        return f"{first} stands in front of loss_scale and would see scaled gradients; move loss_scale in front of {first}"
    if any(c.name == "microbatch" for c in combinators[combinators.index(own) :]):
        return "microbatch stands behind loss_scale, which would count every attempt; move microbatch in front of loss_scale"
    return None


def _check(given: Mapping[str, Any]) -> None:
    whole = ("a whole number of at least 1", lambda v: v >= 1 and v == int(v))
    ranges: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "init": ("above 0", lambda v: 0 < v < float("inf")),
        "growth": ("above 1", lambda v: 1 < v < float("inf")),
        "backoff": ("between 0 and 1", lambda v: 0 < v < 1),
        "interval": whole,
        "max_consecutive": whole,
        "min_scale": ("at least 2**-126", lambda v: 2.0**-126 <= v < float("inf")),
    }
    wrong = [
        f"{name} must be {what}, but got {given[name]!r}"
        for name, (what, fine) in ranges.items()
        if not isinstance(given[name], int | float) or isinstance(given[name], bool) or not fine(given[name])
    ]
    if not wrong and given["min_scale"] > given["init"]:
        wrong = [f"min_scale must be at most init={given['init']!r}, but got {given['min_scale']!r}"]
    if wrong:
        raise ConfigError(f"loss_scale: {'; '.join(wrong)}")
