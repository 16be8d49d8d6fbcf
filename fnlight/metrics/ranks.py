"""Tallies of several ranks as one: they are gathered when they are read, in the order of the ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any

import attrs

from fnlight.errors import StepError
from fnlight.metrics.media import MEDIA
from fnlight.metrics.tally import Tally, columns_of, folded

Gather = Callable[[Any], list[Any]]
"""Maps what this rank has to what every rank has, in their order; all ranks call it at the same time."""


def read_all(tally: Tally, gather: Gather) -> dict[str, Any]:
    """Read the tallies of all ranks as one, once each has taken its part of the same steps.

    Args:
        tally: This rank's; it stays as it is.
        gather: Brings together what ranks have.

    Returns:
        Names to floats, the same on all ranks; and to the media of this rank.

    Raises:
        StepError: If ranks have different names.

    Example:
        >>> tally, other = Tally({"loss": ["Mean", 2.0, 1]}), [["loss"], {"loss": ["Mean", 6.0, 1]}, None, {}]
        >>> read_all(tally, lambda mine: [mine, other])
        {'loss': 4.0}
    """
    tally.settle()
    found = gather([_names(tally), tally.totals, tally.bad, _packed_all(tally)])
    _check_names([names for names, *_ in found])
    whole = Tally(*merged([[totals, bad] for _, totals, bad, _ in found]))
    return _read(tally, whole, [objects for *_, objects in found], gather)


def read_in_order(tally: Tally, gather: Gather) -> dict[str, Any]:
    """Read the tallies of all ranks as one, where every step was taken whole by one of them: it is what one process would have read, bitwise.

    Args:
        tally: This rank's, not yet read.
        gather: Brings together what ranks have.

    Returns:
        Names to floats, the same on all ranks; and to the media of this rank.

    Raises:
        StepError: If ranks have different names.

    Example:
        >>> tally = Tally()
        >>> tally.add(1, {"loss": 2.0})
        >>> read_in_order(tally, lambda mine: [mine])
        {'loss': 2.0}
    """
    mine = columns_of(tally)
    found = gather([_names(tally), mine, _packed_all(tally)])
    _check_names([names for names, *_ in found])
    whole = Tally()
    for name in dict.fromkeys(name for _, columns, _ in found for name in columns):
        held = [columns[name] for _, columns, _ in found if name in columns]
        rows = sorted((row for _, *rows in held for row in zip(*rows, strict=True)), key=lambda row: row[0])
        steps, *values = map(list, zip(*rows, strict=True))
        whole.merge_column(name, held[0][0], values, steps)
    return _read(tally, whole, [objects for *_, objects in found], gather)


def merged(parts: Sequence[Sequence[Any]]) -> tuple[dict[str, list[Any]], tuple[int, str] | None]:
    """The totals of several ranks as those of one.

    Args:
        parts: By rank, the ``totals`` and ``bad`` of a `Tally`.

    Returns:
        Both for one tally.

    Example:
        >>> merged([[{"n": ["Sum", 1]}, None], [{"n": ["Sum", 2]}, (3, "n")]])
        ({'n': ['Sum', 3]}, (3, 'n'))
    """
    totals: dict[str, list[Any]] = {}
    for each, _ in parts:
        for name, (kind, *new) in each.items():
            old = totals[name][1:] if name in totals else [None] * len(new)
            totals[name] = [kind, *(folded(kind, a, [] if b is None else [b]) for a, b in zip(old, new, strict=True))]
    return totals, min((tuple(bad) for _, bad in parts if bad is not None), default=None)


def with_parts(trees: Iterable[Any], gather: Gather) -> None:
    """Let the tallies among some trees know those of the other ranks, so that a file holds all of them.

    Args:
        trees: Trees of a state's memory.
        gather: Brings together what ranks have.

    Example:
        >>> tally = Tally({"n": ["Sum", 1]})
        >>> with_parts([tally], lambda mine: [mine, [[{"n": ["Sum", 2]}, None]]])
        >>> tally.parts
        [[{'n': ['Sum', 1]}, None], [{'n': ['Sum', 2]}, None]]
    """
    held = [tree for tree in trees if isinstance(tree, Tally)]
    for tally in held:
        tally.settle()
    found = gather([[tally.totals, tally.bad] for tally in held])
    for i, tally in enumerate(held):
        tally.parts = [each[i] for each in found]


def own_part(tally: Tally, rank: int, size: int) -> Tally:
    """The tally of one rank from a file that holds all of them: its own where there are as many as then, else rank 0 has everything.

    Args:
        tally: As it was decoded.
        rank: Which rank this is.
        size: How many there are.

    Returns:
        A tally without the parts of others.

    Example:
        >>> own_part(Tally({"n": ["Sum", 3]}, parts=[[{"n": ["Sum", 1]}, None], [{"n": ["Sum", 2]}, None]]), 1, 2).totals
        {'n': ['Sum', 2]}
    """
    if tally.parts is not None and len(tally.parts) == size:
        totals, bad = tally.parts[rank]
        return Tally(totals, bad)
    return Tally(tally.totals, tally.bad) if rank == 0 else Tally()


def _names(tally: Tally) -> list[str]:
    return list(tally._names or tally.totals)


def _check_names(names: list[list[str]]) -> None:
    given = {rank: set(each) for rank, each in enumerate(names) if each}
    first = next(iter(given.values()), set())
    other = {rank: sorted(each ^ first) for rank, each in given.items() if each != first}
    if other:
        raise StepError(
            f"ranks must give metrics of the same names, but rank {next(iter(given))} gave {sorted(first)}, and these differ: {other}; "
            "give every name on all ranks, with Mean(0.0, 0) where there is nothing to count"
        )


def _read(tally: Tally, whole: Tally, objects: list[dict[str, list[Any]]], gather: Gather) -> dict[str, Any]:
    whole._names = dict.fromkeys(_names(tally) or whole.totals).keys()
    media = {name: values for name, values in tally._objects.items() if isinstance(values[-1], MEDIA)}
    if any(objects):  # computed by the rank that has had the first batch, so that others need not know what they are
        own = {name: values for name, values in tally._objects.items() if name not in media}
        for name, values in own.items():
            turns = zip_longest(*([_unpacked(values[0], each) for each in held.get(name, [])] for held in objects))
            whole._objects[name] = [value for turn in turns for value in turn if value is not None]
        computed = gather(whole.read())[0]
        return {**computed, **{name: values[-1] for name, values in media.items()}}
    whole._objects.update(media)
    return whole.read()


def _packed_all(tally: Tally) -> dict[str, list[Any]]:
    """The values that are merged as objects, as data; media stay where they are."""
    return {
        name: [_packed(name, value) for value in values]
        for name, values in tally._objects.items()
        if not isinstance(values[-1], MEDIA)
    }  # fmt: skip


def _held(value: Any) -> Mapping[str, Any] | None:
    if attrs.has(type(value)):
        return {field.alias: getattr(value, field.name) for field in attrs.fields(type(value)) if field.init}
    return {field.name: getattr(value, field.name) for field in fields(value) if field.init} if is_dataclass(value) else None


def _packed(name: str, value: Any) -> dict[str, Any]:
    held = _held(value)
    if held is None:
        raise StepError(
            f"metric {name!r} is of the class {type(value).__name__}, which cannot be brought from rank to rank; make it an attrs class or a "
            "dataclass of tensors and numbers, or use Cat"
        )
    return {key: each for key, each in held.items() if not callable(each)}


def _unpacked(like: Any, packed: Mapping[str, Any]) -> Any:
    """A value of the class of another one, whose functions it takes."""
    functions = {key: each for key, each in (_held(like) or {}).items() if callable(each)}
    return type(like)(**functions, **packed)
