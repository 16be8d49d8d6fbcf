"""A loader as a function of (seed, epoch): the same batches for any number of workers, starting at any batch."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fnlight.data.combine import Combined, Triple
from fnlight.data.epochs import tell_epoch
from fnlight.data.known import is_dataset, is_loader
from fnlight.data.order import Span, check_start, length_of
from fnlight.data.part import Part
from fnlight.data.per_epoch import PerEpoch
from fnlight.data.readers import Epochs, Iterated, Listed, Stateful, reader_of
from fnlight.data.share import Sharded, Share
from fnlight.data.tensor_loader import Held
from fnlight.data.transfer import transferred
from fnlight.errors import LoaderError, LoaderWarning, warn
from fnlight.tensors import ORDER, RANK, fold_in


def check_loader(loader: Any, what: str) -> None:
    """Raise if a value is not a loader.

    Args:
        loader: What was given.
        what: How the message calls it.

    Raises:
        TypeError: If it is not an iterable of batches; the message says what to pass instead.

    Example:
        >>> check_loader([torch.zeros(2)], "Loaders(train=...)")
    """
    loader = loader.loader if isinstance(loader, Sharded) else loader
    if isinstance(loader, Source | Combined | PerEpoch | DataLoader | list | tuple) or is_loader(loader):
        return
    kind = type(loader).__name__
    says = f"{what} must be an iterable of batches, such as a DataLoader or a list, but got "
    if isinstance(loader, Mapping):
        if loader.keys() <= {"train", "val", "test", "predict"}:
            raise TypeError(f"{says}a mapping of {list(loader)}; give fl.Loaders({', '.join(f'{use}=...' for use in loader)})")
        raise TypeError(f"{says}a mapping of {list(loader)}; join loaders with fl.zip_longest(**loaders), fl.zip_shortest or fl.concat")
    if (
        isinstance(loader, Dataset)
        or is_dataset(loader)
        or (callable(getattr(loader, "__getitem__", None)) and not isinstance(loader, Iterable))
    ):
        raise TypeError(
            f"{says}the dataset {kind}; wrap it: DataLoader(dataset, batch_size=32), or with batch_size=None if it yields whole batches"
        )
    if isinstance(loader, Tensor | str | bytes):
        raise TypeError(f"{says}{kind}; for one batch write [batch], for the rows of a tensor fl.TensorLoader(tensor, batch_size=32)")
    if not isinstance(loader, Iterable):
        hint = "; call it if it returns a loader" if callable(loader) else ""
        raise TypeError(f"{says}{kind}{hint}")


@attrs.frozen(eq=False)
class Source:
    """A loader, read as a function of (seed, epoch); the loader itself is told the epoch, where it wants to know it, and else not changed.

    - A list or tuple of batches is indexed.
    - A `TensorLoader` gathers the rows of a keyed order.
    - A map-style ``DataLoader`` is read in keyed order, with random numbers keyed for each sample; see `fnlight.data.keyed`.
    - A loader with ``state_dict`` and ``load_state_dict`` is iterated, and asked for its own place.
    - Loaders joined by `zip_shortest`, `zip_longest` or `concat` are sources themselves, keyed by their place.
    - Anything else is iterated, with generators seeded before each batch; batches are skipped by reading them.

    Batches that are read in this process draw from the global generators, which are seeded; the caller puts them back (`rng.isolated`).

    Args:
        loader: The user's loader.
        limit: Batches an epoch at most (int), or a fraction of them in 0..1 (float).
        shuffle: False takes a shuffled dataset in its own order, and anything random as in epoch 0.
        device: Where batches are moved to, without waiting; None or the CPU leaves them as they are.
        ahead: True starts the workers of the next epoch when those of the one before have no more to begin, or where they read a stream, when
            it has ended, so that its first batch need not be waited for; a number does so for epochs below it only, False for none. It
            changes no batch. Only a ``DataLoader`` whose workers do not persist has such.
        share: A rank's share of the data; None reads all of it.
        samples: Says how many samples a batch holds, for batches that do not show it, such as lists of pictures; None counts them.

    Raises:
        TypeError: If the loader is no iterable of batches.
        LoaderError: If it is empty, or the limit leaves nothing or cannot be known.

    Example:
        >>> source = Source(DataLoader(range(6), batch_size=2), limit=2)
        >>> source.num_batches, [batch.tolist() for batch, samples, last in source.epoch(seed=0, epoch=0)]
        (2, [[0, 1], [2, 3]])
    """

    loader: Any
    limit: int | float | None = attrs.field(default=None, kw_only=True)
    shuffle: bool = attrs.field(default=True, kw_only=True)
    device: torch.device | None = attrs.field(default=None, kw_only=True, converter=attrs.converters.optional(torch.device))
    ahead: bool | int = attrs.field(default=True, kw_only=True)
    share: Share | None = attrs.field(default=None, kw_only=True)
    samples: Callable[[Any], int] | None = attrs.field(default=None, kw_only=True)
    _reader: Any = attrs.field(init=False, repr=False)

    @classmethod
    def of(
        cls, loader: Any, *, limit: int | float | None = None, shuffle: bool = True, device: torch.device | str | None = None,
        ahead: bool | int = True, share: Share | None = None,
    ) -> "Source":  # fmt: skip
        """A source of a loader; one that is a source already keeps its own options, but for those that are given here.

        Args:
            loader: A loader or a source.
            limit: As for a source, like the others.
            shuffle: False wins.
            device: One that is not the CPU wins.
            ahead: What is not True wins.
            share: What is not None wins.

        Returns:
            A source.
        """
        if not isinstance(loader, Source):
            return cls(loader, limit=limit, shuffle=shuffle, device=device, ahead=ahead, share=share)
        wanted: dict[str, Any] = {"limit": limit} if limit is not None else {}
        wanted |= {} if shuffle else {"shuffle": False}
        wanted |= {} if device is None or torch.device(device).type == "cpu" else {"device": torch.device(device)}
        wanted |= {} if ahead is True else {"ahead": ahead}
        wanted |= {} if share is None else {"share": share}
        new = {name: value for name, value in wanted.items() if getattr(loader, name) != value}
        return attrs.evolve(loader, **new) if new else loader

    @_reader.default
    def _make_reader(self) -> Any:
        check_loader(self.loader, "a loader")
        return _reader_of(self.loader, self.shuffle, self.share)

    def __attrs_post_init__(self) -> None:
        length = self._reader.length()
        if length == 0:
            raise LoaderError(f"this {type(self.loader).__name__} has no batch: {_why_empty(self.loader)}")
        _check_limit(self.limit, length, self.loader)
        _check_share(self.share, self.loader)

    def _shared(self, span: Span) -> Iterator[Triple]:
        """What of an epoch is this rank's."""
        share: Any = self.share
        if isinstance(self.loader, Sharded) and not share.whole:
            rank = share.world.rank
            return share.agreed(self._reader.epoch(attrs.evolve(span, seed=fold_in(span.seed, RANK + rank) if rank else span.seed)))
        if getattr(self._reader, "shares", False):
            return self._reader.epoch(attrs.evolve(span, share=share))
        if isinstance(self._reader, Iterated | Stateful | Epochs) and not share.whole:
            warn(_reads_all(self.loader), LoaderWarning)
        return share.cut(self._reader.epoch(span))

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, as far as the loader or the limit says; an estimate where the loader's own is one."""
        length, limit = self._reader.length(), self.limit
        if limit is None:
            return length
        if isinstance(limit, float):
            return None if length is None else int(length * limit)
        return limit if length is None else min(limit, length)

    @property
    def keeps_position(self) -> bool:
        """Whether the loader keeps its own place, with ``state_dict`` and ``load_state_dict``."""
        return isinstance(self._reader, Stateful)

    @property
    def reader(self) -> Any:
        """What reads the loader."""
        return self._reader

    @property
    def children(self) -> tuple["Source", ...]:
        """The sources of joined loaders; empty for a single one."""
        return getattr(self._reader, "children", ())

    @property
    def reads_to_skip(self) -> bool:
        """Whether batches are skipped by reading them."""
        return isinstance(self._reader, Iterated) or (isinstance(self._reader, Epochs) and not self.loader.enters)

    @property
    def remembers(self) -> bool:
        """Whether the loader has a place of its own: it keeps one, or it is iterated and may remember earlier epochs."""
        return isinstance(self._reader, Stateful | Iterated)

    def position(self, ended: bool = False) -> Any:
        """What the loader's ``state_dict`` gives after the batch that was handed out last; of others what they remember of earlier epochs.

        Args:
            ended: Whether that batch ends the epoch.
        """
        found, share = self._reader.position(ended), self.share
        apart = share is not None and share.world.size > 1 and isinstance(self.loader, Sharded)
        if not apart or not isinstance(self._reader, Iterated):
            return found
        # one rank saves for all: what is a generator or an order of that rank's own is not given to the others
        return {"remembers": {name: value for name, value in found["remembers"].items() if isinstance(value, int | float | str)}}

    def leave(self) -> None:
        """Make what an iterated loader remembers what it was at first."""
        for each in self.children:
            each.leave()
        if isinstance(self._reader, Iterated | Stateful):
            self._reader.leave()

    @contextmanager
    def aside(self, epoch: int) -> Iterator[None]:
        """Read it beside a training on the same data, which finds it as it left it.

        Args:
            epoch: Where the training stands.
        """
        before = self._reader.counters.changed() if isinstance(self._reader, Iterated) else None
        try:
            yield
        finally:
            if before is not None:
                self._reader.counters.put(before)
            if not isinstance(self._reader, Epochs | Listed | Held) and not self.children:
                tell_epoch(self.loader, epoch, samplers=before is not None)

    def cuts(self, batch: int) -> bool:
        """Whether the limit, not the loader, ends an epoch after so many batches."""
        length = self._reader.length()
        return self.limit is not None and batch == self.num_batches and (length is None or batch < length)

    def epoch(
        self,
        seed: int,
        epoch: int,
        start: int = 0,
        stream: int = ORDER,
        *,
        position: Any = None,
        follows: bool = False,
        workers: int | None = None,
        seen: Callable[[Any], None] | None = None,
    ) -> Iterator[Triple]:
        """The batches of an epoch.

        Args:
            seed: The one source of randomness.
            epoch: The epoch, from 0 on.
            start: The batch to begin with; nothing is yielded if it is the number of batches in the epoch.
            stream: What the data is for; another stream has another order and other random numbers.
            position: Where a loader that keeps its own place stood behind batch `start`; it is put there rather than read up to there. Of others
                that are iterated, what they remembered as the epoch began.
            follows: Whether the next epoch is going to be read from its beginning, as far as the caller knows.
            workers: By how many workers a stream is read, where that is not what its loader says.
            seen: Is given the last batch that is skipped, where batches are skipped by reading them.

        Returns:
            An iterator of ``(batch, samples, last)``.

        Raises:
            LoaderError: If there is no batch, the start lies beyond the end, or an iterator was used up before.
        """
        limited = None if self.limit is None else self.num_batches
        ahead = follows and (self.ahead is True or epoch + 1 < self.ahead)
        span = Span(
            seed=seed,
            epoch=epoch,
            start=start,
            stop=limited,
            stream=stream,
            position=position,
            ahead=ahead,
            workers=workers,
            seen=seen,
        )
        found = self._reader.epoch(span) if self.share is None else self._shared(span)
        if self.samples is not None:
            found = _counted(found, self.samples)
        if self.device is None or self.device.type == "cpu":
            return found
        return transferred(found, self.device)


def _counted(found: Iterator[Triple], samples: Callable[[Any], int]) -> Iterator[Triple]:
    for batch, _, last in found:
        count = samples(batch)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise LoaderError(f"Source(samples=fn) must give the number of samples in a batch, a whole number, but gave {count!r}")
        yield batch, count, last
        batch = None


def _reads_all(loader: Any) -> str:
    return (
        f"every rank reads all batches of this {type(loader).__name__} and keeps its part of each, because its samples cannot be chosen by index; the "
        "result is exact, but all data is read once per rank: if the loader yields different data on each rank, write fl.sharded(loader)"
    )


def _check_parts(batch: Any) -> None:
    parts = batch.values() if batch.__class__ is dict else batch if batch.__class__ is tuple else ()
    if any(part.__class__ is Part for part in parts):
        raise LoaderError(
            "ranks would get uneven parts of loaders that are zipped, and the weight of a loss over several batches is then undefined; give each "
            "loader a batch_size that is a multiple of the number of ranks, and drop_last=True"
        )


def _check_share(share: Share | None, loader: Any) -> None:
    size = getattr(loader, "batch_size", None)
    if share is None or share.whole or not isinstance(size, int) or isinstance(loader, Sharded):
        return
    ranks, kind = share.world.size, type(loader).__name__
    if size < ranks:
        raise LoaderError(
            f"{ranks} ranks share each batch of this {kind}, but batch_size={size} is the global batch size, so some ranks would have no samples; "
            f"use a batch_size of at least {ranks}, fewer processes, or fl.sharded(loader) if each rank has its own data"
        )
    if size % ranks:
        warn(
            f"{ranks} ranks share each batch of batch_size={size}, so they get {size // ranks} or {size // ranks + 1} samples each: the result is exact, "
            f"but the weights of plain losses must be communicated, and some ranks wait; a multiple of {ranks} avoids both",
            LoaderWarning,
        )


def _check_limit(limit: Any, length: int | None, loader: Any) -> None:
    if limit is None:
        return
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not number or limit <= 0 or (isinstance(limit, float) and not limit <= 1):
        raise LoaderError(f"limit must be a number of batches >= 1 (int) or a fraction above 0 and up to 1 (float), but got {limit!r}")
    if isinstance(limit, int):
        return
    if length is None:
        raise LoaderError(f"limit={limit} is a fraction, but this {type(loader).__name__} has no length; give a number of batches")
    if int(length * limit) == 0:
        raise LoaderError(f"limit={limit} of {length} batches leaves none; give at least {1 / length:.3g}, or a number of batches")


def _why_empty(loader: Any) -> str:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        samples = length_of(loader.dataset)
        if samples and loader.drop_last:
            return f"its {samples} samples do not fill a batch of batch_size={loader.batch_size}, and drop_last is True; use a smaller batch_size"
        return f"its dataset {type(loader.dataset).__name__} has {samples} samples; check how the data is read"
    return "it yields nothing; check how the data is read"


def _reader_of(loader: Any, shuffle: bool, share: Share | None) -> Any:
    if not isinstance(loader, Combined):
        return reader_of(loader, shuffle)
    mine = None if share is not None and share.whole else share  # of an evaluation whole batches are left out behind the join
    return _Joined(loader, tuple(_child(each, shuffle, mine) for each in loader.loaders))


def _child(loader: Any, shuffle: bool, share: Share | None) -> Source:
    if not isinstance(loader, Source):
        return Source(loader, shuffle=shuffle, share=share)
    return attrs.evolve(loader, shuffle=loader.shuffle and shuffle, share=share) if loader.share is not share or not shuffle else loader


@attrs.frozen(eq=False, repr=False)
class _Joined:
    """The reader of several loaders at once."""

    loader: Combined
    children: tuple[Source, ...]

    @property
    def shares(self) -> bool:
        return any(child.share is not None for child in self.children)

    def length(self) -> int | None:
        return self.loader.num_batches(self.children)

    def epoch(self, span: Span) -> Iterator[Triple]:
        if span.stop is not None:
            check_start(span, span.stop, self.loader)
        left = None if span.stop is None else span.stop - span.start
        found = self.loader.epoch(self.children, span.seed, epoch=span.epoch, start=span.start, stream=span.stream)
        for done, (batch, samples, last) in enumerate(itertools.islice(found, left), 1):
            _check_parts(batch)
            yield batch, samples, last or done == left
            batch = None
