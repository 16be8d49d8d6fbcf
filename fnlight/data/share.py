"""Which part of the data a rank reads if several processes train together: a part of each batch, or every n-th batch."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import attrs
from torch import Tensor

from fnlight.data.part import Part
from fnlight.errors import StepError
from fnlight.tensors import leaves, map_nodes

T = TypeVar("T")
Triple = tuple[Any, int, bool]
"""A batch, its samples, and whether the epoch ends with it."""


@attrs.frozen(eq=False, repr=False)
class Share:
    """A rank's share of the data.

    In training the batches of a loader are those of all ranks together, and each rank reads an even part of every one, so the samples of a step
    do not depend on the number of ranks. In an evaluation every batch is read whole, by one of them.

    Args:
        world: Says the rank, and brings numbers together.
        whole: True for an evaluation.
        lockstep: Whether a forward pass is one of all ranks, so that each must make as many: where batches do not go round, some are then
            evaluated twice, the second time as a `Part` of which nothing counts.

    Example:
        >>> from types import SimpleNamespace
        >>> [Share(SimpleNamespace(rank=rank, size=3)).bounds(8) for rank in range(3)]
        [(0, 2), (2, 5), (5, 8)]
    """

    world: Any
    whole: bool = False
    lockstep: bool = False

    def rounds(self, found: Iterable[T]) -> Iterator[tuple[T, float | None]]:
        """Of the batches of an evaluation every so-many-th one, with what it counts: None, or 0.0 for one that only keeps step."""
        rank, size, last, count = self.world.rank, self.world.size, None, 0
        for count, last in enumerate(found, 1):
            if (count - 1) % size == rank:
                yield last, None
        if self.lockstep and last is not None and count % size and rank >= count % size:
            yield last, 0.0

    def bounds(self, count: int) -> tuple[int, int]:
        """Which samples of a batch are this rank's: the first one, and the one before which it ends."""
        rank, size = self.world.rank, self.world.size
        return count * rank // size, count * (rank + 1) // size

    def portion(self, count: int) -> tuple[int, int, float | None]:
        """The bounds in a batch, and what a plain loss of them counts; None where it is the same for all ranks.

        Where there are fewer samples than ranks, some read the first sample once more, to keep step with the others: it counts nothing.
        """
        start, stop = self.bounds(count)
        if count % self.world.size == 0:
            return start, stop, None
        return (start, stop, (stop - start) * self.world.size / count) if stop > start else (0, 1, 0.0)

    def tasks(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, int, float | None]]:
        """Of the tasks of an epoch those of this rank, each with the samples of the whole batch and what it counts."""
        if self.whole:
            yield from ((task, len(task[1]), counts) for task, counts in self.rounds(tasks))
            return
        for key, ids, indices in tasks:
            start, stop, counts = self.portion(len(ids))
            yield (key, ids[start:stop], indices[start:stop]), len(ids), counts

    def cut(self, found: Iterable[Triple]) -> Iterator[Triple]:
        """Of batches that were read whole the part of this rank."""
        if self.whole:
            for (batch, samples, last), counts in self.rounds(found):
                yield batch if counts is None else Part(batch, counts), samples, last
            return
        for batch, samples, last in found:
            start, stop, counts = self.portion(samples)
            part = batch if stop - start == samples else cut(batch, start, stop, samples)
            yield part if counts is None else Part(part, counts), samples, last

    def agreed(self, found: Iterable[Triple]) -> Iterator[Triple]:
        """Batches of ranks that each have their own, up to the first one that is the last of any rank; the samples are those of all."""
        rank, size = self.world.rank, self.world.size
        for batch, samples, last in found:
            *counts, ends = self.world.all_reduce_sum([*(samples if i == rank else 0 for i in range(size)), int(last)])
            yield batch if min(counts) == max(counts) else Part(batch, 1.0, max(counts)), sum(counts), bool(ends)
            if ends:
                return


@attrs.frozen(eq=False, repr=False)
class Sharded:
    """A loader that yields different batches on every rank; made by `sharded`.

    Args:
        loader: The user's loader.

    Example:
        >>> Sharded([1, 2]).loader
        [1, 2]
    """

    loader: Any

    def __iter__(self) -> Iterator[Any]:
        """The batches of this rank."""
        return iter(self.loader)


def sharded(loader: Any) -> Sharded:
    """Declare that a loader yields different batches on every rank, so that each rank trains on all of its batches.

    Without it the batches of a loader are those of all ranks, which costs an iterable that every rank reads them all. An epoch ends for all
    ranks where it ends for the first of them. Such data depends on the number of ranks.

    Args:
        loader: Any loader, such as a ``DataLoader`` over an ``IterableDataset`` that asks `fnlight.parallel.stream_part` what to read.

    Returns:
        A value that is taken wherever a training loader is.

    Example:
        >>> list(sharded([1, 2]))
        [1, 2]
    """
    return Sharded(loader)


def cut(batch: Any, start: int, stop: int, count: int) -> Any:
    """Take some samples of a batch: rows of every tensor and array, and entries of lists with one entry per sample.

    Args:
        batch: Any tree of tensors.
        start: The first sample.
        stop: The sample before which to end.
        count: Samples in the batch.

    Returns:
        The same tree.

    Raises:
        StepError: If a tensor's first dimension is not the samples.

    Example:
        >>> import torch
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), 1, 3, 4)
        (tensor([1, 2]), ['b', 'c'])
    """

    def of(node: Any) -> Any:
        shape = getattr(node, "shape", None)  # tensors, and arrays of NumPy
        if shape is not None and len(shape) and shape[0] != count:
            raise StepError(
                f"a batch of {count} samples cannot be split: it has a tensor of shape {list(shape)}, whose first dimension is not {count}; "
                "do not split batches (microbatch, several ranks), or give every tensor of the batch the shape [samples, ...] or [] in collate_fn"
            )
        if shape is not None:
            return node[start:stop] if len(shape) else node
        if isinstance(node, list) and len(node) == count and not any(isinstance(leaf, Tensor) for _, leaf in leaves(node)):
            return node[start:stop]  # texts and other things, one a sample
        return NotImplemented

    return map_nodes(of, batch)
