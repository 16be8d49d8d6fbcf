"""Join several training loaders into one: side by side, until the shortest or the longest ends, or one after the other.

These functions return a plain value; `Source`, and so `fit` and `batches`, accept it as a loader. Every child loader
is keyed by its index, and a position in the joint epoch is reached without loading the batches before it, if
the children can do that.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import attrs

from fnlight.errors import LoaderError
from fnlight.tensors import fold_in

Triple = tuple[Any, int, bool]
"""A batch, the number of samples in it, and whether it is the last of its epoch."""


@attrs.frozen(eq=False)
class Combined:
    """Several loaders that a `Source` reads as one; made by `zip_shortest`, `zip_longest` and `concat`.

    Args:
        mode: How they are joined.
        loaders: The loaders, in order.
        names: Their names, if a batch is to be a dict.

    Example:
        >>> Combined("concat", ([1], [2, 3]))
        Combined(mode='concat', loaders=([1], [2, 3]), names=())
    """

    mode: Literal["zip_shortest", "zip_longest", "concat"]
    loaders: tuple[Any, ...]
    names: tuple[str, ...] = ()

    def num_batches(self, children: Sequence[Any]) -> int | None:
        """Batches in an epoch, if the children's lengths are known."""
        lengths = [child.num_batches for child in children]
        if None in lengths:
            return None
        return {"zip_shortest": min, "zip_longest": max, "concat": sum}[self.mode](lengths)

    def epoch(self, children: Sequence[Any], seed: int, epoch: int, start: int, stream: int) -> Iterator[Triple]:
        """One joint epoch of the children's epochs, from batch `start` on."""
        if self.mode == "concat":
            return _concat(children, seed, epoch, start=start, stream=stream)
        parts = _cycles if self.mode == "zip_longest" else _plain
        return _side_by_side(parts(children, seed, epoch, start=start, stream=stream), self._pack(), self._end(children, start))

    def _pack(self) -> Callable[[Sequence[Any]], Any]:
        names = self.names
        return (lambda found: dict(zip(names, found, strict=True))) if names else tuple

    def _end(self, children: Sequence[Any], start: int) -> int | None:
        return self.num_batches(children) - start if self.mode == "zip_longest" else None  # pyright: ignore[reportOptionalOperand]


def zip_shortest(*loaders: Any, **named: Any) -> Combined:
    """Join loaders side by side, until the shortest ends; the next epoch starts all of them again.

    Args:
        *loaders: Loaders; a batch is then a tuple of their batches.
        **named: Loaders by name instead; a batch is then a dict of their batches.

    Returns:
        A value that is taken wherever a training loader is.

    Raises:
        TypeError: If there are no loaders, or both kinds.

    Example:
        >>> from fnlight.data import Source
        >>> source = Source(zip_shortest(["a", "b", "c"], [1, 2]))
        >>> [batch for batch, samples, last in source.epoch(seed=0, epoch=0)]
        [('a', 1), ('b', 2)]
    """
    return Combined("zip_shortest", *_given("zip_shortest", loaders, named))


def zip_longest(*loaders: Any, **named: Any) -> Combined:
    """Join loaders side by side, until the longest ends; shorter ones start again, each time in a new order.

    Args:
        *loaders: Loaders of known length; a batch is then a tuple of their batches.
        **named: Loaders by name instead; a batch is then a dict of their batches.

    Returns:
        A value that is taken wherever a training loader is.

    Raises:
        TypeError: If there are no loaders, or both kinds.

    Example:
        >>> from fnlight.data import Source
        >>> source = Source(zip_longest(x=["a", "b", "c"], y=[1, 2]))
        >>> [tuple(batch.values()) for batch, samples, last in source.epoch(seed=0, epoch=0)]
        [('a', 1), ('b', 2), ('c', 1)]
    """
    return Combined("zip_longest", *_given("zip_longest", loaders, named))


def concat(*loaders: Any) -> Combined:
    """Join loaders one after the other within an epoch.

    Args:
        *loaders: Loaders; their batches are unchanged.

    Returns:
        A value that is taken wherever a training loader is.

    Raises:
        TypeError: If there are no loaders.

    Example:
        >>> from fnlight.data import Source
        >>> [batch for batch, samples, last in Source(concat(["a", "b"], [1, 2])).epoch(seed=0, epoch=0)]
        ['a', 'b', 1, 2]
    """
    return Combined("concat", *_given("concat", loaders, {}))


def _given(name: str, loaders: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    if bool(loaders) == bool(named):
        got = f"{len(loaders)} positional and {len(named)} by name" if loaders else "none"
        raise TypeError(f"{name} takes loaders, either all positional or all by name, but got {got}; write {name}(a, b)")
    return (tuple(named.values()), tuple(named)) if named else (loaders, ())


def _plain(children: Sequence[Any], seed: int, epoch: int, start: int, stream: int) -> list[Iterator[Triple]]:
    return [child.epoch(fold_in(seed, i), epoch, start, stream) for i, child in enumerate(children)]


def _cycles(children: Sequence[Any], seed: int, epoch: int, start: int, stream: int) -> list[Iterator[Triple]]:
    lengths = [child.num_batches for child in children]
    if None in lengths:
        raise LoaderError(
            f"zip_longest needs the length of its loaders, but loader {lengths.index(None)} has none; "
            "use zip_shortest, or give it a length with fl.data.Source(loader, limit=n)"
        )
    total = max(lengths)
    return [
        _cycle(child, fold_in(seed, i), epoch * -(-total // n), start=start, stream=stream, length=n)
        for i, (child, n) in enumerate(zip(children, lengths, strict=True))
    ]


def _cycle(child: Any, seed: int, epoch: int, start: int, stream: int, length: int) -> Iterator[Triple]:
    """Repeat a child loader; each pass has its own epoch number, and so its own order."""
    turn, offset = divmod(start, length)
    while True:
        done = offset
        for found in child.epoch(seed, epoch + turn, offset, stream):
            done += 1
            yield found
            found = None
        if done != length:
            raise LoaderError(
                f"a loader of zip_longest has the length {length}, but ended after {done} batches; correct its __len__ or its limit"
            )
        turn, offset = turn + 1, 0


def _side_by_side(parts: list[Iterator[Triple]], pack: Callable[[Sequence[Any]], Any], left: int | None) -> Iterator[Triple]:
    """Zip children; it ends with the first child that ends, or where `left` batches are done."""
    if left == 0:
        return
    for done, found in enumerate(zip(*parts, strict=False), 1):
        last = any(each[2] for each in found) if left is None else done == left
        yield pack([each[0] for each in found]), sum(each[1] for each in found), last
        if last:
            return
        found = None  # a batch is not kept while the next one is fetched


def _concat(children: Sequence[Any], seed: int, epoch: int, start: int, stream: int) -> Iterator[Triple]:
    final = len(children) - 1
    for i, child in enumerate(children):
        length = child.num_batches
        if start and (length is None or start >= length) and i < final:
            if length is None:
                raise LoaderError(
                    f"concat cannot resume at batch {start}, because its loader {i} has no length; put loaders without a length last, "
                    "or give them a length with fl.data.Source(loader, limit=n)"
                )
            start -= length
            continue
        for batch, samples, last in child.epoch(fold_in(seed, i), epoch, start, stream):
            yield batch, samples, last and i == final
            batch = None
        start = 0
