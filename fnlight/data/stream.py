"""A ``torch.utils.data.DataLoader`` over an ``IterableDataset``, whose random numbers are functions of (seed, epoch).

Not part of `fnlight.data.keyed`, which reads samples by their index: a stream is read from its beginning, and by as many workers as it was begun with.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, get_worker_info

from fnlight.data.counters import Counters
from fnlight.data.epochs import listeners, tell_epoch
from fnlight.data.order import Span
from fnlight.data.workers import Started, early, options_of
from fnlight.tensors import LOADER, fold_in, seed_generators


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

    def workers(self, span: Span) -> int:
        """How many workers read an epoch: those of the loader, or as many as it was begun with."""
        return self.loader.num_workers if span.workers is None else span.workers

    def fresh(self, span: Span) -> Iterable[Any]:
        """A loader of ours for one epoch, or what it yields where its workers have started; one for all epochs where they persist."""
        begun = self._ahead.pop(span.key(LOADER), None)
        self._ahead.clear()
        return Started(self._inner(span)) if begun is None else begun

    def begin_ahead(self, span: Span) -> None:
        """Start the workers of an epoch whose turn comes next; not where something is told the epoch, since it may be told another one before."""
        if self.loader.num_workers and not self.loader.persistent_workers and not listeners(self.loader):
            with early():
                self._ahead[span.key(LOADER)] = iter(Started(self._inner(span)))

    def forget(self) -> None:
        """Let workers go whose epoch will not be read."""
        self._ahead.clear()

    def _inner(self, span: Span) -> DataLoader[Any]:
        loader, key, workers = self.loader, span.key(LOADER), self.workers(span)
        lasting = loader.persistent_workers and workers == loader.num_workers
        inner = self._kept.get("inner") if lasting else None
        if inner is None:
            dataset: Any = loader.dataset
            sown = workers and not isinstance(dataset, IterDataPipe)
            inner = DataLoader(
                _Sown(dataset) if sown else dataset,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                **options_of(loader, key, workers),
            )
            if lasting:
                self._kept["inner"] = inner
        if isinstance(inner.dataset, _Sown):
            inner.dataset.told.copy_(torch.tensor([key >> 1, span.epoch]))
        if inner.generator is not None:
            inner.generator.manual_seed(key >> 1)
        return inner


class _Sown(IterableDataset[Any]):
    """The user's stream, begun in every worker with generators seeded from a key in shared memory, which workers that persist see.

    It begins each epoch with what it remembers as it was at first, so that workers that persist read what new ones would.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.told = torch.zeros(2, dtype=torch.int64).share_memory_()  # the key and the epoch
        self.counters: Counters | None = None

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        key, epoch = self.told.tolist()
        if self.counters is None:
            self.counters = Counters(self.dataset)
        else:
            self.counters.put({})
        tell_epoch(self.dataset, epoch)
        seed_generators(fold_in(key, info.id if info is not None else 0))
        return iter(self.dataset)
