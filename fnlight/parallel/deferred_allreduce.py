"""Average gradients after the backward pass instead of during it, so that all ranks can repeat a step that ran out of memory on one of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, distributed

from fnlight.parallel.world import World
from fnlight.protocols import Gradients

_BUCKET = 25 * 2**20  # bytes of gradients that are sent together: torch's default


@attrs.frozen(eq=False, repr=False)
class Apart:
    """The placement for one attempt at a group of batches: nothing is sent until this rank has all of its gradients and `done` returns True.

    Args:
        whole: The placement that it replaces, in which every rank holds the whole model.
        done: Called after this rank has its gradients; False leaves them as they are, because the attempt failed.

    Example:
        >>> from types import SimpleNamespace
        >>> apart = Apart(SimpleNamespace(), lambda: False)
        >>> store = SimpleNamespace(module="model")
        >>> apart.begin(store, last=True), apart.loss(store, lambda model, batch: (model, batch), 3)
        (None, ('model', 3))
    """

    whole: Any
    done: Callable[[], bool]
    _vain: list[bool] = attrs.field(factory=list, init=False)

    @property
    def world(self) -> World:
        """All processes."""
        return self.whole.world

    def begin(self, store: Any, last: bool) -> None:
        """Nothing is sent during the backward pass."""

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the live module."""
        return fn(store.module, batch)

    def finish(self, store: Any, found: Gradients) -> Gradients:
        """Average the gradients over ranks after all of them have theirs."""
        if not self.done():
            self._vain.append(True)
            return found
        found = self.whole.finish(store, found)
        values = list(found.values)
        if any(v is None for v in values):
            there = torch.tensor([v is not None for v in values], dtype=torch.int32, device=store.device)
            distributed.all_reduce(there, distributed.ReduceOp.MAX)
            values = [torch.zeros_like(p) if v is None and t else v for p, v, t in zip(store.params, values, there.tolist(), strict=True)]
        for bucket in _buckets([v for v in values if v is not None]):
            _average(bucket, self.world.size)
        return found._replace(values=values)

    def mean_weight(self, found: Gradients) -> Any:
        """The mean over ranks of the weight; 1 if the attempt failed."""
        return 1.0 if self._vain else self.whole.mean_weight(found)


def _buckets(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    held, size = list[Tensor](), 0
    for value in values:
        if held and (size + value.nbytes > _BUCKET or (value.dtype, value.device) != (held[0].dtype, held[0].device)):
            yield held
            held, size = [], 0
        held.append(value)
        size += value.nbytes
    if held:
        yield held


def _average(values: list[Tensor], count: int) -> None:
    flat = torch.cat([v.flatten() for v in values]).div_(count)
    distributed.all_reduce(flat)
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(part.view_as(value))
