"""Laws of every kind of loader: what a run reads is a function of the seed, and a run that is resumed reads what the whole one would have."""

import copy
import json
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, TensorDataset

from fnlight.checkpoint.encode import decode, encode
from fnlight.data import Share, Source, TensorLoader, batches, per_epoch, sharded, zip_shortest
from fnlight.data.counters import Counters
from fnlight.data.order import Span
from fnlight.errors import LoaderError, LoaderWarning
from fnlight.fit import FitConfig, fit
from fnlight.loop import evaluate
from fnlight.state import Progress, Task, TrainState
from tests.data.loaders import KINDS, CountsAtFirst, Hidden, Numbers, Placed, Stream, Told, order_of, read, rows_of, state_at, stream


def plain(batch: Any) -> Any:
    """A batch as lists."""
    return (
        [plain(part) for part in batch] if isinstance(batch, tuple | list) else batch.tolist() if isinstance(batch, torch.Tensor) else batch
    )


def run_of(loader: Any, state: TrainState, n: int, *steps: Any) -> tuple[list[Any], TrainState]:
    """What n steps see, and the state after them, as a step makes it."""
    found, items = [], batches(loader, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoaderWarning)
        for item in islice(items, n):
            found.append(plain(item.batches[0]))
            for step in steps:
                step(item.batches[0])
            state.store.step.position = item.position
            progress = Progress(0, item.epoch + item.last, 0 if item.last else item.batch)
            state = attrs.evolve(state, progress=progress)
    items.close()
    state.store.settle()
    return found, state


def saved(state: TrainState) -> TrainState:
    """The state once it went through a file: its place in the data holds what JSON and tensors can hold."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(dict(state.memory), lambda name, tensor: tensors.setdefault(name, tensor) is None or name, "memory"))
    fresh = attrs.evolve(state_at(), progress=state.progress)
    fresh.store.memory.update(decode(json.loads(text), tensors.__getitem__))
    return fresh


@pytest.mark.parametrize("done", [1, 4, 6, 8, 12, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_reads_what_the_whole_one_does(kind: str, done: int) -> None:
    """In the middle of an epoch and at its end, in the first and in later ones, with another loader of the kind."""
    whole, _ = run_of(KINDS[kind](), state_at(), 20)
    first, state = run_of(KINDS[kind](), state_at(), done)
    rest, _ = run_of(KINDS[kind](), saved(state), 20 - done)
    assert first + rest == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_on_one_loader_is_the_first_one_again(kind: str) -> None:
    """A run leaves the loader as it found it, wherever it ends."""
    loader = KINDS[kind]()
    first, _ = run_of(loader, state_at(), 8)
    assert run_of(loader, state_at(), 8)[0] == first


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "told" in kind or "counts" in kind or "made" in kind])
def test_epochs_have_orders_of_their_own(kind: str) -> None:
    """What is told the epoch, counts it or is made for it reads another order in each."""
    if "persist" in kind and "counts" in kind:
        pytest.skip("workers are copies")
    found, _ = run_of(KINDS[kind](), state_at(), 12)
    assert found[:6] != found[6:]


class ToldLoader(DataLoader[Any]):
    """A loader, a sampler and a data set that are told the epoch."""

    epochs: list[int]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class ToldRows(Numbers):
    """Rows that say which epoch they were told."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.epoch, self.times = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.times = epoch, self.times + 1

    def __getitem__(self, index: int) -> int:
        return 100 * self.epoch + index


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_rows_are_told_the_epoch_wherever_they_are_read(options: dict[str, Any]) -> None:
    """A map-style data set is told in this process and in its workers, which may persist, once an epoch; so is the loader."""
    loader = ToldLoader(ToldRows(4), batch_size=2, **options)
    loader.epochs = []
    found, _ = run_of(loader, state_at(1), 6)
    assert found == [[100, 101], [102, 103], [200, 201], [202, 203], [300, 301], [302, 303]]
    assert loader.epochs == [1, 2, 3]
    assert loader.dataset.times == 3  # pyright: ignore[reportAttributeAccessIssue]


class Outer(IterableDataset[Any]):
    """Passes the epoch on, in its own way."""

    def __init__(self) -> None:
        self.inner = Told()

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch + 1000)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


def test_who_is_told_passes_it_on() -> None:
    """A data set within one that has set_epoch is not told besides."""
    assert read(stream(Outer()), 2) == [[i] for i in order_of(1002)]


def test_an_unshuffled_source_is_told_the_first_epoch() -> None:
    """With shuffle=False every epoch is epoch 0."""
    assert read(Source(stream(Told()), shuffle=False), 3) == [[i] for i in order_of(0)]


def test_an_evaluation_on_the_training_stream_does_not_disturb_it() -> None:
    """It reads epoch 0; the training goes on in its own."""
    task = Task(nn.Identity(), lambda model, batch: batch.sum(), lambda model, batch: {"first": batch.float().sum()})
    for kind in ("a stream that is told", "a stream that counts"):
        loader, scores = KINDS[kind](), list[Any]()
        state = TrainState.create(task)
        items = batches(loader, state_at())
        found = []
        for item in islice(items, 18):
            found.append(plain(item.batches[0]))
            scores.append(evaluate(attrs.evolve(state, progress=Progress(epoch=item.epoch)), loader))
        items.close()
        assert found == run_of(KINDS[kind](), state_at(), 18)[0]
        assert all(score == scores[0] for score in scores)


def test_what_cannot_be_put_back_is_refused() -> None:
    """A stream that counts where nobody sees it is noticed by its batches, in the middle of an epoch and at its end."""
    for done in (8, 12, 14):
        _, state = run_of(stream(Hidden()), state_at(), done)
        with pytest.raises(LoaderError, match=r"is not what it was|does not begin epoch 1 with the batch.*fl.per_epoch"):
            run_of(stream(Hidden()), saved(state), 1)


def test_a_stream_that_counts_and_whose_place_is_not_known_is_warned_of() -> None:
    """A state made by hand does not say where a stream stood."""
    with pytest.warns(LoaderWarning, match="counts its epochs itself, in dataset.epoch, and the state does not say where it stood"):
        next(batches(stream(CountsAtFirst()), state_at(2)))


def test_an_iterator_is_not_resumed_in_a_later_epoch() -> None:
    """The epochs before it are gone."""
    source = Source(rows_of(range(12)), limit=3)
    _, state = run_of(source, state_at(), 4)
    with pytest.raises(LoaderError, match=r"is an iterator, so it can be iterated only once, but 1 epochs of it were read.*fl.per_epoch"):
        run_of(Source(rows_of(range(12)), limit=3), saved(state), 1)


TENSORS = TensorDataset(torch.arange(128.0)[:, None])


def shuffled(n: int = 96, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(n))[:, None]), **{"batch_size": 32, "shuffle": True, **options})


def by_sampler(size: int) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(96.0)[:, None])
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, False))


@pytest.mark.parametrize(
    "before, after, match",
    [
        (shuffled, lambda: shuffled(128), "it had 96 samples, and has 128 samples"),
        (shuffled, lambda: shuffled(shuffle=False), "it had samples shuffled, and has samples in order"),
        (lambda: by_sampler(32), lambda: by_sampler(24), "within a batch"),
        (lambda: [torch.zeros(2)] * 3, lambda: [torch.zeros(2)] * 4, "it had 6 samples, and has 8 samples"),
        (
            lambda: TensorLoader(torch.arange(6), 2, shuffle=True),
            lambda: TensorLoader(torch.arange(8), 2, shuffle=True),
            "had 6 samples, and has 8",
        ),
        (
            lambda: DataLoader(Stream(6), batch_size=2),
            lambda: DataLoader(Stream(6), batch_size=3),
            "it had batches of 2, and has batches of 3",
        ),
        (lambda: zip_shortest(shuffled(), [1, 2, 3]), lambda: zip_shortest(shuffled(64), [1, 2, 3]), "it had 96 samples, and has 64 samples"),
        (shuffled, lambda: DataLoader(TensorDataset(torch.arange(96.0)[:, None] + 1), batch_size=32, shuffle=True), "is not what it was"),
        (lambda: [torch.ones(2)] * 3, lambda: [torch.zeros(2)] * 3, "batch 1 of epoch 0, the last before the state was saved"),
    ],
)  # fmt: skip
def test_data_that_is_not_what_it_was_is_refused_in_the_middle_of_an_epoch(before: Any, after: Any, match: str) -> None:
    """Another length, order, batch size or content is noticed before a step is taken; at the end of an epoch it is the user's choice."""
    _, state = run_of(before(), state_at(), 1)
    progress = attrs.evolve(state.progress, epoch_samples=32 if "within" in match else 0)
    with pytest.raises(LoaderError, match=match):
        run_of(after(), attrs.evolve(saved(state), progress=progress), 1)
    _, state = run_of(before(), state_at(), 4 if before is by_sampler else 3)
    found, _ = run_of(after(), saved(state), 1)
    assert len(found) == 1


def test_other_data_can_be_allowed(tmp_path: Any) -> None:
    """With allow=("data",) a run goes on with the data as it is."""
    task = Task(
        nn.Linear(1, 1), lambda model, batch: model(batch[0]).mean(), configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), 0.1)
    )

    def go(n: int, steps: int, **options: Any) -> TrainState:
        config = FitConfig(max_steps=steps, dir=str(tmp_path), progress=False, **options)
        return fit(TrainState.create(task), shuffled(n), config)

    go(96, 4)
    with pytest.raises(LoaderError, match=r'had 96 samples, and has 128 samples.*FitConfig.allow=."data",.'):
        go(128, 5, resume=True)
    assert go(128, 5, resume=True, allow=("data",)).progress.step == 5


def test_another_number_of_workers_holds_from_the_next_epoch_on() -> None:
    """The rest of the epoch of a stream is read by as many workers as it was begun with, and it is said."""
    whole, _ = run_of(stream(Stream(12), num_workers=2), state_at(), 14)
    for workers in (0, 3):
        first, state = run_of(stream(Stream(12), num_workers=2), state_at(), 5)
        items = batches(stream(Stream(12), num_workers=workers), saved(state))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [plain(item.batches[0]) for item in islice(items, 12)]
        items.close()
        assert any(f"is read by 2 workers, as it was begun, and not by {workers}" in str(each.message) for each in caught)
        assert first + found[:7] == whole[:12]
        assert found[7:] == run_of(stream(Stream(12), num_workers=workers), state_at(1), 5)[0]


def test_a_step_that_changes_its_batch_is_not_refused() -> None:
    """Such a batch cannot be compared, so nothing is said of it."""
    _, state = run_of(list(rows_of(range(6))), state_at(), 2, lambda batch: batch.add_(1))
    assert state.memory["loader"]["data"]["digest"] is None
    assert run_of(list(rows_of(range(6))), saved(state), 1)[0] == [[2]]


@pytest.mark.parametrize("given", [{}, {"batch_size": 3, "shuffle": True}, {"sampler": SequentialSampler(range(12))}])
def test_nothing_of_a_map_style_loader_is_remembered_between_epochs(given: dict[str, Any]) -> None:
    """Its place is two integers, and an epoch that has ended needs no more."""
    loader = DataLoader(Numbers(12), **{"batch_size": 4, **given})
    _, state = run_of(loader, state_at(), len(loader))
    assert state.memory["loader"] == {"epoch": 1, "batch": 0}


def test_a_loader_is_made_for_each_epoch_once() -> None:
    """`make` is given the state's seed and the epoch, and the batch to begin with only if it takes one."""
    asked: list[Any] = []
    loader = per_epoch(lambda seed, epoch: asked.append((seed, epoch)) or [torch.zeros(1)] * 3)
    run_of(loader, state_at(seed=7), 7)
    assert asked == [(7, 0), (7, 1), (7, 2)]
    asked.clear()
    entered = per_epoch(lambda seed, epoch, start=0: asked.append(start) or rows_of(range(start, 6)))
    assert run_of(entered, state_at(0, 4), 3)[0] == [[4], [5], [0]]
    assert asked == [4, 0]


def test_large_seeds_are_made_small_for_other_libraries() -> None:
    """What `make` gets has at most 31 bits, and follows from the seed."""
    seeds: list[int] = []
    for seed in (5, 2**40 + 5, 2**63 + 1):
        run_of(per_epoch(lambda seed, epoch: seeds.append(seed) or [torch.zeros(1)]), state_at(seed=seed), 1)
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert max(seeds) < 2**31


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda seed: [], TypeError, r"must be a function of .seed, epoch., or of .seed, epoch, start., but takes"),
        (3, TypeError, "must be a function of seed and epoch that gives a loader"),
    ],
)
def test_a_function_that_cannot_make_a_loader_is_refused(make: Any, error: Any, match: str) -> None:
    """Before any work."""
    with pytest.raises(error, match=match):
        per_epoch(make)


def test_a_function_that_makes_nothing_is_named() -> None:
    """None is most often a forgotten return."""
    with pytest.raises(LoaderError, match=r"make.seed=0, epoch=0. must give a loader, but gave None; does it return"):
        run_of(per_epoch(lambda seed, epoch: None), state_at(), 1)


def test_counters_hold_plain_attributes_and_leave_data_alone() -> None:
    """What is too long to be a counter, and what keeps a state of its own, is not looked at."""

    class Holder:
        def __init__(self) -> None:
            self.rows, self.order, self.inner, self.weights = list(range(200_000)), [2, 1], Placed(3), np.zeros((3, 3))

    holder = Holder()
    counters = Counters(holder)
    assert counters.first == {"order": [2, 1]}
    holder.order.reverse()
    assert counters.changed() == {"order": [1, 2]}
    other = copy.deepcopy(holder)
    counters.put({})
    assert (holder.order, other.order) == ([2, 1], [1, 2])


class Replay(IterableDataset[Any]):
    """A stream that reads what somebody else puts into a buffer."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        yield from rows_of(range(6))


def test_what_a_stream_reads_from_is_left_alone() -> None:
    """A buffer that is filled during a run is not put back to what it was before."""
    buffer = SimpleNamespace(size=0)
    run_of(stream(Replay(buffer)), state_at(), 3, lambda _: setattr(buffer, "size", buffer.size + 1))
    assert buffer.size == 3


def test_ranks_with_data_of_their_own_share_no_generators() -> None:
    """One rank saves for all: counters are common, orders and generators are each rank's own."""
    data = CountsAtFirst()
    data.generator = random.Random(0)  # pyright: ignore[reportAttributeAccessIssue]
    world = SimpleNamespace(rank=0, size=2, total=lambda numbers: numbers)
    source = Source(sharded(stream(data)), share=Share(world))
    list(source.reader.epoch(Span(seed=0, epoch=0)))
    data.generator.random()  # pyright: ignore[reportAttributeAccessIssue]
    assert source.position(True) == {"remembers": {"dataset.epoch": 0}}


class Skips(Sampler[int]):
    """A sampler without a length whose numbers do not grow evenly."""

    def __init__(self) -> None:
        self.doubled = 1

    def __iter__(self) -> Iterator[int]:
        self.doubled *= 2
        return iter(range(4))


def test_numbers_of_a_sampler_that_do_not_count_epochs_are_left() -> None:
    """Only what grows by the same amount in each epoch is a counter."""
    assert run_of(stream(Numbers(4), sampler=Skips()), state_at(3), 4)[0] == [0, 1, 2, 3]
