"""From a loss to gradients: forward, backward, and what a train_step may return."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fnlight.data import Part, num_samples
from fnlight.errors import StepError
from fnlight.gradients.first_look import begin, taken
from fnlight.metrics import Mean, own_metric
from fnlight.pipe import Around, Combinator
from fnlight.protocols import GradFn, Gradients, LossFn, StoreView


def grad() -> Combinator:
    """Turn a `LossFn` into a `GradFn`: seed the generators from the key, run it forward, and go backward.

    Returns:
        A combinator from `LossFn` to `GradFn`; it adds the loss to the metrics under ``loss``.

    Example:
        >>> from fnlight.pipe import pipe
        >>> print(pipe(lambda model, batch: model(batch).sum(), grad()))
        <lambda> > grad
    """

    def wrap(loss_fn: LossFn) -> GradFn:
        def grad_fn(store: StoreView, batch: Any, key: int) -> Gradients:
            store.seed(key)
            fn = loss_fn
            part = None
            while batch.__class__ is Part or batch.__class__ is Around:
                part = batch if batch.__class__ is Part else part
                fn, batch = batch.taken(fn)
            first = store.params[0] if store.params else None
            before = None if first is None else first.grad
            total = fn(store.module, batch) if store.place is None else store.place.loss(store, fn, batch)
            if first is not None and first.grad is not before:  # it would be counted twice
                raise StepError(
                    "train_step must return the loss and leave backward() to fnlight, but has gone backward itself; leave that out, or use fl.manual"
                )
            for p in store.frozen:
                if p.requires_grad:  # its gradient would be neither applied nor cleared
                    raise StepError(_unfrozen(store))
            weight, metrics, counts = 1.0, {}, None
            if total.__class__ is not Tensor or total.dim() or not total.requires_grad:
                counts = _samples_of(total, part)
                total, weight, metrics = _read(total, store)
            look, scale = taken(store), store.step.scale
            outside = look.outside(total, store) if look is not None and store.params else ()
            values, loss = _backward(total if scale is None else total * scale, store), total.detach()
            found = Gradients(values, loss, weight, metrics)
            metrics["loss"] = loss if found.plain else Mean(loss, weight, None if counts is None else (loss * counts, weight * counts))
            if look is not None and store.params:
                look.check(fn, store, values, outside)
            return found

        return grad_fn

    return Combinator("grad", wrap, "loss", "grad_sum", start=begin)


def _backward(loss: Tensor, store: StoreView) -> list[Tensor | None]:
    """The gradients of the trained parameters."""
    if store.params and store.optim.create_graph:
        made = torch.autograd.grad(loss, store.params, create_graph=True, allow_unused=True)  # .grad with a graph would leak
        return [None if v is None else v.clone() for v in made]  # no views: optimizers detach them in place
    if store.params:
        loss.backward()
    return [p.grad for p in store.params]


def _samples_of(out: Any, part: Part | None) -> float | None:
    """The factor from a plain loss of a part, weighted by its share, to its metric, weighted by its samples; None for other losses."""
    if part is None:
        return None
    if not part.share:
        return 0.0  # a dummy batch has no samples
    loss = out[0] if out.__class__ is tuple and out else out
    plain = loss.__class__ is Mean and loss.weight is part.share  # the number that Part has put there
    return num_samples(part.batch) / part.share if plain else None


def weight_of(loss: Mean) -> Any:
    """What the gradients of such a loss are divided by; a float becomes a tensor, for a float says that losses are plain (`Gradients.plain`).

    Args:
        loss: What a train_step returned.

    Returns:
        An integer, or a scalar tensor, shape [].

    Example:
        >>> weight_of(Mean(torch.tensor(3.0), 1.0)), weight_of(Mean(torch.tensor(3.0), 2))
        (tensor(1.), 2)
    """
    return torch.tensor(loss.weight) if type(loss.weight) is float else loss.weight


def _read(out: Any, store: StoreView) -> tuple[Tensor, Any, dict[str, Any]]:
    """Take apart what a train_step returned: loss, weight, and metrics in the order in which they are reported."""
    metrics: dict[str, Any] = {"loss": None}
    if out.__class__ is tuple:
        out = _read_metrics(out, metrics)
    weight: Any = 1.0
    if out.__class__ is Mean:
        out, weight = out.total, weight_of(out)
        if isinstance(weight, Tensor) and (weight.requires_grad or weight.dim()):
            raise StepError(_bad_weight(weight))
    if not isinstance(out, Tensor) or out.dim() or (store.params and not out.requires_grad):
        raise StepError(_bad_loss(out))
    return out, weight, metrics


def _read_metrics(out: Any, metrics: dict[str, Any]) -> Any:
    if len(out) != 2 or not isinstance(out[1], Mapping):
        kinds = ", ".join(type(part).__name__ for part in out)
        raise StepError(f"train_step must return loss or (loss, metrics) with metrics a dict, but returned a tuple of {kinds}")
    found: Any = out[1]
    if "loss" in found:
        raise StepError(
            "train_step returned a metric called 'loss', which is the name of the loss itself; call it something else or leave it out"
        )
    for name, value in found.items():
        metrics[name] = own_metric(name, value)
    return out[0]


def _bad_weight(weight: Tensor) -> str:
    if weight.dim():
        return f"the weight of a loss Mean(total, weight) must be one number, but its shape is {list(weight.shape)}; reduce it, e.g. with .sum()"
    return (
        "the weight of a loss Mean(total, weight) must not depend on the parameters: gradients are divided by it as by a number; write "
        "weight.detach() if that is meant, or return total / weight as a plain loss"
    )


def _unfrozen(store: StoreView) -> str:
    """Say which parameters a step has unfrozen."""
    frozen = {id(p) for p in store.frozen}
    names = [name for name, p in store.module.named_parameters() if id(p) in frozen and p.requires_grad]
    return (
        f"train_step has set requires_grad=True on {', '.join(names[:5])}, which did not require gradients when the state was made; let them require "
        "gradients from the start, and say when they train with the combinator fl.unfreeze_at({name: epoch})"
    )


def _bad_loss(out: Any) -> str:
    if out is None:
        return "train_step returned no loss: it must return a scalar tensor, fl.Mean(total, weight), or (loss, metrics); is a `return` missing?"
    if isinstance(out, Mapping):
        return f"train_step must return loss or (loss, metrics) with metrics a dict, but returned a dict of {list(out)}; return the loss beside it"
    if not isinstance(out, Tensor):
        return f"train_step must return a scalar tensor as the loss, but returned {type(out).__name__}: {out!r:.60}; do not call .item() or float()"
    if out.dim():
        return f"train_step must return a scalar loss of shape [], but its shape is {list(out.shape)}; reduce it, e.g. with .mean()"
    if not out.is_floating_point():
        return f"train_step must return a loss of real floating-point numbers, but its dtype is {out.dtype}; convert it, e.g. with .float() or .abs()"
    return "train_step returned a loss without a graph: no gradient can flow from it; is something detached, under no_grad, or is all of it frozen?"
