"""Gradients of a group of batches: sums that are added, then divided by their summed weight; and parts of a batch that is too large."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fnlight.metrics import Mean
from fnlight.protocols import Gradients
from fnlight.rng import RANK, fold_in
from fnlight.shards import local_parts


def mean_of_group(grad_fn: Any) -> Any:
    """Turn a `GradFn` of one batch into one of a group: gradients are summed, then divided by the summed weight.

    Where a state is placed on several ranks, the groups of all of them are one: each rank works on its part, with random numbers of its own.

    Args:
        grad_fn: Gives the gradients of a batch's sum, with its weight.

    Returns:
        A `GradFn` that takes a tuple of batches and gives true gradients.

    Example:
        >>> from types import SimpleNamespace
        >>> def grad_fn(store, batch, key):
        ...     return Gradients([torch.tensor(batch)], torch.tensor(batch), 1.0, {})
        >>> mean_of_group(grad_fn)(SimpleNamespace(place=None), (2.0, 4.0), 0).values
        [tensor(3.)]
    """

    def grouped(store: Any, batches: Any, key: int) -> Gradients:
        if store.place is not None:
            return _of_all_ranks(grad_fn, store, batches, key)
        found = grad_fn(store, batches[0], fold_in(key, 0))
        for i in range(1, len(batches)):
            found = _add(found, grad_fn(store, batches[i], fold_in(key, i)))
        return found if found.weight.__class__ is float and found.weight == 1.0 else _divide(found, found.weight)

    return grouped


def _of_all_ranks(grad_fn: Any, store: Any, batches: Any, key: int) -> Gradients:
    place, last, found = store.place, len(batches) - 1, None
    rank = place.world.rank
    for i, batch in enumerate(batches):
        place.begin(store, i == last)
        each = grad_fn(store, batch, fold_in(key, i, RANK + rank) if rank else fold_in(key, i))
        # values are not added here: they lie where backward() has added them, and the last one has moved them to where they travel
        found = each if found is None else _add(found._replace(values=[]), each._replace(values=[]))._replace(values=each.values)
    found = place.finish(store, found)
    weight = place.mean_weight(found.weight)
    return found if weight.__class__ is float and weight == 1.0 else _divide(found, weight)


def loss_of_all(store: Any, found: Gradients) -> Tensor:
    """The mean loss of a group, over all ranks where there are several; for stages that decide by it, which must decide alike.

    Args:
        store: The live store.
        found: Gradients of the group.

    Returns:
        A scalar tensor, shape [].

    Example:
        >>> from types import SimpleNamespace
        >>> loss_of_all(SimpleNamespace(place=None), Gradients([], torch.tensor(6.0), torch.tensor(3.0), {}))
        tensor(2.)
    """
    loss, weight = found.loss, found.weight
    if store.place is not None:
        loss, weight = store.place.world.mean(loss, weight)
    return loss if weight.__class__ is float else loss / weight


class Around(NamedTuple):
    """A batch with what is put around the loss function for it, which a `GradFn` may be given in the place of a batch.

    Args:
        batch: The batch, or another `Around`.
        wrap: Maps the loss function to another one.

    Example:
        >>> loss_fn, batch = Around(3, lambda fn: lambda model, batch: 2 * fn(model, batch)).taken(lambda model, batch: batch)
        >>> loss_fn(None, batch)
        6
    """

    batch: Any
    wrap: Callable[[Any], Any]

    def taken(self, loss_fn: Any) -> tuple[Any, Any]:
        """The loss function, and the batch to call it with."""
        return self.wrap(loss_fn), self.batch


class Part(NamedTuple):
    """A part of a batch, which a `GradFn` may be given in the place of a batch.

    Args:
        batch: Some of the samples of a batch.
        share: What a plain loss of them counts: which fraction of the samples they are, so that the parts of one batch come to 1 (or those of
            all ranks to their number). With 0 they are stand-ins, of which nothing counts.
        most: The samples that the largest of the ranks' parts holds, where each rank has data of its own, and they differ.

    Example:
        >>> loss_fn, batch = Part(torch.tensor([1.0, 3.0]), 0.5).taken(lambda model, batch: batch.mean())
        >>> loss_fn(None, batch)
        Mean(total=tensor(1.), weight=0.5)
    """

    batch: Any
    share: float
    most: int | None = None

    def taken(self, loss_fn: Any) -> tuple[Any, Any]:
        """The loss function of this part, and the batch to call it with: what counts with weight 1 counts with its share."""

        def shared(model: Any, batch: Any) -> Any:
            if not self.share:
                with _standing_in(model):
                    return _uncounted(loss_fn(model, batch))
            out = loss_fn(model, batch)
            if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
                return _shared(out[0], self.share), {name: _shared(value, self.share) for name, value in out[1].items()}
            return _shared(out, self.share)

        return shared, self.batch


@contextmanager
def _standing_in(model: Any) -> Iterator[None]:
    """What brings samples of all ranks together within a model leaves those of this one out."""
    found = [m for m in model.modules() if getattr(m, "counts_samples", None) is True] if isinstance(model, nn.Module) else []
    for each in found:
        vars(each)["counts_samples"] = False
    try:
        yield
    finally:
        for each in found:
            vars(each)["counts_samples"] = True


def _shared(value: Any, share: float) -> Any:
    number = not value.dim() if isinstance(value, Tensor) else isinstance(value, int | float)
    return Mean(value * share, share) if number else value


def _uncounted(out: Any) -> Any:
    """A loss that every parameter still has a gradient of, and metrics that change nothing."""
    if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
        return _uncounted(out[0]), {name: _empty(value) for name, value in out[1].items()}
    return Mean((out.total if isinstance(out, Mean) else out) * 0.0, 0.0)


def _empty(value: Any) -> Any:
    if isinstance(value, Tensor | int | float):
        return Mean(value * 0.0, 0.0)
    make = getattr(type(value), "empty", None)
    return value if make is None else make()


def _add(a: Gradients, b: Gradients) -> Gradients:
    values = list(a.values)
    left, right = list[Tensor](), list[Tensor]()
    for i, (x, y) in enumerate(zip(a.values, b.values, strict=True)):
        if x is None:
            values[i] = y
        elif y is not None and y is not x:  # where both are one tensor, backward() has added in place
            left.append(x)
            right.append(y)
    if left:
        torch._foreach_add_(left, right)
    metrics = join_metrics(a.metrics, b.metrics)
    finite = a.finite if b.finite is None else b.finite if a.finite is None else a.finite & b.finite
    return Gradients(values, a.loss + b.loss, a.weight + b.weight, metrics, finite)


def join_metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of two batches, or of two steps, as those of both: a plain number counts once.

    Args:
        a: Names to values.
        b: The same names to values.

    Returns:
        Names to merged values.

    Example:
        >>> join_metrics({"loss": 1.0}, {"loss": 3.0})["loss"].compute()
        2.0
    """
    return {name: _join(value, b[name]) for name, value in a.items() if name in b}


def _join(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor | int | float):
        return _once(a).merge(b if isinstance(b, Mean) else _once(b))
    if isinstance(a, Mean) and not isinstance(b, Mean):
        return a.merge(_once(b))
    merge = getattr(a, "merge", None)
    return b if merge is None else merge(b)


def _once(value: Any) -> Mean:
    """A plain number counts once; many of few digits would add up to less."""
    few = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4
    return Mean(value.float() if few else value, 1)


def _divide(found: Gradients, weight: Any) -> Gradients:
    held = [v for v in found.values if v is not None]
    if isinstance(weight, Tensor):  # parts, since a number on the device cannot be on each of several meshes
        torch._foreach_mul_(local_parts(held), 1.0 / weight.to(held[0].device)) if held else None
    elif held:
        torch._foreach_div_(held, weight)
    return found
