"""Mean gradients over the batches of one step: the sums are added, then divided by the summed weight."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fnlight.errors import LoaderError
from fnlight.metrics import join_metrics
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.tensors import RANK, fold_in, foreach_add_, foreach_div_, foreach_mul_, local_parts


def batches_at(group: int | Mapping[int, int], epoch: int) -> int:
    """How many batches a step consumes in an epoch.

    Args:
        group: A number, or a mapping from the epoch at which it starts to numbers.
        epoch: The epoch, from 0 on.

    Returns:
        The number.

    Raises:
        LoaderError: If the mapping has no entry for the epoch, or the number is below 1.

    Example:
        >>> batches_at({0: 1, 5: 4}, 7)
        4
    """
    if isinstance(group, Mapping):
        begun = [first for first in group if first <= epoch]
        if not begun:
            raise LoaderError(f"batches per step, given as a mapping of epochs, must start at epoch 0, but got {dict(group)!r}; add 0: 1")
        group = group[max(begun)]
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise LoaderError(f"batches per step must be a whole number >= 1, but got {group!r}")
    return group


def mean_of_group(grad_fn: GradFn) -> GradFn:
    """Turn a `GradFn` of one batch into one of a group: gradients are summed, then divided by the summed weight.

    For a state on several ranks, the mean is over the batches of all ranks: each rank computes its part, with its own random numbers.

    Args:
        grad_fn: Gives the gradients of the summed loss of a batch, with its weight.

    Returns:
        A `GradFn` that takes a tuple of batches and gives true gradients.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> def grad_fn(store, batch, key):
        ...     return Gradients([torch.tensor(batch)], torch.tensor(batch), 1.0, {})
        >>> mean_of_group(grad_fn)(SimpleNamespace(place=None), (2.0, 4.0), 0).values
        [tensor(3.)]
    """

    def grouped(store: StoreView, batches: Any, key: int) -> Gradients:
        if store.place is not None:
            return _of_all_ranks(grad_fn, store, batches, key)
        found = grad_fn(store, batches[0], fold_in(key, 0))
        for i in range(1, len(batches)):
            found = _add(found, grad_fn(store, batches[i], fold_in(key, i)))
        weight = found.weight
        return found if weight.__class__ is float and weight == 1.0 else _divide(found, weight)

    return grouped


def _of_all_ranks(grad_fn: GradFn, store: StoreView, batches: Any, key: int) -> Gradients:
    place, last, found = store.place, len(batches) - 1, None
    rank = place.world.rank
    for i, batch in enumerate(batches):
        place.begin(store, i == last)
        each = grad_fn(store, batch, fold_in(key, i, RANK + rank) if rank else fold_in(key, i))
        # values are not added here: backward() has added them in place, and after the last batch they are in the buffers for communication
        found = each if found is None else _add(found._replace(values=[]), each._replace(values=[]))._replace(values=each.values)
    found = place.finish(store, found)
    return _divide(found, place.mean_weight(found))


def loss_of_all(store: StoreView, found: Gradients) -> Tensor:
    """The mean loss of a group over all ranks, for stages that use it in a decision that must be the same on all ranks.

    Args:
        store: The live store.
        found: Gradients of the group.

    Returns:
        A scalar tensor, shape [].

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> loss_of_all(SimpleNamespace(place=None), Gradients([], torch.tensor(6.0), torch.tensor(3.0), {}))
        tensor(2.)
    """
    loss, weight = found.loss, found.weight
    if store.place is not None:
        loss, weight = store.place.world.mean(loss, weight)
    return loss if found.plain and weight == 1.0 else loss / weight


class Around(NamedTuple):
    """A batch together with a wrapper for its loss function; a `GradFn` accepts it in place of a batch.

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


def _add(a: Gradients, b: Gradients) -> Gradients:
    values = list(a.values)
    left, right = list[Tensor](), list[Tensor]()
    for i, (x, y) in enumerate(zip(a.values, b.values, strict=True)):
        if x is None:
            values[i] = y
        elif y is not None and y is not x:  # if both are the same tensor, backward() has added in place
            left.append(x)
            right.append(y)
    if left:
        foreach_add_(left, right)
    metrics = join_metrics(a.metrics, b.metrics)
    finite = a.finite if b.finite is None else b.finite if a.finite is None else a.finite & b.finite
    return Gradients(values=values, loss=a.loss + b.loss, weight=a.weight + b.weight, metrics=metrics, finite=finite)


def _divide(found: Gradients, weight: Any) -> Gradients:
    if not isinstance(weight, Tensor) and weight == 1:
        return found
    held = [v for v in found.values if v is not None]
    if not held:
        return found
    if isinstance(weight, Tensor):  # local parts, since one scalar tensor cannot be on several device meshes
        foreach_mul_(local_parts(held), 1.0 / weight.to(held[0].device))
    else:
        foreach_div_(held, weight)
    return found
