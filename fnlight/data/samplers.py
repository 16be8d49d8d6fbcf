"""Samplers of the user's own: each epoch is drawn from a copy, keyed by (seed, epoch).

Not part of `fnlight.data.order`, whose orders are permutations: here a sampler decides, and has to be asked.
"""

import copy
import itertools
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from fnlight.errors import LoaderError
from fnlight.tensors import fold_in, isolated, seed_generators

_CHUNK = 64  # batches of indices taken at a time
_MOST = 10_000_000  # of an epoch that may have no end, what is looked at


def drawn(loader: DataLoader[Any], key: int, epoch: int, stop: int | None = None) -> Iterator[Any]:
    """What a copy of the user's sampler gives in an epoch, drawn some batches at a time with generators of its own.

    Args:
        loader: A map-style loader; neither it nor its samplers are changed.
        key: What the generators are seeded from.
        epoch: The epoch, from 0 on.
        stop: The batch before which epochs end early.

    Returns:
        An iterator of indices, or of lists of them.

    Raises:
        LoaderError: If the sampler cannot be copied.

    Example:
        >>> list(drawn(DataLoader(range(4), batch_sampler=[[0, 1], [2, 3]]), key=0, epoch=0))
        [[0, 1], [2, 3]]
    """
    indices: Iterator[Any] = iter(())
    for turn in itertools.count():
        with isolated():
            seed_generators(fold_in(key, turn))
            if turn == 0:
                indices = iter(_advanced(loader, key, epoch, stop))
            chunk = list(itertools.islice(indices, _CHUNK))
        yield from chunk
        if len(chunk) < _CHUNK:
            return


def _advanced(loader: DataLoader[Any], key: int, epoch: int, stop: int | None) -> Iterable[Any]:
    """The copy of an epoch; one that counts epochs itself, as in ``self.epoch += 1``, has counted those before.

    Two passes over the indices show which of its numbers grow by the same amount in each.
    """
    twin = _twin(loader, key, epoch)
    nodes = list(_samplers(twin))
    if not epoch or all(type(node).__module__.startswith("torch.") or _listens(node) for node in nodes):
        return twin
    trial = _twin(loader, key, 0)
    seen = [_numbers(trial)]
    for _ in range(2):
        deque(itertools.islice(trial, _MOST if stop is None else stop), maxlen=0)
        seen.append(_numbers(trial))
    for (place, name), first in seen[0].items():
        second, third = (each.get((place, name), first) for each in seen[1:])
        if second != first and third - second == second - first:
            vars(nodes[place])[name] = first + epoch * (second - first)
    return twin


def _listens(node: Any) -> bool:
    return callable(getattr(node, "set_epoch", None))


def _numbers(sampler: Any) -> dict[tuple[int, str], int]:
    """The whole numbers that a sampler and those that it wraps hold."""
    found: dict[tuple[int, str], int] = {}
    for place, node in enumerate(_samplers(sampler)):
        named = {name: value for kind in reversed(type(node).__mro__) for name, value in vars(kind).items()} | _attributes(node)
        found |= {(place, name): value for name, value in named.items() if type(value) is int and not name.startswith("__")}
    return found


def _twin(loader: DataLoader[Any], key: int, epoch: int) -> Iterable[Any]:
    """A copy of the sampler that shares the dataset and nothing else: its own generators seeded, its epoch set."""
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    shared = [loader.dataset, *(getattr(node, "data_source", None) for node in _samplers(sampler))]
    memo = {id(each): each for each in shared if each is not None}
    for place, value in enumerate(value for node in _samplers(sampler) for value in _attributes(node).values()):
        fresh = _reseeded(value, fold_in(key, place))
        if fresh is not None:
            memo[id(value)] = fresh
    try:
        twin = copy.deepcopy(sampler, memo)
    except TypeError as error:
        raise LoaderError(
            f"the sampler {type(sampler).__name__} cannot be copied ({error}), but each epoch is drawn from a copy; "
            "create what it needs in its __iter__ instead of keeping it, or give it a __deepcopy__"
        ) from error
    for node in _samplers(twin):
        if _listens(node):
            node.set_epoch(epoch)
    return twin


def _attributes(node: Any) -> dict[str, Any]:
    return getattr(node, "__dict__", {})


def _samplers(sampler: Any) -> Iterator[Any]:
    """A sampler, then those that it wraps."""
    yield sampler
    for name, value in _attributes(sampler).items():
        if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
            yield from _samplers(value)


def _reseeded(value: Any, key: int) -> Any:
    """A generator of the same kind, seeded from the key; None where the value is no generator."""
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(key >> 1)  # signed 64 bits
    if type(value) is random.Random:
        return random.Random(key)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return numpy.random.default_rng(key)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return numpy.random.RandomState(key & 0xFFFFFFFF)
    return None
