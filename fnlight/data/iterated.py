"""Loaders and streams that are iterated, from their beginning; what they remember of earlier epochs is put where it was.

Not part of `fnlight.data.readers`, which chooses a reader: this one has most to look after.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from fnlight.data.combine import Triple
from fnlight.data.counters import Counters
from fnlight.data.digest import digest_of
from fnlight.data.epochs import tell_epoch
from fnlight.data.known import iter_is_itself
from fnlight.data.order import Span, length_of
from fnlight.data.reading import looking_ahead, seeded, skip
from fnlight.data.stream import KeyedStream
from fnlight.errors import LoaderError, LoaderWarning, warn
from fnlight.tensors import LOADER


@attrs.frozen(eq=False, repr=False)
class Iterated:
    """Anything that can be iterated.

    Args:
        loader: The user's loader.
        shuffle: False seeds the generators as in epoch 0.
        stream: The same loader, made anew for every epoch, to be iterated instead.

    Example:
        >>> list(Iterated(range(2), shuffle=True).epoch(Span(seed=0, epoch=0)))
        [(0, 1, False), (1, 1, True)]
    """

    loader: Any
    shuffle: bool
    stream: KeyedStream | None = None
    counters: Counters = attrs.field(init=False, default=attrs.Factory(lambda self: Counters(self.loader), takes_self=True))
    _place: dict[str, Any] = attrs.field(
        factory=dict, init=False, repr=False
    )  # what was remembered as the epoch began, and which one follows

    def length(self) -> int | None:
        """Batches in an epoch, if the loader says; it is not relied on to find the last."""
        return length_of(self.loader)

    def position(self, ended: bool) -> dict[str, Any]:
        """What the loader remembered as the epoch began, or once it has ended, and the digest of the epoch's first batch."""
        began, first = self._place.get("began", {}), self._place.get("first")
        return {"remembers": self.counters.changed(), "before": began, "first": first} if ended else {"remembers": began, "first": first}

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        keyed, stream = self._keyed(span), self.stream
        here = stream is None or stream.workers(keyed) == 0  # batches are made in this process, and the generators are seeded for it
        known = self._begin(keyed, here)
        found = seeded(self._source(keyed), keyed.key(LOADER), span.start if span.entered else 0, here)
        if not span.entered:
            found = found if known else self._doubted(found)
            found = self._noted(found, span) if here else found
            skip(found, span, self.loader)
        if stream is None or not span.ahead:
            yield from looking_ahead(found, span, self.loader)
            return
        try:
            yield from looking_ahead(found, span, self.loader, end=lambda: stream.begin_ahead(self._keyed(span.following())))
        except BaseException:  # the run is over, or broken
            stream.forget()
            raise

    def leave(self) -> None:
        """Make what the loader remembers what it was at first."""
        self.counters.put({})

    def _source(self, span: Span) -> Iterable[Any]:
        return self.loader if self.stream is None else self.stream.fresh(span)

    def _begin(self, span: Span, here: bool) -> bool:
        """Put what the loader remembers where it was, and tell the epoch; say whether it is known where that was."""
        given = span.position
        known = isinstance(given, Mapping) or span.epoch in (0, self._place.get("next"))
        if isinstance(given, Mapping):
            self._check_again(span, given)
            if here and span.epoch and given.get("first") is not None and "before" in given:
                self._try_before(span, given)
            self.counters.put(given.get("remembers", {}))
        elif span.epoch == 0:
            self.counters.put({})
        tell_epoch(self.loader, span.epoch)
        self._place.update(began=self.counters.changed(), next=span.epoch + 1, first=None)
        return known

    def _check_again(self, span: Span, given: Mapping[str, Any]) -> None:
        """Refuse an iterator whose earlier epochs are gone."""
        if span.epoch and "first" in given and iter_is_itself(self.loader):
            raise LoaderError(
                f"the {type(self.loader).__name__} is an iterator, so it can be iterated only once, but {span.epoch} epochs of it were read before the "
                "state was saved; make it for each epoch, with fl.per_epoch(lambda seed, epoch: ...), or pass an iterable that begins anew each time"
            )

    def _try_before(self, span: Span, given: Mapping[str, Any]) -> None:
        """Read the first batch of the epoch before once more: where it is another one, the loader remembers what cannot be put back."""
        before = attrs.evolve(span, epoch=span.epoch - 1, position=None)
        self.counters.put(given["before"])
        tell_epoch(self.loader, before.epoch)
        for batch in itertools.islice(seeded(self._source(before), before.key(LOADER)), 1):
            _compare(given["first"], batch, self.loader, before.epoch)

    def _noted(self, found: Iterator[Any], span: Span) -> Iterator[Any]:
        """The batches; of the first one, the digest is kept, and compared with that of a run that is resumed."""
        given = span.position if isinstance(span.position, Mapping) and "before" not in span.position else {}
        for number, batch in enumerate(found):
            if number == 0:
                self._place["first"] = digest_of(batch)
                _compare(given.get("first"), batch, self.loader, span.epoch)
            yield batch
            batch = None

    def _doubted(self, found: Iterator[Any]) -> Iterator[Any]:
        """The batches; once the first is there, one sees whether the loader counts epochs, so that this one is not what it was."""
        before = self._place["began"]
        for number, batch in enumerate(found):
            if number == 0 and (counting := sorted(self.counters.changed().keys() ^ before.keys())):
                warn(
                    f"this {type(self.loader).__name__} counts its epochs itself, in {', '.join(counting)}, and the state does not say where it stood: "
                    "it begins as in its first epoch; give it set_epoch(epoch), or make one an epoch with fl.per_epoch(lambda seed, epoch: loader)",
                    LoaderWarning,
                )
            yield batch
            batch = None

    def _keyed(self, span: Span) -> Span:
        return span if self.shuffle else attrs.evolve(span, epoch=0)


def _compare(digest: str | None, batch: Any, loader: Any, epoch: int) -> None:
    """Refuse a loader whose epoch does not begin as it did."""
    if digest is not None and digest_of(batch) != digest:
        raise LoaderError(
            f"this {type(loader).__name__} does not begin epoch {epoch} with the batch with which it began it before the state was saved: its data is "
            "not what it was, or it remembers what cannot be put back, such as an iterator of its own. Give it set_epoch(epoch), or make one an "
            'epoch with fl.per_epoch(lambda seed, epoch: loader); to go on with the data as it is, say FitConfig(allow=("data",))'
        )
