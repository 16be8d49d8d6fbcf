"""Datasets, samplers and loaders of every kind, and how tests read them."""

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs
import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    get_worker_info,
)

from fnlight.data import Source, per_epoch, zip_shortest
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


def order_of(epoch: int, n: int = 6) -> list[int]:
    """An order that is another one in each epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()


def rows_of(order: Any) -> Iterator[Any]:
    """A row for each number."""
    return iter(torch.as_tensor(list(order))[:, None])


class Told(IterableDataset[Any]):
    """A stream that is told the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return rows_of(order_of(self.epoch))


class ToldByProperty(IterableDataset[Any]):
    """A stream whose next epoch can be set, and that counts for itself."""

    def __init__(self) -> None:
        self.shared = torch.zeros(100_001, dtype=torch.int64)

    @property
    def next_epoch(self) -> int:
        return int(self.shared[0])

    @next_epoch.setter
    def next_epoch(self, epoch: int) -> None:
        self.shared[0] = epoch

    def __iter__(self) -> Iterator[Any]:
        self.next_epoch += 1
        return rows_of(order_of(self.next_epoch))


class CountsAtFirst(IterableDataset[Any]):
    """A stream that counts an epoch as it begins, in an attribute that only its class has at first."""

    epoch = -1

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from rows_of(order_of(self.epoch))


class CountsAtLast(IterableDataset[Any]):
    """A stream that counts an epoch when it has ended."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        yield from rows_of(order_of(self.epoch))
        self.epoch += 1


class HasGenerator(IterableDataset[Any]):
    """A stream with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Any]:
        return rows_of(Owner(6, self.generator))


class HasArrayGenerator(IterableDataset[Any]):
    """A stream with a generator of NumPy's."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Any]:
        return rows_of(self.generator.permutation(6).tolist())


class ShufflesItself(IterableDataset[Any]):
    """A stream that shuffles what it holds, so that an order follows from the one before."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        order = order_of(3)
        self.held[:] = [self.held[i] for i in order] if isinstance(self.held, list) else self.held[order]
        return rows_of([int(i) for i in self.held])


class Pipeline(IterableDataset[Any]):
    """A stream of stages, one of which counts."""

    def __init__(self) -> None:
        self.stages = [CountsAtFirst()]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stages[0])


class CountingLoader:
    """A loader of the user's own that counts."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return rows_of(order_of(self.epoch))


class CountingSampler(Sampler[int]):
    """A sampler that counts an epoch as it begins."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(order_of(self.epoch))

    def __len__(self) -> int:
        return 6


class LateSampler(CountingSampler):
    """A sampler that counts an epoch when it has ended, and its indices."""

    drawn = 0

    def __iter__(self) -> Iterator[int]:
        self.drawn = 0
        for index in order_of(self.epoch):
            self.drawn += 1
            yield index
        self.epoch += 1


class Hidden(IterableDataset[Any]):
    """A stream that counts where nobody sees it."""

    def __init__(self) -> None:
        epochs = itertools.count()
        self.count = lambda: next(epochs)

    def __iter__(self) -> Iterator[Any]:
        return rows_of(order_of(self.count()))


def stream(data: Any, **options: Any) -> DataLoader[Any]:
    """A loader of six batches of one row."""
    return DataLoader(data, batch_size=None, **options)


KINDS: dict[str, Any] = {
    "a list": lambda: list(rows_of(order_of(0))),
    "a map-style loader": lambda: DataLoader(Noisy(12), batch_size=2, shuffle=True),
    "a sampler that counts": lambda: stream(Numbers(6), sampler=CountingSampler()),
    "a sampler that counts late": lambda: stream(Numbers(6), sampler=LateSampler()),
    "a stream": lambda: stream(Stream(6)),
    "a stream with workers": lambda: stream(Stream(6), num_workers=2),
    "a stream with workers that persist": lambda: stream(CountsAtFirst(), num_workers=1, persistent_workers=True),
    "a stream that is told": lambda: stream(Told()),
    "a stream that is told, with workers": lambda: stream(Told(), num_workers=1),
    "a stream that is told, with workers that persist": lambda: stream(Told(), num_workers=1, persistent_workers=True),
    "a stream whose next epoch is set": lambda: stream(ToldByProperty()),
    "a stream that counts": lambda: stream(CountsAtFirst()),
    "a stream that counts late": lambda: stream(CountsAtLast()),
    "a stream with a generator of torch": lambda: stream(HasGenerator(torch.Generator().manual_seed(0))),
    "a stream with a generator of Python": lambda: stream(HasGenerator(random.Random(0))),
    "a stream with a generator of NumPy": lambda: stream(HasArrayGenerator(np.random.default_rng(0))),
    "a stream with an old generator of NumPy": lambda: stream(HasArrayGenerator(np.random.RandomState(0))),
    "a stream that shuffles its list": lambda: stream(ShufflesItself(list(range(6)))),
    "a stream that shuffles its array": lambda: stream(ShufflesItself(np.arange(6))),
    "a stream that shuffles its tensor": lambda: stream(ShufflesItself(torch.arange(6))),
    "a stream of stages": lambda: stream(Pipeline()),
    "a loader that counts": CountingLoader,
    "a loader that keeps its place": lambda: Placed(6),
    "a loader made for each epoch": lambda: per_epoch(lambda seed, epoch: rows_of(order_of(seed + epoch))),
    "a loader made for each epoch, from any batch on": lambda: per_epoch(
        lambda seed, epoch, start: rows_of(order_of(seed + epoch)[start:]) if start < 6 else []
    ),
    "a stream made for each epoch, with workers": lambda: per_epoch(
        lambda seed, epoch: DataLoader(Stream(6 + epoch), batch_size=None, num_workers=2), num_batches=6
    ),
    "streams side by side": lambda: zip_shortest(stream(Told()), [torch.zeros(1)] * 6),
}
"""Every kind of loader that resumes exactly, six batches an epoch; whoever supports another one adds it here."""
