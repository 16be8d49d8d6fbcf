"""What the readers of loaders that are iterated share: batches one after the other, up to the last, from any one on."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fnlight.data.combine import Triple
from fnlight.data.order import Span, check_start, length_of
from fnlight.data.samples import num_samples
from fnlight.errors import LoaderError, LoaderWarning, warn
from fnlight.tensors import fold_in, seed_generators

END: Any = object()
"""What stands for a batch where there is none."""


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


def seeded(iterable: Iterable[Any], key: int, number: int = 0, seeds: bool = True) -> Iterator[Any]:
    """Batches, before each of which the generators are seeded from its number.

    Args:
        iterable: Gives the batches.
        key: What the generators are seeded from.
        number: That of the first batch.
        seeds: False leaves the generators alone.

    Yields:
        The batches.

    Example:
        >>> list(seeded([1, 2], key=0, seeds=False))
        [1, 2]
    """
    if seeds:
        seed_generators(key)
    iterator = iter(iterable)
    for i in itertools.count(number):
        if seeds:
            seed_generators(fold_in(key, i))
        batch = next(iterator, END)
        if batch is END:
            return
        yield batch
        batch = None  # not kept while the next one is fetched


def first_of(one: Iterator[Any], other: Iterator[Any]) -> Iterator[Any]:
    """The one, or the other if it is empty.

    Args:
        one: Batches.
        other: Batches.

    Yields:
        Those of one of them.

    Example:
        >>> list(first_of(iter([]), iter([1])))
        [1]
    """
    empty = True
    for batch in one:
        empty = False
        yield batch
        batch = None
    if empty:
        yield from other


def skip(found: Iterator[Any], span: Span, loader: Any) -> None:
    """Read and throw away the batches before the one that an epoch is entered at, with a warning that says what it costs.

    Args:
        found: The batches from the first one on.
        span: Where to begin; its `seen` is given the last batch that is thrown away.
        loader: What the messages name.

    Raises:
        LoaderError: If there are not so many.

    Example:
        >>> found = iter([1, 2])
        >>> skip(found, Span(seed=0, epoch=0), [])
        >>> next(found)
        1
    """
    if span.start == 0:
        return
    if span.stop is not None:
        check_start(span, span.stop, loader)
    warn(
        f"{span.start} batches of epoch {span.epoch} are read and discarded to reach the position of the state, because a {type(loader).__name__} "
        "can be read only from its start; a map-style DataLoader, a list, or a loader with state_dict and load_state_dict resumes without this",
        LoaderWarning,
    )
    skipped = deque(enumerate(itertools.islice(found, span.start), 1), maxlen=1)
    number, batch = skipped.pop() if skipped else (0, None)
    check_start(span, number, loader)
    if span.seen is not None:
        span.seen(batch)


def looking_ahead(
    found: Iterator[Any], span: Span, loader: Any, mark: Callable[[], None] = lambda: None, end: Callable[[], None] = lambda: None
) -> Iterator[Triple]:
    """Batches of which the last is known by reading one ahead.

    Args:
        found: The batches.
        span: Where they begin and end.
        loader: What the messages name.
        mark: Called before a batch is read ahead.
        end: Called after the last one was read.

    Yields:
        ``(batch, samples, last)``.

    Raises:
        LoaderError: If there is none.

    Example:
        >>> list(looking_ahead(iter("ab"), Span(seed=0, epoch=0), []))
        [('a', 1, False), ('b', 1, True)]
    """
    number, stop = span.start, span.stop
    batch = END if number == stop else next(found, END)
    if batch is END and number == 0:
        raise nothing(loader, span.epoch)
    while batch is not END:
        number += 1
        mark()
        after = END if number == stop else next(found, END)
        if after is END:
            end()
        yield batch, num_samples(batch), after is END
        batch, after = after, None


def counting(found: Iterator[Any], span: Span, end: int, loader: Any) -> Iterator[Triple]:
    """Batches of which the last is known by a length that is believed: nothing is read ahead.

    Args:
        found: The batches.
        span: Where they begin.
        end: The batch before which they end.
        loader: What the messages name.

    Yields:
        ``(batch, samples, last)``.

    Raises:
        LoaderError: If there are fewer.

    Example:
        >>> list(counting(iter("ab"), Span(seed=0, epoch=0), 2, []))
        [('a', 1, False), ('b', 1, True)]
    """
    check_start(span, end, loader)
    for number in range(span.start, end):
        batch = next(found, END)
        if batch is END:
            raise nothing(loader, span.epoch) if number == 0 else _too_short(loader, span, number)
        yield batch, num_samples(batch), number + 1 == end
        batch = None


def _too_short(loader: Any, span: Span, number: int) -> LoaderError:
    return LoaderError(
        f"the length of this {type(loader).__name__} is {length_of(loader)}, but epoch {span.epoch} ended after {number} batches; "
        "correct its __len__, or remove it"
    )
