"""Items: groups of batches with their position in the data, and the endless stream of items that a run consumes."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch

from fnlight.data.kept import Place, check_data, kept_by, resumed
from fnlight.data.place import placed
from fnlight.data.samples import num_samples
from fnlight.data.share import Share
from fnlight.data.source import Source, check_loader
from fnlight.errors import check_type
from fnlight.pipe import batches_at
from fnlight.runtime import WallTime
from fnlight.state import A_STATE, TrainState


@attrs.frozen(eq=False)
class Item:
    """The input of one step: a group of batches and its position in the data.

    Args:
        batches: The batches, one or more.
        epoch: The epoch they belong to, from 0 on.
        batch: Batches of this epoch that are done once the item is.
        last: Whether the epoch ends with it.
        samples: Samples in all of its batches.
        seconds: Time since the item before was handed out, in seconds.
        position: None, or what gives the place in the data that a state keeps, until the next item is asked for.
        batches_per_step: The batches that a full item has; 0 where nobody says.

    Example:
        >>> Item(([1, 2],), epoch=0, batch=1, last=False, samples=2).last
        False
    """

    batches: tuple[Any, ...]
    epoch: int
    batch: int
    last: bool
    samples: int
    seconds: float = 0.0
    position: Callable[[], Any] | None = None
    batches_per_step: int = 0

    @classmethod
    def of(cls, *batches: Any, state: Any) -> "Item":
        """Make an item by hand, at the position of a state; an item is returned unchanged.

        Args:
            *batches: The batches of one step, or an item.
            state: Where training stands.

        Returns:
            An item that is not the last of its epoch.
        """
        if len(batches) == 1 and isinstance(batches[0], Item):
            return batches[0]
        at = state.progress
        return cls(batches=batches, epoch=at.epoch, batch=at.batch + len(batches), last=False, samples=sum(map(num_samples, batches)))


@attrs.frozen(eq=False)
class Loaders:
    """The loaders of a run.

    Args:
        train: The training loader.
        val: A loader to evaluate on while training, or a mapping of named ones.
        test: A loader to evaluate on afterwards, or a mapping of named ones.
        predict: A loader to predict on, or a mapping of named ones.

    Raises:
        TypeError: If one is no iterable of batches, such as a dataset.

    Example:
        >>> loaders = Loaders(train=[1, 2], val={"easy": [3], "hard": [4]})
        >>> list(loaders.named("val")), list(loaders.named("train")), list(loaders.named("test"))
        (['easy', 'hard'], [''], [])
    """

    train: Any = None
    val: Any = None
    test: Any = None
    predict: Any = None

    def __attrs_post_init__(self) -> None:
        for use in ("train", "val", "test", "predict"):
            given = getattr(self, use)
            if given is not None and (use == "train" or not isinstance(given, Mapping)):
                check_loader(given, f"Loaders({use}=...)")
            elif isinstance(given, Mapping):
                _check_named(use, given)

    def named(self, use: str) -> dict[str, Any]:
        """The loaders of one use by name.

        Args:
            use: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.

        Returns:
            Names to loaders; a single one has the name ``""``; empty if there is none.
        """
        found = getattr(self, use)
        if found is None:
            return {}
        return dict(found) if isinstance(found, Mapping) else {"": found}


def _check_named(use: str, given: Mapping[Any, Any]) -> None:
    if not given:
        raise TypeError(f"Loaders({use}={{}}) has no loader; leave {use}= out, or give one")
    for name, loader in given.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise TypeError(f"Loaders({use}=...) needs names that are strings without a slash, but got the name {name!r}")
        check_loader(loader, f"Loaders({use}={{{name!r}: ...}})")


def batches(
    loader: Any,
    state: Any,
    batches_per_step: int | Mapping[int, int] = 1,
    *,
    limit: int | float | None = None,
    shuffle: bool = True,
    device: torch.device | str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wall_time: WallTime | None = None,
    beat: Callable[[], float] | None = None,
) -> Iterator[Item]:
    """Make an endless iterator of items, epoch after epoch, from the position of a state.

    The global generators are seeded as data is read in this process; wrap it in `rng.isolated` to put them back.

    Args:
        loader: A loader or a `Source`; it is not changed.
        state: Where training stands: seed, epoch, batch.
        batches_per_step: Batches in an item: a number, or a mapping from the epoch at which it starts to numbers; the last item of an epoch may be short.
        limit: Batches an epoch at most (int), or a fraction of them in 0..1 (float).
        shuffle: False takes a shuffled dataset in its own order.
        device: Where batches are moved to; None or the CPU leaves them as they are.
        clock: Gives seconds.
        wall_time: Where a run counts how long it waits for data.
        beat: Gives the seconds of ``progress.seconds``, where they are not simply those of the clock: ranks agree on theirs.

    Returns:
        An iterator of items.

    Raises:
        TypeError: If the loader is not an iterable of batches.
        LoaderError: If the loader is empty, if it has no data at the position of the state, or if that position is within a batch.

    Example:
        >>> from itertools import islice
        >>> from fnlight.state import Task
        >>> from fnlight.state import TrainState
        >>> state = TrainState.create(Task(torch.nn.Identity(), lambda model, batch: batch.sum()))
        >>> [(item.batches, item.epoch, item.last) for item in islice(batches(["a", "b", "c"], state, batches_per_step=2), 3)]
        [(('a', 'b'), 0, False), (('c',), 0, True), (('a', 'b'), 1, False)]
    """
    check_type("batches(loader, state, ...)", state, TrainState, A_STATE)
    check_type("batches(clock=...)", clock, Callable, "a function that gives seconds")
    check_type("batches(beat=...)", beat, Callable | None, "a function that gives seconds, or None")
    check_type("batches(wall_time=...)", wall_time, WallTime | None, "a fl.runtime.WallTime, or None")
    batches_at(batches_per_step, state.progress.epoch)
    place = state.store.place
    share = None if place is None else Share(place.world)
    source = Source.of(loader, limit=limit, shuffle=shuffle, device=device, share=share)
    return _items(source, state, batches_per_step, clock=clock, wall_time=wall_time, beat=beat)


def _items(
    source: Source,
    state: Any,
    batches_per_step: int | Mapping[int, int],
    clock: Callable[[], float],
    wall_time: WallTime | None,
    beat: Callable[[], float] | None,
) -> Iterator[Item]:
    seed, epoch, saved = state.seed, state.progress.epoch, kept_by(state)
    check_data(source, saved)
    start, place = placed(source, state.progress).batch, Place(source)
    found = resumed(source, seed, epoch, start=start, saved=saved)
    beat = beat or clock
    then, asked = beat(), None  # when the item before was handed out, and when this one was asked for: at the first one, nobody counts
    try:
        while True:
            size = batches_at(batches_per_step, epoch)
            for given, done, samples, last in _groups(found, size, start):
                now = beat()
                passed = max(0.0, now - then)  # a clock that is set back takes no time back
                if asked is not None and wall_time is not None:
                    wall_time.data += max(0.0, (now if beat is clock else clock()) - asked)
                item = Item(given, epoch, done, last, samples, passed, place, size)
                place.move(epoch, done, last, item)
                yield item
                item = given = None  # nothing is kept of what is handed out
                then = now
                if wall_time is not None:
                    if asked is None:
                        wall_time.started()
                    asked = clock()
            epoch, start = epoch + 1, 0
            found = source.epoch(seed, epoch, follows=True)
    except GeneratorExit:
        if not sys.is_finalizing():  # as Python ends, nothing reads the state any more
            place.freeze()
        raise
    finally:
        source.leave()


def _groups(found: Iterator[Any], size: int, done: int) -> Iterator[tuple[Any, int, int, bool]]:
    """Batches in groups, each with the batches done after it, its samples, and whether the epoch ends with it."""
    if size == 1:
        for done, (batch, count, last) in enumerate(found, done + 1):
            yield (batch,), done, count, last
            batch = None
        return
    taken, samples = [], 0
    for done, (batch, count, last) in enumerate(found, done + 1):
        taken.append(batch)
        samples += count
        batch = None
        if last or len(taken) == size:
            given, taken = tuple(taken), []
            yield given, done, samples, last
            given, samples = None, 0
