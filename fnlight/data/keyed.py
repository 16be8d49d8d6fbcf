"""A ``torch.utils.data.DataLoader`` whose order and whose samples' random numbers are functions of (seed, epoch).

The user's loader is read, never iterated: a loader of our own goes over the same dataset with workers of the same kind. What it
hands to them are tasks (`fnlight.data.order`): before sample ``indices[j]`` is read, the global generators are seeded with
``fold_in(key, ids[j])``. So a sample depends neither on the worker that reads it nor on what was read before it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    IterDataPipe,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from fnlight.data.order import Span, Task, tasks
from fnlight.data.part import Part
from fnlight.data.workers import follow, owner
from fnlight.runtime import held_back, leave_to_parent, listening, worker_death
from fnlight.tensors import COLLATE, LOADER, SAMPLE, fold_in, seed_generators

Todo = tuple[Task, int | None, float | None]
"""A task, the samples of its batch (None where the dataset makes the batches itself), and what they count (None for 1)."""

Marks = deque[tuple[int | None, float | None, bool]]
"""Of batches that were handed to workers: their samples, what they count, and whether one is the last."""

_DRAW_NOTHING: frozenset[type] = frozenset({TensorDataset, Tensor, list, tuple, range})
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
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
    _ahead: list["_Begun"] = attrs.field(factory=list, init=False, repr=False)  # the next epoch, if its workers are at it already

    def epoch(self, span: Span) -> Iterator[tuple[Any, int | None, bool]]:
        """A part of an epoch as ``(batch, samples, last)``; samples is None where the dataset makes the batches itself.

        Samples that are read in this process draw from the global generators, which are seeded for each; the caller puts them back.
        """
        if self.loader.num_workers or self.loader.pin_memory:
            return self._elsewhere(span)
        return self._here(self._todo(span))

    def _todo(self, span: Span) -> Iterator[Todo]:
        found, collated = tasks(self.loader, span, self.shuffle), self.loader.batch_sampler is not None
        if span.share is not None and collated:
            return span.share.tasks(found)
        return ((task, len(task[1]) if collated else None, None) for task in found)

    def _here(self, todo: Iterator[Todo]) -> Iterator[tuple[Any, int | None, bool]]:
        """Batches read in this process, without a loader of ours: nothing of it would be needed."""
        keyed, collate = _Keyed.of(self.loader), self.loader.collate_fn
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
        follows = span.ahead and self.loader.num_workers > 0 and not self.loader.persistent_workers
        try:
            for batch in begun.batches:
                if follows and begun.marks[-1][2]:
                    follows = False
                    with _early():
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
        return _Begun(span, iter(_Started(self._inner(span, todo))), marks)

    def _inner(self, span: Span, todo: Iterator[Task]) -> DataLoader[Any]:
        """A loader of ours that goes over the tasks; one for all epochs where the workers persist."""
        inner, loader = self._kept.get("inner"), self.loader
        if inner is None:
            place: dict[str, Any] = (
                {"batch_sampler": _Feed()} if loader.batch_sampler is not None else {"batch_size": None, "sampler": _Feed()}
            )
            keyed: Any = _Keyed.of(loader)
            inner = DataLoader(keyed, **place, **_options(loader, span.key(SAMPLE)))
            if loader.persistent_workers:
                self._kept["inner"] = inner
        feed: Any = inner.sampler if inner.batch_sampler is None else inner.batch_sampler
        feed.tasks = todo
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

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> "_Keyed":
        dataset = loader.dataset
        own = loader.collate_fn not in (default_collate, default_convert)
        return cls(dataset, callable(getattr(_innermost(dataset), "__getitems__", None)), _draws(dataset), own)

    def __getitems__(self, task: Task) -> Any:
        key, ids, indices = task
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
        sample = self._read(self.dataset.__getitem__, fold_in(key, *ids), index)
        self._before_collation(key, *ids)
        return sample

    def _read(self, getter: Callable[[Any], Any], key: int, index: Any) -> Any:
        if self.draws:
            seed_generators(key)
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


@attrs.frozen(eq=False, repr=False)
class KeyedStream:
    """A ``DataLoader`` over an ``IterableDataset``, whose workers begin with keyed generators.

    Args:
        loader: The user's loader.

    Example:
        >>> class Numbers(IterableDataset):
        ...     def __iter__(self):
        ...         return iter(range(4))
        >>> [batch.tolist() for batch in KeyedStream(DataLoader(Numbers(), batch_size=2)).fresh(Span(seed=0, epoch=0))]
        [[0, 1], [2, 3]]
    """

    loader: DataLoader[Any]
    _kept: dict[str, DataLoader[Any]] = attrs.field(factory=dict, init=False, repr=False)
    _ahead: dict[int, Iterator[Any]] = attrs.field(factory=dict, init=False, repr=False)  # by its key, the epoch whose workers have started

    def fresh(self, span: Span) -> Iterable[Any]:
        """A loader of ours for one epoch, or what it yields where its workers have started; one for all epochs where they persist."""
        begun = self._ahead.pop(span.key(LOADER), None)
        self._ahead.clear()
        return _Started(self._inner(span)) if begun is None else begun

    def begin_ahead(self, span: Span) -> None:
        """Start the workers of an epoch whose turn comes next."""
        if self.loader.num_workers and not self.loader.persistent_workers:
            with _early():
                self._ahead[span.key(LOADER)] = iter(_Started(self._inner(span)))

    def forget(self) -> None:
        """Let workers go whose epoch will not be read."""
        self._ahead.clear()

    def _inner(self, span: Span) -> DataLoader[Any]:
        loader, key = self.loader, span.key(LOADER)
        inner = self._kept.get("inner")
        if inner is None:
            dataset: Any = loader.dataset
            sown = loader.num_workers and not isinstance(dataset, IterDataPipe)
            inner = DataLoader(
                _Sown(dataset) if sown else dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **_options(loader, key)
            )
            if loader.persistent_workers:
                self._kept["inner"] = inner
        if isinstance(inner.dataset, _Sown):
            inner.dataset.key.fill_(key >> 1)
        if inner.generator is not None:
            inner.generator.manual_seed(key >> 1)
        return inner


@attrs.frozen(eq=False, repr=False)
class _Started:
    """A loader of ours whose workers are started while signals are held back, and are named when they die."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        with held_back():
            found = iter(self.loader)
        return _named(found)


@contextmanager
def _early() -> Iterator[None]:
    """What is wrong with the next epoch is said when it is its turn, if it comes to that; but not that a worker of this one has died."""
    try:
        yield
    except Exception as error:
        if worker_death(error) is not None:
            raise


def _named(found: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from found
    except RuntimeError as error:
        dead = worker_death(error)
        if dead is None:
            raise
        raise dead from error


class _Sown(IterableDataset[Any]):
    """The user's stream, begun in every worker with generators seeded from a key in shared memory, which workers that persist see."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.key = torch.zeros((), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        seed_generators(fold_in(int(self.key), info.id if info is not None else 0))
        return iter(self.dataset)


@attrs.frozen(eq=False, repr=False)
class _Begin:
    """What a worker does first: follow its parent into death, leave signals to it, show the user's own dataset to ``worker_init_fn`` and ``get_worker_info``."""

    fn: Callable[[int], None] | None
    listening: tuple[int, ...]
    parent: int | None

    def __call__(self, worker_id: int) -> None:
        follow(self.parent)
        leave_to_parent(self.listening)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _Keyed | _Sown):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses to be written otherwise
        if self.fn is not None:
            self.fn(worker_id)


def _options(loader: DataLoader[Any], key: int) -> dict[str, Any]:
    """How the user's loader loads; with a generator of its own, so that the global one is not drawn from."""
    options = {name: getattr(loader, name) for name in _OPTIONS}
    if getattr(loader, "pin_memory_device", ""):
        options["pin_memory_device"] = loader.pin_memory_device
    generator = torch.Generator().manual_seed(key >> 1)  # workers are seeded from what it gives
    begin = _Begin(loader.worker_init_fn, listening(), owner(loader.multiprocessing_context)) if loader.num_workers else None
    return {**options, "generator": generator, "worker_init_fn": begin}
