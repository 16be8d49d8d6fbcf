"""Which samples an epoch reads, and in which order: a function of (seed, epoch), computed without reading a sample.

The unit is a task, ``(key, ids, indices)``: one batch of indices, with the key of the random numbers of each of its samples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from fnlight.data.buckets import LengthBuckets
from fnlight.data.known import is_kind
from fnlight.data.permutation import Permutation, permutation
from fnlight.data.samplers import drawn
from fnlight.data.share import Share
from fnlight.errors import LoaderError
from fnlight.tensors import SAMPLE, fold_in

Task = tuple[int, Sequence[int], Any]
"""A key, the numbers that are folded into it, one a sample, and the indices to read (a single one where nothing is collated)."""

_CHUNK = 64  # batches of indices taken at a time


@attrs.frozen(eq=False)
class Span:
    """A part of an epoch.

    Args:
        seed: The one source of randomness.
        epoch: The epoch, from 0 on.
        start: The first batch.
        stop: The batch before which the epoch ends early; None goes on to the end of the data.
        stream: What the data is for; another stream has another order.
        position: Where a loader that keeps its own place stood behind batch `start`.
        ahead: Whether the epoch behind this one is going to be read as well, so that its workers may be started early.
        share: A rank's share of the data; None where this process is alone.
        workers: By how many workers a stream was read when this epoch began; None for as many as its loader has.
        seen: Is given the last batch that is skipped, where batches are skipped by reading them.
        entered: Whether the loader begins with batch `start` by itself, so that nothing is to be skipped.

    Example:
        >>> Span(seed=0, epoch=1).start
        0
    """

    seed: int
    epoch: int
    start: int = 0
    stop: int | None = None
    stream: int = 0
    position: Any = None
    ahead: bool = False
    share: Share | None = None
    workers: int | None = None
    seen: Callable[[Any], None] | None = None
    entered: bool = False

    def key(self, purpose: int) -> int:
        """The key of this epoch for a purpose, such as ``rng.SAMPLE``."""
        return fold_in(self.seed, purpose, self.stream, self.epoch)

    def following(self) -> "Span":
        """The epoch behind this one, from its first batch on."""
        return attrs.evolve(self, epoch=self.epoch + 1, start=0, position=None, workers=None, seen=None, entered=False)

    @property
    def order_key(self) -> int:
        """The key of the order in which this epoch reads the samples."""
        return fold_in(self.seed, self.stream, self.epoch)


def length_of(loader: Any) -> int | None:
    """Return the number of batches in an epoch of a loader, or None if it has no length; the loader is not changed.

    Args:
        loader: Any iterable.

    Returns:
        What ``len`` gives, or None.

    Example:
        >>> length_of([1, 2]), length_of(iter([1, 2]))
        (2, None)
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        return _len(loader)
    size = _len(loader.dataset)  # len(loader) would write it down in the loader
    if size is None or loader.batch_size is None:
        return size
    return size // loader.batch_size if loader.drop_last else math.ceil(size / loader.batch_size)


def _len(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def check_start(span: Span, end: int, loader: Any) -> None:
    """Raise if a position is beyond the end of an epoch.

    Args:
        span: Where to begin.
        end: Batches that the epoch has.
        loader: What the message names.

    Raises:
        LoaderError: If the place is beyond the end.

    Example:
        >>> check_start(Span(seed=0, epoch=0, start=2), 3, [])
    """
    if span.start > end:
        raise LoaderError(
            f"the state is at batch {span.start} of epoch {span.epoch}, but this {type(loader).__name__} has {end} batches per epoch: "
            "the data became shorter, its batches larger, or a limit smaller; give the data that the state was trained on, "
            "or a state whose progress.batch is 0"
        )


def tasks(loader: DataLoader[Any], span: Span, shuffle: bool = True) -> Iterator[Task]:
    """The tasks of a part of an epoch.

    A ``SequentialSampler`` and a ``RandomSampler`` over all of the data are understood: their order is a keyed permutation, of which
    any part is a slice. So are `LengthBuckets`. Any other sampler is kept: a copy of it is drawn from the start, which costs its indices but loads nothing.
    It is told the epoch if it has ``set_epoch``; one that counts epochs in itself counts those before this one.

    Args:
        loader: A map-style loader; it is not changed, nor are its samplers.
        span: The part of the epoch.
        shuffle: False takes a shuffled dataset in its own order, and a sampler of the user's as in epoch 0.

    Returns:
        An iterator of tasks.

    Raises:
        LoaderError: If the part begins beyond the end of the epoch, or a sampler cannot be copied.

    Example:
        >>> found = tasks(DataLoader(range(5), batch_size=2), Span(seed=0, epoch=0, start=1))
        >>> [indices for key, ids, indices in found]
        [[2, 3], [4]]
    """
    if isinstance(loader.batch_sampler, LengthBuckets):
        return _bucket_tasks(loader.batch_sampler, loader, span, shuffle)
    collated, known = loader.batch_sampler is not None, _known(loader)
    if known is None:
        return _drawn_tasks(loader, span, span.epoch if shuffle else 0)
    sampler, size, drop_last = known
    count = len(sampler)
    total = count // size if drop_last else -(-count // size)
    end = total if span.stop is None else min(total, span.stop)
    check_start(span, end, loader)
    order = None
    if shuffle and is_kind(sampler, RandomSampler):
        order = permutation(span.order_key, count)
    return _sliced_tasks(order, count, size, numbers=range(span.start, end), key=span.key(SAMPLE), collated=collated)


def _generator(key: int) -> torch.Generator:
    return torch.Generator().manual_seed(key >> 1)  # signed 64 bits


def _known(loader: DataLoader[Any]) -> tuple[Any, int, bool] | None:
    """Sampler, batch size and drop_last of an order that is understood; None for a sampler that is kept."""
    outer: Any = loader.batch_sampler
    sampler: Any = None
    if outer is None:
        sampler, size, drop_last = loader.sampler, 1, False
    elif is_kind(outer, BatchSampler):
        sampler, size, drop_last = outer.sampler, outer.batch_size, outer.drop_last
    else:
        return None
    if is_kind(sampler, RandomSampler):
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return (sampler, size, drop_last) if whole else None
    return (sampler, size, drop_last) if type(sampler) is SequentialSampler else None


def _sliced_tasks(order: Tensor | Permutation | None, count: int, size: int, numbers: range, key: int, collated: bool) -> Iterator[Task]:
    for first in range(numbers.start, numbers.stop, _CHUNK):  # an order of millions is not turned into a list at once
        begin, end = first * size, min(count, min(numbers.stop, first + _CHUNK) * size)
        chunk = list(range(begin, end)) if order is None else order[begin:end].tolist()
        for low in range(0, end - begin, size):
            indices = chunk[low : low + size]
            yield key, indices, indices if collated else indices[0]


def _bucket_tasks(buckets: LengthBuckets, loader: DataLoader[Any], span: Span, shuffle: bool) -> Iterator[Task]:
    size = _len(loader.dataset)
    if size is not None and size != len(buckets.lengths):
        raise LoaderError(
            f"LengthBuckets has {len(buckets.lengths)} lengths, but the dataset has {size} samples; give the length of every sample"
        )
    end = len(buckets) if span.stop is None else min(len(buckets), span.stop)
    check_start(span, end, loader)
    order = buckets.order(_generator(span.order_key) if shuffle else None)
    return ((span.key(SAMPLE), indices, indices) for indices in order[span.start : end])


def _drawn_tasks(loader: DataLoader[Any], span: Span, epoch: int) -> Iterator[Task]:
    """Tasks of a sampler that is kept: it may repeat an index, so a sample is keyed by its place in the epoch."""
    if span.stop is not None:
        check_start(span, span.stop, loader)
    key, number = span.key(SAMPLE), 0
    for number, indices in enumerate(drawn(loader, fold_in(span.seed, span.stream, epoch), epoch, span.stop), 1):
        if span.stop is not None and number > span.stop:
            return
        if number > span.start:
            yield fold_in(key, number), range(1 if loader.batch_sampler is None else len(indices)), indices
    check_start(span, number, loader)
