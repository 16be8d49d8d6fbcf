"""How each kind of loader is read: a reader knows the length of an epoch and yields any part of it, as ``(batch, samples, last)``."""

from collections.abc import Iterator
from typing import Any

import attrs
from torch.utils.data import IterableDataset

from fnlight.data.combine import Triple
from fnlight.data.iterated import Iterated
from fnlight.data.keyed import KeyedLoader
from fnlight.data.known import is_plain, resumes_itself
from fnlight.data.order import Span, check_start, length_of
from fnlight.data.per_epoch import PerEpoch
from fnlight.data.reading import nothing
from fnlight.data.samples import num_samples
from fnlight.data.share import Sharded
from fnlight.data.stateful import Stateful
from fnlight.data.stream import KeyedStream
from fnlight.data.tensor_loader import Held, TensorLoader

__all__ = ["Epochs", "Iterated", "Listed", "Mapped", "Stateful", "num_samples", "reader_of"]


def reader_of(loader: Any, shuffle: bool) -> "Listed | Held | Mapped | Stateful | Iterated | Epochs":
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
    if isinstance(loader, PerEpoch):
        return Epochs(loader, shuffle)
    if isinstance(loader, list | tuple):
        return Listed(loader)
    if isinstance(loader, TensorLoader):
        return Held(loader, shuffle)
    if is_plain(loader):
        if not isinstance(loader.dataset, IterableDataset):
            return Mapped(loader, KeyedLoader(loader, shuffle))
        if not resumes_itself(loader):
            return Iterated(loader, shuffle, KeyedStream(loader))
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return Stateful(loader, shuffle)
    return Iterated(loader, shuffle)


@attrs.frozen(eq=False, repr=False)
class Epochs:
    """A loader that is made for each epoch.

    Args:
        loader: Says how.
        shuffle: False makes that of epoch 0 for all of them.

    Example:
        >>> list(Epochs(PerEpoch(lambda seed, epoch: [epoch, seed]), shuffle=True).epoch(Span(seed=5, epoch=1)))
        [(1, 1, False), (5, 1, True)]
    """

    loader: PerEpoch
    shuffle: bool

    def length(self) -> int | None:
        """Batches in an epoch, if it was said."""
        return self.loader.num_batches

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        keyed = attrs.evolve(span, epoch=span.epoch if self.shuffle else 0, ahead=False, position={"remembers": {}})
        enters = self.loader.enters and span.start > 0
        made = self.loader.made(keyed.seed, keyed.epoch, span.start)
        reader = Iterated(made, self.shuffle) if enters else reader_of(made, self.shuffle)
        position = {"remembers": {}} if isinstance(reader, Iterated) else None  # it is new: it remembers nothing
        yield from reader.epoch(attrs.evolve(keyed, entered=enters, position=position))


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
        >>> from torch.utils.data import DataLoader
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
