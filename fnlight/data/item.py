"""Items: groups of batches that know their place in the data, and the endless stream of them that a run consumes."""

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
from fnlight.errors import LoaderError, check_type
from fnlight.state import A_STATE, TrainState
from fnlight.times import Times


@attrs.frozen(eq=False)
class Item:
    """What one step consumes: a group of batches, and where in the data it stands.

    Args:
        batches: The batches, one or more.
        epoch: The epoch they belong to, from 0 on.
        batch: Batches of this epoch that are done once the item is.
        last: Whether the epoch ends with it.
        samples: Samples in all of its batches.
        seconds: Time since the item before was handed out, in seconds.
        position: None, or what gives the place in the data that a state keeps, until the next item is asked for.
        group: The batches that a full item has; 0 where nobody says.

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
    group: int = 0

    @classmethod
    def of(cls, *batches: Any, state: Any) -> "Item":
        """An item made by hand, at the place where a state stands; one that is an item already is given back.

        Args:
            *batches: The batches of one step, or an item.
            state: Where training stands.

        Returns:
            An item that is not the last of its epoch.
        """
        if len(batches) == 1 and isinstance(batches[0], Item):
            return batches[0]
        at = state.progress
        return cls(batches, at.epoch, at.batch + len(batches), False, sum(map(num_samples, batches)))


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
        raise TypeError(f"Loaders({use}={{}}) names no loader; leave it out or give one")
    for name, loader in given.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise TypeError(f"Loaders({use}=...) must name its loaders with strings without a slash, but got the name {name!r}")
        check_loader(loader, f"Loaders({use}={{{name!r}: ...}})")


def group_at(group: int | Mapping[int, int], epoch: int) -> int:
    """How many batches a step consumes in an epoch.

    Args:
        group: A number, or a mapping from the epoch at which it starts to numbers.
        epoch: The epoch, from 0 on.

    Returns:
        The number.

    Raises:
        LoaderError: If nothing is said about the epoch, or the number is below 1.

    Example:
        >>> group_at({0: 1, 5: 4}, 7)
        4
    """
    if isinstance(group, Mapping):
        begun = [first for first in group if first <= epoch]
        if not begun:
            raise LoaderError(f"a group given by epoch must say what holds from epoch 0 on, but got {dict(group)!r}; add 0: 1")
        group = group[max(begun)]
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise LoaderError(f"a group must be a number of batches >= 1, but got {group!r}")
    return group


def batches(
    loader: Any,
    state: Any,
    group: int | Mapping[int, int] = 1,
    *,
    limit: int | float | None = None,
    shuffle: bool = True,
    device: torch.device | str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    times: Times | None = None,
    beat: Callable[[], float] | None = None,
) -> Iterator[Item]:
    """Items without end, epoch after epoch, from the place where a state stands.

    The global generators are seeded as data is read in this process; wrap it in `rng.isolated` to put them back.

    Args:
        loader: A loader or a `Source`; it is not changed.
        state: Where training stands: seed, epoch, batch.
        group: Batches in an item: a number, or a mapping from the epoch at which it starts to numbers; the last item of an epoch may be short.
        limit: Batches an epoch at most (int), or a fraction of them in 0..1 (float).
        shuffle: False takes a shuffled dataset in its own order.
        device: Where batches are moved to; None or the CPU leaves them as they are.
        clock: Gives seconds.
        times: Where a run counts how long it waits for data.
        beat: Gives the seconds of ``progress.seconds``, where they are not simply those of the clock: ranks agree on theirs.

    Returns:
        An iterator of items.

    Raises:
        TypeError: If the loader is no iterable of batches.
        LoaderError: If the loader is empty, or the state stands where it has no data, or within a batch of another size.

    Example:
        >>> from itertools import islice
        >>> from fnlight.task import Task
        >>> from fnlight.state import TrainState
        >>> state = TrainState.create(Task(torch.nn.Identity(), lambda model, batch: batch.sum()))
        >>> [(item.batches, item.epoch, item.last) for item in islice(batches(["a", "b", "c"], state, group=2), 3)]
        [(('a', 'b'), 0, False), (('c',), 0, True), (('a', 'b'), 1, False)]
    """
    check_type("batches(loader, state, ...)", state, TrainState, A_STATE)
    check_type("batches(clock=...)", clock, Callable, "a function that gives seconds")
    check_type("batches(beat=...)", beat, Callable | None, "a function that gives seconds, or None")
    check_type("batches(times=...)", times, Times | None, "a fl.times.Times, or None")
    group_at(group, state.progress.epoch)
    place = state.store.place
    share = None if place is None else Share(place.world)
    source = Source.of(loader, limit=limit, shuffle=shuffle, device=device, share=share)
    return _items(source, state, group, clock, times, beat)


def _items(
    source: Source,
    state: Any,
    group: int | Mapping[int, int],
    clock: Callable[[], float],
    times: Times | None,
    beat: Callable[[], float] | None,
) -> Iterator[Item]:
    seed, epoch, saved = state.seed, state.progress.epoch, kept_by(state)
    check_data(source, saved)
    start, place = placed(source, state.progress).batch, Place(source)
    found = resumed(source, seed, epoch, start, saved)
    beat = beat or clock
    then, asked = beat(), None  # when the item before was handed out, and when this one was asked for: at the first one, nobody counts
    try:
        while True:
            size = group_at(group, epoch)
            for given, done, samples, last in _groups(found, size, start):
                now = beat()
                passed = max(0.0, now - then)  # a clock that is set back takes no time back
                if asked is not None and times is not None:
                    times.data += max(0.0, (now if beat is clock else clock()) - asked)
                item = Item(given, epoch, done, last, samples, passed, place, size)
                place.move(epoch, done, last, item)
                yield item
                item = given = None  # nothing is kept of what is handed out
                then = now
                if times is not None:
                    if asked is None:
                        times.started()
                    asked = clock()
            epoch, start = epoch + 1, 0
            found = source.epoch(seed, epoch, follows=True)
    except GeneratorExit:
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
