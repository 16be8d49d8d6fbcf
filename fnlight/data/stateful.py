"""Loaders that keep their own place, with ``state_dict`` and ``load_state_dict``: they are put there rather than read up to there.

Not part of `fnlight.data.iterated`: what such a loader remembers is its own affair.
"""

import copy
from collections.abc import Iterator
from typing import Any

import attrs

from fnlight.data.combine import Triple
from fnlight.data.epochs import tell_epoch
from fnlight.data.order import Span, length_of
from fnlight.data.reading import counting, first_of, looking_ahead, seeded, skip
from fnlight.tensors import LOADER


@attrs.frozen(eq=False, repr=False)
class Stateful:
    """A loader that keeps its own place.

    Args:
        loader: The user's loader, with ``state_dict`` and ``load_state_dict``.
        shuffle: False seeds the generators as in epoch 0.

    Example:
        >>> Stateful([], shuffle=True).length()
        0
    """

    loader: Any
    shuffle: bool
    _ahead: list[Any] = attrs.field(factory=list, init=False, repr=False)
    _first: list[Any] = attrs.field(factory=list, init=False, repr=False)  # the place before anything was read

    def length(self) -> int | None:
        """Batches in an epoch, if the loader says; it is relied on to find the last, so that nothing is read ahead."""
        return length_of(self.loader)

    def position(self, ended: bool) -> Any:  # noqa: ARG002  # other readers need it
        """The loader's place after the batch that was handed out last."""
        return self._ahead[0] if self._ahead else self.loader.state_dict()

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch; where the span has a position, the loader is put there rather than read up to there."""
        loader, length = self.loader, self.length()
        keyed = span if self.shuffle else attrs.evolve(span, epoch=0)
        key = keyed.key(LOADER)
        if not self._first:
            self._first.append(copy.deepcopy(loader.state_dict()))
        tell_epoch(loader, keyed.epoch)
        if span.position is None:
            found = seeded(loader, key)
            skip(found, span, loader)
        else:
            loader.load_state_dict(copy.deepcopy(span.position))
            found = seeded(loader, key, span.start)
            if span.start == 0:  # a place at the end of an epoch, after which some loaders yield nothing once
                found = first_of(found, seeded(loader, key))
        self._ahead.clear()
        if length is None:
            yield from looking_ahead(found, span, loader, self._mark)
        else:
            yield from counting(found, span, length if span.stop is None else min(length, span.stop), loader)

    def leave(self) -> None:
        """Put the loader where it was before anything was read."""
        if self._first:
            self.loader.load_state_dict(self._first.pop())

    def _mark(self) -> None:
        self._ahead[:] = [copy.deepcopy(self.loader.state_dict())]
