"""Losses of several parts: named ones with weights, those over a whole group of batches, and those that carry something along."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fnlight.data import Part
from fnlight.errors import ConfigError, ParallelError, StepError, check_type
from fnlight.metrics import Mean
from fnlight.pipe import Around, Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.state import Store
from fnlight.tensors import fold_in, leaves, map_tensors

Weight = float | Callable[[int], float]


def weighted(weights: Mapping[str, Weight]) -> Combinator:
    """Let `train_step` return several losses by name; their weighted sum is trained on, and each is logged under its name.

    `train_step` returns ``losses`` or ``(losses, metrics)``, where ``losses`` is a dict of scalars, or of `Mean`s with one weight in common.

    Args:
        weights: The weight of each loss: a number, or a function of completed steps.

    Returns:
        A combinator of gradients of a batch; it stands directly behind `grad`.

    Raises:
        ConfigError: If there is no loss, or a weight is neither.
        StepError: In a step, if `train_step` returns other names.

    Example:
        >>> print(weighted({"reconstruction": 1.0, "kl": 0.1}))
        weighted(reconstruction=1.0, kl=0.1)
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weighted takes weights by name, as in {{'reconstruction': 1.0}}, but got {weights!r}")
    for name, weight in weights.items():
        if not callable(weight) and (not isinstance(weight, int | float) or isinstance(weight, bool)):
            raise ConfigError(f"the weight of {name!r} must be a number or a function of completed steps, but got {weight!r}")
    if "loss" in weights:
        raise ConfigError("weighted calls a loss 'loss', which is the name of their sum; call it something else")

    def wrap(grad_fn: GradFn) -> GradFn:
        def weighing(store: StoreView, batch: Any, key: int) -> Gradients:
            now = {name: store.host.number(store, _at_step(weight)) if callable(weight) else weight for name, weight in weights.items()}
            return grad_fn(store, Around(batch, lambda loss_fn: _summed(loss_fn, now)), key)

        return weighing

    label = ", ".join(f"{name}={weight!r}" for name, weight in weights.items())
    return Combinator("weighted", wrap, "grad_sum", "grad_sum", args=label)


def _at_step(weight: Callable[[int], float]) -> Callable[[Store], float]:
    return lambda store: weight(store.step.progress.step)


def _summed(loss_fn: Any, weights: Mapping[str, float]) -> Any:
    def summed(model: Any, batch: Any) -> Any:
        out = loss_fn(model, batch)
        losses, metrics, *rest = out if isinstance(out, tuple) and not isinstance(out, Mean) else (out, {})
        if not isinstance(losses, Mapping) or losses.keys() != weights.keys():
            got = sorted(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise StepError(f"weighted expects a dict of the losses {sorted(weights)} from train_step, but got {got}")
        return (_sum(losses, weights), {**losses, **metrics}, *rest)

    return summed


def _sum(losses: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    means = [value for value in losses.values() if isinstance(value, Mean)]
    if not means:
        return sum(weights[name] * value for name, value in losses.items())
    common = means[0].weight
    if len(means) < len(losses) or any(m.weight is not common and not _same_number(m.weight, common) for m in means):
        raise StepError(
            f"weighted adds losses {sorted(losses)} of which some are fl.Mean and some are not, or which have other weights; give all of them one "
            "and the same weight, as in fl.Mean(a, n), fl.Mean(b, n)"
        )
    return Mean(sum(weights[name] * value.total for name, value in losses.items()), common)


def _same_number(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


_ONE_PROCESS = (
    "grad_cache takes the loss of all samples of a step at once, but here each rank holds a part of them, and its loss would be another one; "
    "train in one process, or give a train_step that gathers the embeddings itself"
)


def grad_cache(loss_fn: Callable[[Any], Any], n: int) -> Combinator:
    """Train on a loss over the samples of n batches at once, such as a contrastive one, with the memory of a single batch.

    In the place of a `train_step` stands ``embed(model, batch)``, which gives a tensor of shape [samples, ...], or a tree of such. All batches are
    embedded without a graph; the loss of all embeddings gives their gradients; and each batch is embedded once more, with the random
    numbers of the first time, to take them through the model. The result is the gradient of the n batches as one. What couples the samples
    of a batch within the model, as BatchNorm does, sees those of its own batch.

    Args:
        loss_fn: Maps the embeddings of all batches, joined along the first dimension, to ``loss`` or ``(loss, metrics)``.
        n: Batches a step.

    Returns:
        A combinator from ``embed`` to `GradFn` (of a group); it stands in the place of `grad` and `accumulate`.

    Raises:
        ConfigError: If n is below 1.
        StepError: In a step, if the loss is no scalar with a graph.

    Example:
        >>> print(grad_cache(lambda found: found.square().mean(), 4))
        grad_cache(<lambda>, 4)

    References:
        Gao et al., "Scaling deep contrastive learning batch size under memory limited setup" (2021).
    """
    check_type("grad_cache(loss_fn, n)", loss_fn, Callable, "a function of the embeddings of all batches")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"grad_cache(loss_fn, n) takes a number of batches of at least 1, but got {n!r}")

    def wrap(embed: Any) -> GradFn:
        def cached(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
            if store.place is not None:
                raise ParallelError(_ONE_PROCESS)
            keys = [fold_in(key, i) for i in range(len(batches))]
            parts = _embedded(embed, store, batches, keys)
            joined = [torch.cat(group).requires_grad_() for group in zip(*map(_tensors, parts), strict=True)]
            fill = iter(joined)
            store.seed(fold_in(key, len(batches)))
            loss, metrics = _scalar(loss_fn(map_tensors(lambda _: next(fill), parts[0])))
            scaled = loss if store.step.scale is None else loss * store.step.scale
            pulls = torch.autograd.grad(scaled, joined, allow_unused=True)
            cut = [None if pull is None else pull.split([len(_tensors(p)[i]) for p in parts]) for i, pull in enumerate(pulls)]
            for i, (batch, each) in enumerate(zip(batches, keys, strict=True)):
                store.seed(each)
                found = _tensors(embed(store.module, batch))
                pairs = [(t, c[i]) for t, c in zip(found, cut, strict=True) if c is not None and t.requires_grad]
                torch.autograd.backward([t for t, _ in pairs], [c for _, c in pairs])
            metrics = {"loss": loss.detach(), **{name: v.detach() if isinstance(v, Tensor) else v for name, v in metrics.items()}}
            return Gradients([p.grad for p in store.params], loss.detach(), 1.0, metrics)

        return cached

    return Combinator("grad_cache", wrap, "loss", "grad", args=f"{getattr(loss_fn, '__name__', loss_fn)}, {n}", batches_per_step=n)


def _embedded(embed: Any, store: StoreView, batches: Sequence[Any], keys: Sequence[int]) -> list[Any]:
    """Embeddings without a graph; buffers are put back, for the second pass writes them."""
    before = [(b, b.clone()) for b in store.module.buffers()]
    found: list[Any] = []
    with torch.no_grad():
        for batch, key in zip(batches, keys, strict=True):
            if batch.__class__ is Part:
                raise StepError("grad_cache takes whole batches: it keeps no more than one at a time in memory; leave microbatch out")
            store.seed(key)
            found.append(embed(store.module, batch))
        for buffer, values in before:
            buffer.copy_(values)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _scalar(out: Any) -> tuple[Tensor, Mapping[str, Any]]:
    loss, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad or not isinstance(metrics, Mapping):
        raise StepError(
            f"the loss of grad_cache must be a scalar tensor that depends on the embeddings, or (loss, metrics), but got {out!r:.60}"
        )
    return loss, metrics


def carry(init: Callable[[Any, Any], Any]) -> Combinator:
    """Carry something from batch to batch, such as the hidden state of a recurrent net: truncated back-propagation through time.

    `train_step` is given ``(batch, carried)`` in the place of the batch, and returns ``(loss, metrics, carried)``. What is carried is detached,
    so gradients flow through one batch; it lies in the memory, so it is saved; and it begins anew with every epoch. Where a sequence ends
    within an epoch, `train_step` sets the rows of that sequence to what they begin with.

    Args:
        init: Maps model and batch to what is carried into the first batch of an epoch: any tree of tensors.

    Returns:
        A combinator of gradients of a batch; it stands directly behind `grad`.

    Raises:
        StepError: In a step, if `train_step` returns no third value, or the batch is a part of one.

    Example:
        >>> print(carry(lambda model, batch: torch.zeros(len(batch), 8)))
        carry(<lambda>)

    References:
        Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories" (1990).
    """
    check_type("carry(init)", init, Callable, "a function of model and batch")

    def wrap(grad_fn: GradFn) -> GradFn:
        def carrying(store: StoreView, batch: Any, key: int) -> Gradients:
            if batch.__class__ is Part:
                raise StepError(
                    "carry goes from one batch to the next, but microbatch has parted this one by its samples; leave microbatch out"
                )
            if store.place is not None:
                raise ParallelError(
                    "carry keeps what belongs to the samples of one process, and a checkpoint holds that of one rank only; train in one"
                )
            store.host.only_if(store, _goes_on)
            epoch = store.memory["carry"]["epoch"] if store.host.traced else store.step.progress.epoch
            return grad_fn(store, Around(batch, lambda loss_fn: _carried(loss_fn, init, store.memory["carry"], epoch)), key)

        return carrying

    empty: Callable[[Store], Any] = lambda store: {"epoch": None, "value": None}  # noqa: E731  # too short for a name
    return Combinator("carry", wrap, "grad_sum", "grad_sum", args=getattr(init, "__name__", repr(init)), init=empty)


def _goes_on(store: Store) -> bool:
    """Whether what is carried belongs to the epoch that is under way."""
    return store.memory["carry"]["epoch"] == store.step.progress.epoch


def _carried(loss_fn: Any, init: Any, tree: dict[str, Any], epoch: int) -> Any:
    def carried(model: Any, batch: Any) -> Any:
        if tree["epoch"] != epoch:
            with torch.no_grad():
                tree["value"], tree["epoch"] = init(model, batch), epoch
        out = loss_fn(model, (batch, tree["value"]))
        if not isinstance(out, tuple) or len(out) != 3:
            got = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
            raise StepError(
                f"under carry, train_step is given (batch, carried) and must return (loss, metrics, carried), but returned {got}"
            )
        tree["value"] = map_tensors(lambda t: t.detach(), out[2])
        return out[0], out[1]

    return carried
