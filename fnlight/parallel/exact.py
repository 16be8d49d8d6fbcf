"""Gradients that are bit-identical for any number of ranks: a batch has fixed parts, whose gradients are summed in one fixed tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from fnlight.data import Part, cut, num_samples
from fnlight.errors import ConfigError, ParallelError
from fnlight.metrics import join_metrics
from fnlight.pipe import Combinator, batches_at
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.tensors import fold_in


def exact_ranks(n: int | Mapping[int, int] = 1, *, parts: int = 8) -> Combinator:
    """Make gradients bit-identical on 1, 2, 4, ... ranks: to tell a bug from rounding.

    Every batch is computed in `parts` parts, each with its own random numbers. Their gradients are summed in a fixed binary tree, whichever rank
    has computed them. It costs `parts` small forward and backward passes instead of a large one, and one more copy of the gradients for
    each level of the tree. All gradients are sent to all ranks at the end of a step, without overlap. A layer that couples the
    samples of a batch, such as BatchNorm, sees only the samples of its part.

    Args:
        n: Batches per step, as for `accumulate`, which it replaces.
        parts: Parts of a batch, a power of two; the number of ranks must divide it.

    Returns:
        A combinator from `GradFn` (of one batch) to `GradFn` (of a group); it comes directly after `grad`.

    Raises:
        ConfigError: If `parts` is not a power of two.

    Example:
        >>> print(exact_ranks(4))
        exact_ranks(4, parts=8)
    """
    batches_at(n, 0)
    if not isinstance(parts, int) or parts < 1 or parts & (parts - 1):
        raise ConfigError(f"exact_ranks(parts=...) must be a power of two, such as 8, but got {parts!r}")

    def wrap(grad_fn: GradFn) -> GradFn:
        def exact(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
            rank, size = (0, 1) if store.place is None else (store.place.world.rank, store.place.world.size)
            if parts % size or (store.place is not None and store.place.lockstep):
                raise ParallelError(
                    f"exact_ranks(parts={parts}) needs fl.parallel.ddp() and a number of ranks that divides parts, but there are {size} ranks "
                    f"under {store.place}; use a larger power of two for parts, or train on 1, 2, 4, ... ranks with fl.parallel.ddp()"
                )
            total, metrics = None, None
            for m, batch in enumerate(batches):
                flat, found = _of_batch(grad_fn, store, batch, key=fold_in(key, m), mine=parts // size, rank=rank, size=size)
                total = flat if total is None else total + flat
                metrics = found if metrics is None else join_metrics(metrics, found)
            assert total is not None
            assert metrics is not None
            return _split(store, total, metrics)

        return exact

    return Combinator("exact_ranks", wrap, "grad_sum", "grad", args=f"{n}, parts={parts}", batches_per_step=n)


def _of_batch(grad_fn: GradFn, store: StoreView, batch: Any, key: int, mine: int, rank: int, size: int) -> tuple[Tensor, dict[str, Any]]:
    """The gradients of all ranks' parts of a batch, followed by loss and weight, in one flat tensor; and this rank's metrics."""
    batch, share = (batch.batch, batch.share) if batch.__class__ is Part else (batch, 1.0)
    here = num_samples(batch) if share else 0
    count = round(here * size / share) if share else 0
    start, leaves, metrics = count * rank // size, list[Tensor](), None
    for i in range(rank * mine, (rank + 1) * mine):
        a, b = (count * j // (mine * size) for j in (i, i + 1))
        # a part without samples computes a zero-weight dummy batch of the first sample: its gradients are zero, its metrics empty
        part = Part(cut(batch, a - start, b - start, here), (b - a) / count) if b > a else Part(cut(batch, 0, 1, num_samples(batch)), 0.0)
        if store.place is not None:
            store.place.begin(store, last=False)
        found = grad_fn(store, part, fold_in(key, i))
        leaves.append(_flat(store, found))
        metrics = found.metrics if metrics is None else join_metrics(metrics, found.metrics)
        for p in store.params:
            p.grad = None
    assert metrics is not None
    flat = _tree(leaves)
    if size > 1:
        every = [torch.empty_like(flat) for _ in range(size)]
        distributed.all_gather(every, flat)
        flat = _tree(every)
    return flat, metrics


def _tree(values: list[Tensor]) -> Tensor:
    """The sum of 2**k tensors, added in a binary tree."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _flat(store: StoreView, found: Gradients) -> Tensor:
    grads = [
        torch.zeros_like(p) if v is None else v if v.layout == torch.strided else v.to_dense()
        for p, v in zip(store.params, found.values, strict=True)
    ]
    ends = [torch.as_tensor(each, device=store.device).detach().reshape(1) for each in (found.loss, found.weight)]
    wide = torch.promote_types(torch.float32, grads[0].dtype) if grads else torch.float32
    return torch.cat([each.detach().reshape(-1).to(wide) for each in (*grads, *ends)])


def _split(store: StoreView, flat: Tensor, metrics: dict[str, Any]) -> Gradients:
    sizes, weight = [p.numel() for p in store.params], flat[-1]
    parts = (flat[:-2] / weight).split(sizes)
    values: list[Tensor | None] = [part.view_as(p).to(p.dtype) for part, p in zip(parts, store.params, strict=True)]
    return Gradients(values, flat[-2], weight, metrics)
