"""Datasets, samplers and loaders of every kind, and how tests read them."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs
import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    Dataset,
    IterableDataset,
    Sampler,
    get_worker_info,
)

from fnlight.data import Source
from fnlight.state import Progress, Task, TrainState


class Pair(NamedTuple):
    """A batch as a namedtuple."""

    x: Any
    y: Any


class Numbers(Dataset[Any]):
    """Integers, with a note of which were read."""

    def __init__(self, n: int) -> None:
        self.n, self.read = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        self.read.append(int(index))
        return int(index)


class Noisy(Numbers):
    """Each sample draws from every global generator."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)  # noqa: NPY002  # the global one


class NoisyAtOnce(Noisy):
    """A dataset that reads a whole batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Stream(IterableDataset[Any]):
    """Batches or samples that can only be gone over, each with a random number; workers share them out."""

    def __init__(self, n: int, sized: bool = False) -> None:
        self.n, self.sized = n, sized

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        for i in range(self.n):
            if info is None or i % info.num_workers == info.id:
                yield torch.tensor([float(i), torch.rand(()).item()])


class SizedStream(Stream):
    """A stream that says how long it is."""

    def __len__(self) -> int:
        return self.n


class Endless(Sampler[int]):
    """A sampler that never ends."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(self.n, ()))


class Epochal(Sampler[int]):
    """A sampler that turns with the epoch it is told."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(i + self.epoch) % self.n for i in range(self.n)])

    def __len__(self) -> int:
        return self.n


class Owner(Sampler[int]):
    """A sampler with a generator of its own."""

    def __init__(self, n: int, generator: Any) -> None:
        self.n, self.generator = n, generator

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.generator, torch.Generator):
            return iter(torch.randperm(self.n, generator=self.generator).tolist())
        order = list(range(self.n))
        self.generator.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return self.n


class ByLength(Sampler[list[int]]):
    """A batch sampler: pairs of neighbours, in a random order, drawn from Python's generator."""

    def __init__(self, data_source: Any) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[list[int]]:
        pairs = [[i, i + 1] for i in range(0, len(self.data_source), 2)]
        random.shuffle(pairs)
        return iter(pairs)

    def __len__(self) -> int:
        return len(self.data_source) // 2


class Placed:
    """A loader that keeps its own place."""

    def __init__(self, n: int, sized: bool = True) -> None:
        self.n, self.at, self.fetched, self.waiting = n, 0, [], False
        if sized:
            self.__class__ = PlacedAndSized

    def __iter__(self) -> Iterator[Any]:
        if not self.waiting:
            self.at = 0
        self.waiting = False
        while self.at < self.n:
            self.at += 1
            self.fetched.append(self.at - 1)
            yield torch.tensor([self.at - 1, int(torch.randint(1000, ()))])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        self.at, self.waiting = found["at"], True


class PlacedAndSized(Placed):
    """The same, with a length."""

    def __len__(self) -> int:
        return self.n


def state_at(epoch: int = 0, batch: int = 0, seed: int = 0) -> TrainState:
    """A state that stands somewhere."""
    state = TrainState.create(Task(nn.Identity(), lambda model, batch: batch.sum()), seed=seed)
    return attrs.evolve(state, progress=Progress(step=1, epoch=epoch, batch=batch))


def read(loader: Any, epoch: int = 0, start: int = 0, seed: int = 0, **options: Any) -> list[Any]:
    """The batches of an epoch as lists."""
    source = loader if isinstance(loader, Source) else Source(loader, **options)
    return [batch.tolist() for batch, _, _ in source.epoch(seed, epoch, start)]


def flags(source: Source, epoch: int = 0, start: int = 0) -> list[tuple[int, bool]]:
    """Samples and last of each batch."""
    return [(samples, last) for _, samples, last in source.epoch(0, epoch, start)]


def flat(found: list[Any]) -> list[Any]:
    """All samples of some batches."""
    return [sample for batch in found for sample in batch]


def generators() -> list[Any]:
    """Where the global generators stand."""
    return [torch.default_generator.get_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]  # noqa: NPY002  # the global one
