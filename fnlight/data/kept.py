"""What a state keeps of its data, so that a resumed run reads on where it stood, and notices where the data is not what it was.

Not part of `fnlight.data.item`, which makes the stream of items: this is what is saved of it, and how it is compared.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import attrs
from torch.utils.data import BatchSampler, DataLoader

from fnlight.data.combine import Triple
from fnlight.data.digest import digest_of, versions_of
from fnlight.data.iterated import Iterated
from fnlight.data.known import is_kind
from fnlight.data.order import length_of
from fnlight.data.readers import Epochs, Stateful
from fnlight.data.samples import num_samples
from fnlight.data.share import Sharded
from fnlight.data.source import Source
from fnlight.data.tensor_loader import TensorLoader
from fnlight.errors import LoaderError, LoaderWarning, warn

_LONG = 100_000  # batches of a list whose samples are counted
_SHUFFLED, _IN_ORDER = "shuffled", "in order"


@attrs.define(eq=False)
class Place:
    """Where a stream of items stands; called, it gives what a state keeps of it. It is made once a stream, and moved on with each item.

    Args:
        source: What is read.

    Example:
        >>> place = Place(Source([1, 2, 3]))
        >>> place.move(epoch=0, batch=3, last=True, item=None)
        >>> place()
        {'epoch': 1, 'batch': 0}
    """

    source: Source
    _epoch: int = 0
    _batch: int = 0
    _last: bool = False
    _held: tuple[Any, ...] = ()  # the last batch, until the next one
    _versions: int = 0
    _frozen: dict[str, Any] | None = None
    _ended: Any = None  # what the loader remembered at the end of the epoch: it is put back when the run ends

    @property
    def fleeting(self) -> bool:
        """Whether it is lost as soon as the next batch is asked for."""
        return self.source.keeps_position

    def move(self, epoch: int, batch: int, last: bool, item: Any) -> None:
        """Stand after an item, whose last batch is held until the next one."""
        self._epoch, self._batch, self._last = epoch, batch, last
        self._held = () if item is None else item.batches[-1:]
        self._versions = versions_of(self._held[0]) if self._held else 0
        if last and self.source.remembers and not self.fleeting:
            self._ended = self.source.position(True)

    def freeze(self) -> None:
        """Keep what would be lost as the loader is left."""
        if self.fleeting and self._held:
            self._frozen = self()

    def __call__(self) -> dict[str, Any]:
        """What a state keeps: the epoch and the batch, what the loader remembers, and in the middle of an epoch what the data was."""
        if self._frozen is not None:
            return self._frozen
        source, last = self.source, self._last
        found: dict[str, Any] = {"epoch": self._epoch + last, "batch": 0 if last else self._batch}
        left = last and source.keeps_position and source.cuts(self._batch)  # the limit has left the loader within an epoch that is over
        if source.remembers and not left:
            found["loader"] = self._ended if last and not self.fleeting else source.position(last)
        if last:
            return {**found, "data": facts_of(source)} if source.remembers else found
        return {**found, "data": {**facts_of(source), "digest": self._digest()}}

    def _digest(self) -> str | None:
        share = self.source.share
        if not self._held or (share is not None and share.world.size > 1):  # ranks hold parts of the batch
            return None
        batch = self._held[0]
        return digest_of(batch) if versions_of(batch) == self._versions else None  # a step that changes its batch is not to be refused


def facts_of(source: Source) -> dict[str, Any]:
    """What can be known of data without reading it, and decides which samples a batch holds.

    Args:
        source: Any.

    Returns:
        Names to numbers and texts, None where something is not known; of joined loaders also of each.

    Example:
        >>> facts_of(Source(DataLoader(range(6), batch_size=2, shuffle=True)))
        {'samples': 6, 'order': 'shuffled'}
    """
    loader, shuffle = source.loader, source.shuffle
    loader = loader.loader if isinstance(loader, Sharded) else loader
    parts = source.children
    if parts:
        return {"parts": [facts_of(each) for each in parts]}
    if isinstance(source.reader, Epochs):
        return {}
    if isinstance(loader, TensorLoader):
        return {"samples": loader.num_samples, "order": _SHUFFLED if loader.shuffle and shuffle else _IN_ORDER}
    if isinstance(loader, list | tuple):
        return {"samples": sum(map(num_samples, loader))} if len(loader) <= _LONG else {"batches": len(loader)}
    if isinstance(source.reader, Iterated | Stateful):
        stream = getattr(source.reader, "stream", None)
        workers = None if stream is None else loader.num_workers
        return {"batches": length_of(loader), "batch_size": getattr(loader, "batch_size", None), "workers": workers}
    return _facts_of_order(loader, shuffle)


def _facts_of_order(loader: DataLoader[Any], shuffle: bool) -> dict[str, Any]:
    outer: Any = loader.batch_sampler
    sampler: Any = loader.sampler if outer is None else outer.sampler if is_kind(outer, BatchSampler) else outer
    name = type(sampler).__name__
    named = {"RandomSampler": _SHUFFLED if shuffle else _IN_ORDER, "SequentialSampler": _IN_ORDER}
    order = name if getattr(sampler, "replacement", False) else named.get(name, name)
    samples = length_of(loader.dataset)
    return {"samples": samples, "order": order, **({} if outer is None or is_kind(outer, BatchSampler) else {"batches": length_of(outer)})}


_WORDS = {
    "samples": "{} samples",
    "batches": "{} batches an epoch",
    "batch_size": "batches of {}",
    "order": "samples {}",
    "workers": "{} workers, each of which reads its own part of a stream",
}


def kept_by(state: Any) -> Mapping[str, Any]:
    """What a state keeps of its place in the data, if it is that of its progress.

    Args:
        state: Any state.

    Returns:
        What a `Place` gave; empty where it is not known.

    Example:
        >>> from types import SimpleNamespace
        >>> kept_by(SimpleNamespace(memory={}, progress=None))
        {}
    """
    saved, at = state.memory.get("loader"), state.progress
    if not isinstance(saved, Mapping) or (saved.get("epoch"), saved.get("batch")) != (at.epoch, at.batch):
        return {}
    return saved


def without_digests(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a state keeps of its place, but nothing of what the data was.

    Args:
        saved: What a `Place` gave.

    Returns:
        The rest.

    Example:
        >>> without_digests({"epoch": 1, "batch": 0, "loader": {"remembers": {}, "first": "0"}, "data": {}})
        {'epoch': 1, 'batch': 0, 'loader': {'remembers': {}}}
    """
    found = {name: value for name, value in saved.items() if name != "data"}
    place = found.get("loader")
    if isinstance(place, Mapping) and "remembers" in place:
        found["loader"] = {"remembers": place["remembers"]}
    return found


def check_data(source: Source, saved: Mapping[str, Any]) -> None:
    """Refuse data of another length, order or kind than that on which a state stands in the middle of an epoch.

    Args:
        source: The data of today.
        saved: What the state keeps.

    Raises:
        LoaderError: If it differs.

    Example:
        >>> check_data(Source([1, 2]), {})
    """
    if "data" not in saved or not saved["batch"]:
        return
    wrong = list(_differences(saved["data"], facts_of(source), "" if source.children else "workers"))
    if wrong:
        raise LoaderError(
            f"the state stands in the middle of epoch {saved['epoch']}, at batch {saved['batch']}, but the data is not what it was: {'; '.join(wrong)}. "
            'Give the data of then until the epoch ends; or go on with today\'s, with FitConfig(allow=("data",)): some samples may then be missed '
            "or seen twice in this epoch"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], but: str) -> Iterator[str]:
    for name, text in _WORDS.items():
        was, is_ = before.get(name), now.get(name)
        if was is not None and is_ is not None and was != is_ and name != but:
            yield f"it had {text.format(was)}, and has {text.format(is_)}"
    for one, other in zip(before.get("parts", ()), now.get("parts", ()), strict=False):
        yield from _differences(one, other, "")


def resumed(source: Source, seed: int, epoch: int, start: int, saved: Mapping[str, Any]) -> Iterator[Triple]:
    """The rest of the epoch in which a state stands; the batch before it is read once more where that can be done, and compared.

    Args:
        source: The data.
        seed: The seed of the state.
        epoch: The epoch.
        start: The batch to begin with.
        saved: What the state keeps.

    Returns:
        An iterator of ``(batch, samples, last)``.

    Raises:
        LoaderError: If that batch is not what it was.

    Example:
        >>> [batch for batch, _, _ in resumed(Source([1, 2, 3]), 0, 0, 1, {})]
        [2, 3]
    """
    data = saved.get("data", {})
    digest = data.get("digest") if start == saved.get("batch") else None  # else batches have another size now
    position = saved.get("loader") if source.remembers else None
    if not start and any(_differences(data, facts_of(source), "")):  # between two epochs that is the user's choice
        position = without_digests(saved).get("loader")
    workers = _workers(source, data, epoch)
    compare = None if digest is None or not start else partial(_compare, digest, epoch, start, kind=type(source.loader).__name__)
    if compare is None or source.reads_to_skip:
        return source.epoch(seed, epoch, start, position=position, follows=True, workers=workers, seen=compare)
    if source.keeps_position and position is not None:
        return source.epoch(seed, epoch, start, position=position, follows=True)
    return _compared(source.epoch(seed, epoch, start - 1, position=position, follows=True), compare)


def _compared(found: Iterator[Triple], compare: Any) -> Iterator[Triple]:
    before = next(found, None)
    compare(None if before is None else before[0])
    before = None
    yield from found


def _compare(digest: str, epoch: int, start: int, batch: Any, *, kind: str) -> None:
    now = digest_of(batch)
    if now is not None and now != digest:
        raise LoaderError(
            f"batch {start} of epoch {epoch}, the last before the state was saved, is not what it was, so the batches after it would not be either: "
            f"this {kind} holds other data, in another order, or something random in it has a seed of its own. fl.testing.check_loader(loader) finds "
            'out which; to go on with the data as it is, say FitConfig(allow=("data",))'
        )


def _workers(source: Source, data: Mapping[str, Any], epoch: int) -> int | None:
    """By how many workers the rest of the epoch is read, where that is not what the loader says."""
    before, now = data.get("workers"), facts_of(source).get("workers") if data.get("workers") is not None else None
    if before is None or now is None or before == now:
        return None
    warn(
        f"the rest of epoch {epoch} is read by {before} workers, as it was begun, and not by {now}: which samples of a stream make a batch depends on "
        f"their number; the next epoch is read by {now}",
        LoaderWarning,
    )
    return before
