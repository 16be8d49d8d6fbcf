"""A ``torch.utils.data.DataLoader`` whose order and whose samples' random numbers are functions of (seed, epoch).

The user's loader is read, never iterated: a loader of our own goes over the same dataset with workers of the same kind. What it
hands to them are tasks (`fnlight.data.order`): before sample ``indices[j]`` is read, the global generators are seeded with
``fold_in(key, ids[j])``. So a sample depends neither on the worker that reads it nor on what was read before it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from fnlight.data.epochs import Listener, listeners, tell_epoch
from fnlight.data.generators import Reseed, own_generators
from fnlight.data.order import Span, Task, tasks
from fnlight.data.part import Part
from fnlight.data.workers import Started, early, options_of
from fnlight.tensors import COLLATE, SAMPLE, fold_in, seed_generators

Todo = tuple[Task, int | None, float | None]
"""A task, the samples of its batch (None where the dataset makes the batches itself), and what they count (None for 1)."""

Marks = deque[tuple[int | None, float | None, bool]]
"""Of batches that were handed to workers: their samples, what they count, and whether one is the last."""

_DRAW_NOTHING: frozenset[type] = frozenset({TensorDataset, Tensor, list, tuple, range})


_OWN_LISTENERS: Any = attrs.Factory(lambda self: listeners(self.loader, samplers=False), takes_self=True)  # of samplers a copy is told
_OWN_GENERATORS: Any = attrs.Factory(
    lambda self: own_generators(self.loader.dataset) if _draws(self.loader.dataset) else (), takes_self=True
)


@attrs.frozen(eq=False, repr=False)
class KeyedLoader:
    """A map-style ``DataLoader``, read in keyed order and from any batch on.

    Args:
        loader: The user's loader.
        shuffle: False takes a shuffled dataset in its own order, and a sampler of the user's as in epoch 0.

    Example:
        >>> found = KeyedLoader(DataLoader(range(6), batch_size=2)).epoch(Span(seed=0, epoch=0, start=1))
        >>> [(batch.tolist(), samples, last) for batch, samples, last in found]
        [([2, 3], 2, False), ([4, 5], 2, True)]
    """

    loader: DataLoader[Any]
    shuffle: bool = True
    _kept: dict[str, DataLoader[Any]] = attrs.field(factory=dict, init=False, repr=False)
    _listeners: tuple[Listener, ...] = attrs.field(init=False, repr=False, default=_OWN_LISTENERS)
    _reseed: tuple[Reseed, ...] = attrs.field(init=False, repr=False, default=_OWN_GENERATORS)
    _ahead: list["_Begun"] = attrs.field(factory=list, init=False, repr=False)  # the next epoch, if its workers are at it already

    def _keyed(self, told: int) -> "_Keyed":
        return _Keyed.of(self.loader, self._reseed, told, torch.tensor(told).share_memory_() if self._listeners else None)

    def epoch(self, span: Span) -> Iterator[tuple[Any, int | None, bool]]:
        """A part of an epoch as ``(batch, samples, last)``; samples is None where the dataset makes the batches itself.

        Samples that are read in this process draw from the global generators, which are seeded for each; the caller puts them back.
        """
        told = span.epoch if self.shuffle else 0
        for tell in self._listeners:
            tell(told)
        if self.loader.num_workers or self.loader.pin_memory:
            return self._elsewhere(span)
        return self._here(self._todo(span), told)

    def _todo(self, span: Span) -> Iterator[Todo]:
        found, collated = tasks(self.loader, span, self.shuffle), self.loader.batch_sampler is not None
        if span.share is not None and collated:
            return span.share.tasks(found)
        return ((task, len(task[1]) if collated else None, None) for task in found)

    def _here(self, todo: Iterator[Todo], told: int) -> Iterator[tuple[Any, int | None, bool]]:
        """Batches read in this process, without a loader of ours: nothing of it would be needed."""
        keyed, collate = self._keyed(told), self.loader.collate_fn
        read = keyed.__getitems__ if self.loader.batch_sampler is not None else keyed.__getitem__
        now = next(todo, None)
        while now is not None:
            after, (task, samples, counts) = next(todo, None), now
            batch = collate(read(task))
            yield batch if counts is None else Part(batch, counts), samples, after is None
            now, batch = after, None

    def _elsewhere(self, span: Span) -> Iterator[tuple[Any, int | None, bool]]:
        """Batches read by workers, or put into pinned memory; those of the next epoch start as soon as these have no more to begin."""
        begun = self._ahead.pop() if self._ahead else None
        if begun is None or not begun.is_of(span):
            begun = self._begin(span)
        lone = self.loader.num_workers > 0 and not self.loader.persistent_workers
        follows = span.ahead and lone and not self._listeners  # what is told the epoch is told when it begins
        try:
            for batch in begun.batches:
                if follows and begun.marks[-1][2]:
                    follows = False
                    with early():
                        self._ahead.append(self._begin(span.following()))
                samples, counts, last = begun.marks.popleft()
                yield batch if counts is None else Part(batch, counts), samples, last
                batch = None  # not kept while the next one is fetched
        except BaseException:  # the run is over, or broken
            self._ahead.clear()
            raise

    def _begin(self, span: Span) -> "_Begun":
        marks: Marks = deque()
        todo = _marked(self._todo(span), marks)
        return _Begun(span, iter(Started(self._inner(span, todo))), marks)

    def _inner(self, span: Span, todo: Iterator[Task]) -> DataLoader[Any]:
        """A loader of ours that goes over the tasks; one for all epochs where the workers persist."""
        inner, loader, told = self._kept.get("inner"), self.loader, span.epoch if self.shuffle else 0
        if inner is None:
            place: dict[str, Any] = (
                {"batch_sampler": _Feed()} if loader.batch_sampler is not None else {"batch_size": None, "sampler": _Feed()}
            )
            keyed: Any = self._keyed(told)
            inner = DataLoader(keyed, **place, **options_of(loader, span.key(SAMPLE)))
            if loader.persistent_workers:
                self._kept["inner"] = inner
        feed: Any = inner.sampler if inner.batch_sampler is None else inner.batch_sampler
        feed.tasks = todo
        read: Any = inner.dataset
        if read.epoch is not None:
            read.epoch.fill_(told)
        return inner


@attrs.frozen(eq=False, repr=False)
class _Begun:
    """An epoch whose workers have started: its batches, and what is noted of those that were handed out."""

    span: Span
    batches: Iterator[Any]
    marks: Marks

    def is_of(self, span: Span) -> bool:
        """Say whether it is this part of this epoch."""
        a, b = self.span, span
        return (a.seed, a.epoch, a.start, a.stop, a.stream) == (b.seed, b.epoch, b.start, b.stop, b.stream)


def _marked(todo: Iterator[Todo], marks: Marks) -> Iterator[Task]:
    """Note of every task that is handed out its samples, what they count, and whether it is the last: a look-ahead on indices only."""
    now = next(todo, None)
    while now is not None:
        after, (task, samples, counts) = next(todo, None), now
        marks.append((samples, counts, after is None))
        yield task
        now = after


@attrs.define(eq=False, repr=False)
class _Feed:
    """The sampler of a loader of ours; what it gives is set anew for every epoch."""

    tasks: Iterator[Task] | None = None

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks or ())


@attrs.frozen(eq=False, repr=False)
class _Keyed:
    """The user's dataset, read by tasks; workers may get it pickled, so it lies at the top of its module."""

    dataset: Any
    batched: bool
    draws: bool
    collates: bool
    reseed: tuple[Reseed, ...]  # generators of the dataset's own
    epoch: Tensor | None  # where something wants to know it: in shared memory, for workers that persist
    told: list[int]  # the epoch that the dataset was told last

    @classmethod
    def of(cls, loader: DataLoader[Any], reseed: tuple[Reseed, ...], told: int, epoch: Tensor | None) -> "_Keyed":
        dataset = loader.dataset
        own, draws = loader.collate_fn not in (default_collate, default_convert), _draws(dataset)
        batched = callable(getattr(_innermost(dataset), "__getitems__", None))
        return cls(dataset=dataset, batched=batched, draws=draws, collates=own, reseed=reseed, epoch=epoch, told=[told])

    def __getitems__(self, task: Task) -> Any:
        key, ids, indices = task
        self._tell()
        if self.batched:
            samples = self._read(self.dataset.__getitems__, fold_in(key, *ids[:1]), indices)
        elif self.draws:
            samples = [self._read(self.dataset.__getitem__, fold_in(key, i), index) for i, index in zip(ids, indices, strict=True)]
        else:
            samples = [self.dataset[index] for index in indices]
        self._before_collation(key, *ids[:1])
        return samples

    def __getitem__(self, task: Task) -> Any:
        key, ids, index = task
        self._tell()
        sample = self._read(self.dataset.__getitem__, fold_in(key, *ids), index)
        self._before_collation(key, *ids)
        return sample

    def _tell(self) -> None:
        if self.epoch is not None and (epoch := int(self.epoch)) != self.told[0]:
            tell_epoch(self.dataset, epoch)
            self.told[0] = epoch

    def _read(self, getter: Callable[[Any], Any], key: int, index: Any) -> Any:
        if self.draws:
            seed_generators(key)
            for reseed in self.reseed:
                reseed(key)
        return getter(index)

    def _before_collation(self, key: int, *ids: int) -> None:
        if self.collates:
            seed_generators(fold_in(key, COLLATE, *ids))


def _innermost(dataset: Any) -> Any:
    """What a Subset is a part of: its own ``__getitems__`` only asks that one."""
    return _innermost(dataset.dataset) if type(dataset) is Subset else dataset


def _draws(dataset: Any) -> bool:
    """Whether reading a sample may draw random numbers; only what is known not to is spared the seeding."""
    if type(dataset) is Subset:
        return _draws(dataset.dataset)
    if type(dataset) is ConcatDataset or type(dataset) is StackDataset:
        parts: Any = dataset.datasets
        return any(_draws(part) for part in (parts.values() if isinstance(parts, dict) else parts))
    return type(dataset) not in _DRAW_NOTHING
