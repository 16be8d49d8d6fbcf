"""How each kind of loader is read: a reader knows the length of an epoch and yields any part of it, as ``(batch, samples, last)``."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
from torch.utils.data import DataLoader, IterableDataset

from fnlight.data.combine import Triple
from fnlight.data.keyed import KeyedLoader, KeyedStream
from fnlight.data.order import Span, check_start, length_of
from fnlight.data.samples import num_samples
from fnlight.data.share import Sharded
from fnlight.data.tensor_loader import Held, TensorLoader
from fnlight.errors import LoaderError, LoaderWarning, warn
from fnlight.tensors import LOADER, fold_in, has_own_iterator, seed_generators

_END: Any = object()


def reader_of(loader: Any, shuffle: bool) -> "Listed | Held | Mapped | Stateful | Iterated":
    """Choose how a loader is read.

    Args:
        loader: An iterable of batches.
        shuffle: False takes a shuffled dataset in its own order, and anything random as in epoch 0.

    Returns:
        A reader, with ``length()`` and ``epoch(span)``.

    Example:
        >>> reader_of([1, 2], shuffle=True).length()
        2
    """
    if isinstance(loader, Sharded):
        inner = reader_of(loader.loader, shuffle)
        return Iterated(loader.loader, shuffle) if isinstance(inner, Stateful) else inner  # each rank would keep another place
    if isinstance(loader, list | tuple):
        return Listed(loader)
    if isinstance(loader, TensorLoader):
        return Held(loader, shuffle)
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return Stateful(loader, shuffle)
    if not isinstance(loader, DataLoader) or has_own_iterator(loader):
        return Iterated(loader, shuffle)
    if isinstance(loader.dataset, IterableDataset):
        return Iterated(loader, shuffle, KeyedStream(loader), loader.num_workers == 0)
    return Mapped(loader, KeyedLoader(loader, shuffle))


def nothing(loader: Any, epoch: int) -> LoaderError:
    """The error of an epoch without a batch.

    Args:
        loader: What yielded nothing.
        epoch: In which epoch.

    Returns:
        The error, to be raised.

    Example:
        >>> str(nothing([], 3))[:40]
        'the list yielded no batch in epoch 3; ex'
    """
    kind = type(loader).__name__
    if iter(loader) is loader:
        return LoaderError(
            f"the {kind} yielded no batch in epoch {epoch}: it is an iterator, which can be iterated only once, and it is exhausted; "
            "pass an iterable that starts again for each epoch, such as a DataLoader or a list"
        )
    return LoaderError(f"the {kind} yielded no batch in epoch {epoch}; expected at least one: check where the data is read")


@attrs.frozen(eq=False, repr=False)
class Listed:
    """Batches in memory.

    Args:
        loader: A list or tuple of batches.

    Example:
        >>> list(Listed(["a", "b"]).epoch(Span(seed=0, epoch=0, start=1)))
        [('b', 1, True)]
    """

    loader: Any

    def length(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        found = self.loader
        end = len(found) if span.stop is None else min(len(found), span.stop)
        check_start(span, end, found)
        if not end:
            raise nothing(found, span.epoch)
        final = end - 1
        for i in range(span.start, end):
            batch = found[i]
            yield batch, num_samples(batch), i == final


@attrs.frozen(eq=False, repr=False)
class Mapped:
    """A map-style ``DataLoader``.

    Args:
        loader: The user's loader.
        keyed: The same, read in keyed order.

    Example:
        >>> reader = reader_of(DataLoader(range(3)), shuffle=True)
        >>> [batch.tolist() for batch, samples, last in reader.epoch(Span(seed=0, epoch=0))]
        [[0], [1], [2]]
    """

    loader: Any
    keyed: KeyedLoader

    @property
    def shares(self) -> bool:
        """Whether a rank reads only its own samples: where it knows which ones make a batch."""
        return self.loader.batch_sampler is not None

    def length(self) -> int | None:
        """Batches in an epoch, if the sampler says."""
        return length_of(self.loader)

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        empty = span.start == 0 and not (span.share is not None and span.share.whole)  # where a rank may have nothing to evaluate
        for batch, samples, last in self.keyed.epoch(span):
            empty = False
            yield batch, num_samples(batch) if samples is None else samples, last
            batch = None
        if empty:
            raise nothing(self.loader, span.epoch)


@attrs.frozen(eq=False, repr=False)
class Iterated:
    """Anything that can be iterated.

    Args:
        loader: The user's loader.
        shuffle: False seeds the generators as in epoch 0.
        stream: The same loader, made anew for every epoch, to be iterated instead.
        seeds: Whether batches are made in this process, and the generators are seeded for it.

    Example:
        >>> list(Iterated(range(2), shuffle=True).epoch(Span(seed=0, epoch=0)))
        [(0, 1, False), (1, 1, True)]
    """

    loader: Any
    shuffle: bool
    stream: KeyedStream | None = None
    seeds: bool = True

    def length(self) -> int | None:
        """Batches in an epoch, if the loader says; it is not relied on to find the last."""
        return length_of(self.loader)

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        keyed, stream = self._keyed(span), self.stream
        found = _seeded(self.loader if stream is None else stream.fresh(keyed), keyed.key(LOADER), 0, self.seeds)
        _skip(found, span, self.loader)
        if stream is None or not span.ahead:
            yield from _looking_ahead(found, span, self.loader)
            return
        try:
            yield from _looking_ahead(found, span, self.loader, end=lambda: stream.begin_ahead(self._keyed(span.following())))
        except BaseException:  # the run is over, or broken
            stream.forget()
            raise

    def _keyed(self, span: Span) -> Span:
        return span if self.shuffle else attrs.evolve(span, epoch=0)


@attrs.frozen(eq=False, repr=False)
class Stateful:
    """A loader that keeps its own place.

    Args:
        loader: The user's loader, with ``state_dict`` and ``load_state_dict``.
        shuffle: False seeds the generators as in epoch 0.

    Example:
        >>> reader_of([], shuffle=True).__class__.__name__  # a list keeps no place
        'Listed'
    """

    loader: Any
    shuffle: bool
    _ahead: list[Any] = attrs.field(factory=list, init=False, repr=False)

    def length(self) -> int | None:
        """Batches in an epoch, if the loader says; it is relied on to find the last, so that nothing is read ahead."""
        return length_of(self.loader)

    def position(self) -> Any:
        """The loader's place behind the batch that was handed out last."""
        return self._ahead[0] if self._ahead else self.loader.state_dict()

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch; where the span has a position, the loader is put there rather than read up to there."""
        loader, length = self.loader, self.length()
        key = (span if self.shuffle else attrs.evolve(span, epoch=0)).key(LOADER)
        if span.position is None:
            found = _seeded(loader, key)
            _skip(found, span, loader)
        else:
            loader.load_state_dict(copy.deepcopy(span.position))
            found = _seeded(loader, key, span.start)
            if span.start == 0:  # a place at the end of an epoch, behind which some loaders yield nothing once
                found = _first_of(found, _seeded(loader, key))
        self._ahead.clear()
        if length is None:
            yield from _looking_ahead(found, span, loader, self._mark)
        else:
            yield from _counting(found, span, length if span.stop is None else min(length, span.stop), loader)

    def _mark(self) -> None:
        self._ahead[:] = [copy.deepcopy(self.loader.state_dict())]


def _seeded(iterable: Iterable[Any], key: int, number: int = 0, seeds: bool = True) -> Iterator[Any]:
    """Batches, before each of which the generators are seeded from its number."""
    if seeds:
        seed_generators(key)
    iterator = iter(iterable)
    for i in itertools.count(number):
        if seeds:
            seed_generators(fold_in(key, i))
        batch = next(iterator, _END)
        if batch is _END:
            return
        yield batch
        batch = None  # not kept while the next one is fetched


def _first_of(one: Iterator[Any], other: Iterator[Any]) -> Iterator[Any]:
    """The one, or the other if it is empty."""
    empty = True
    for batch in one:
        empty = False
        yield batch
        batch = None
    if empty:
        yield from other


def _skip(found: Iterator[Any], span: Span, loader: Any) -> None:
    if span.start == 0:
        return
    if span.stop is not None:
        check_start(span, span.stop, loader)
    warn(
        f"{span.start} batches of epoch {span.epoch} are read and discarded to reach the position of the state, because a {type(loader).__name__} "
        "can be read only from its start; a map-style DataLoader, a list, or a loader with state_dict and load_state_dict resumes without this",
        LoaderWarning,
    )
    check_start(span, sum(1 for _ in itertools.islice(found, span.start)), loader)


def _looking_ahead(
    found: Iterator[Any], span: Span, loader: Any, mark: Callable[[], None] = lambda: None, end: Callable[[], None] = lambda: None
) -> Iterator[Triple]:
    """Batches of which the last is known by reading one ahead; `mark` is called before that, `end` behind the last one read."""
    number, stop = span.start, span.stop
    batch = _END if number == stop else next(found, _END)
    if batch is _END and number == 0:
        raise nothing(loader, span.epoch)
    while batch is not _END:
        number += 1
        mark()
        after = _END if number == stop else next(found, _END)
        if after is _END:
            end()
        yield batch, num_samples(batch), after is _END
        batch, after = after, None


def _counting(found: Iterator[Any], span: Span, end: int, loader: Any) -> Iterator[Triple]:
    """Batches of which the last is known by a length that is believed: nothing is read ahead."""
    check_start(span, end, loader)
    for number in range(span.start, end):
        batch = next(found, _END)
        if batch is _END:
            raise nothing(loader, span.epoch) if number == 0 else _too_short(loader, span, number)
        yield batch, num_samples(batch), number + 1 == end
        batch = None


def _too_short(loader: Any, span: Span, number: int) -> LoaderError:
    return LoaderError(
        f"the length of this {type(loader).__name__} is {length_of(loader)}, but epoch {span.epoch} ended after {number} batches; "
        "correct its __len__, or remove it"
    )
