"""Laws of keyed order: what a DataLoader reads is a function of (seed, epoch), from any batch on, for any number of workers."""

import copy
import os
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from fnlight.data import Item, Source, batches
from fnlight.errors import LoaderError, LoaderWarning
from fnlight.tensors import EVALUATE
from tests.data.loaders import (
    ByLength,
    Endless,
    Epochal,
    Noisy,
    NoisyAtOnce,
    Numbers,
    Owner,
    Placed,
    SizedStream,
    Stream,
    flags,
    flat,
    generators,
    read,
    state_at,
)


def test_an_epoch_reads_every_sample_once_in_an_order_of_its_own() -> None:
    """Epochs, seeds and streams have different permutations of the same samples; the same ones have the same."""
    source = Source(DataLoader(range(50), batch_size=8, shuffle=True))
    first = flat(read(source))
    assert sorted(first) == list(range(50))
    assert first == flat(read(source)) == flat(read(DataLoader(range(50), batch_size=8, shuffle=True)))
    others = [
        flat(read(source, epoch=1)),
        flat(read(source, seed=1)),
        flat([b.tolist() for b, _, _ in source.epoch(0, 0, stream=EVALUATE)]),
    ]
    assert len({tuple(order) for order in [first, *others, list(range(50))]}) == 5


def test_the_order_depends_on_no_global_generator() -> None:
    """Whatever the global generators are seeded with, an epoch has the same order."""
    loader = DataLoader(range(20), batch_size=4, shuffle=True)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the global one
        found.append(read(loader))
    assert found[0] == found[1]


def test_a_sequential_loader_stays_sequential() -> None:
    """Without shuffling the data comes in its own order in every epoch."""
    assert read(DataLoader(range(5), batch_size=2), epoch=3) == [[0, 1], [2, 3], [4]]


def test_shuffle_false_takes_the_data_in_its_own_order() -> None:
    """`shuffle=False` makes every epoch the same: sequential, or a user's sampler as in epoch 0."""
    assert read(DataLoader(range(5), batch_size=2, shuffle=True), epoch=3, shuffle=False) == [[0, 1], [2, 3], [4]]
    custom = Source(DataLoader(range(9), batch_size=2, sampler=SubsetRandomSampler(range(9))), shuffle=False)
    assert read(custom, epoch=0) == read(custom, epoch=3)
    stream = Source(DataLoader(Stream(4), batch_size=2), shuffle=False)
    assert read(stream, epoch=0) == read(stream, epoch=3)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 23), size=st.integers(1, 6), drop=st.booleans(), shuffle=st.booleans(), group=st.integers(1, 4), epoch=st.integers(0, 2),
    data=st.data(),
)  # fmt: skip
def test_a_run_goes_on_from_any_step_with_the_batches_it_would_have_had(
    n: int, size: int, drop: bool, shuffle: bool, group: int, epoch: int, data: st.DataObject
) -> None:
    """The items from a place on are those of the uninterrupted stream, into the next epochs; counts and flags included."""
    size = min(n, size)
    loader = DataLoader(range(n), batch_size=size, drop_last=drop, shuffle=shuffle)
    steps = -(-len(loader) // group)

    def told(item: Item) -> Any:
        return [b.tolist() for b in item.batches], item.epoch, item.batch, item.last, item.samples

    whole = [told(item) for item in islice(batches(loader, state_at(epoch), group), 2 * steps)]
    done = data.draw(st.integers(0, steps - 1))
    rest = [told(item) for item in islice(batches(loader, state_at(epoch, done * group), group), 2 * steps - done)]
    assert rest == whole[done:]
    assert [last for _, _, _, last, _ in whole] == ([False] * (steps - 1) + [True]) * 2
    assert [at for _, at, _, _, _ in whole] == [epoch] * steps + [epoch + 1] * steps
    assert sum(samples for _, _, _, _, samples in whole) == 2 * (n // size * size if drop else n)


def test_skipping_reads_no_sample_of_what_is_skipped() -> None:
    """To begin at batch k, the dataset is asked for nothing before it."""
    data = Numbers(20)
    found = flat(read(DataLoader(data, batch_size=4, shuffle=True), start=3))
    assert data.read == found
    assert len(found) == 8


def test_a_place_at_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    """A state whose batch is the number of batches goes on with the next epoch."""
    for loader in (DataLoader(range(6), batch_size=2), [torch.zeros(1)] * 3, DataLoader(range(6), batch_sampler=[[0, 1], [2], [3]])):
        item = next(iter(batches(loader, state_at(1, 3))))
        assert (item.epoch, item.batch) == (2, 1)


def test_a_place_beyond_the_end_of_an_epoch_is_an_error() -> None:
    """Data that became shorter than the state's place is never silently begun anew."""
    message = "is at batch 4 of epoch 1, but this .* has 3 batches per epoch: the data became shorter"
    loaders = [DataLoader(range(6), batch_size=2), [torch.zeros(1)] * 3, DataLoader(range(6), batch_sampler=[[0, 1], [2], [3]])]
    for loader in loaders:
        with pytest.raises(LoaderError, match=message):
            next(iter(batches(loader, state_at(1, 4))))
    with pytest.raises(LoaderError, match=message), pytest.warns(LoaderWarning, match="4 batches of epoch 1 are read and discarded"):
        next(iter(batches(DataLoader(Stream(6), batch_size=2), state_at(1, 4))))
    for loader in [*loaders, Placed(9)]:
        with pytest.raises(LoaderError, match=r"is at batch 4 of epoch 1.* has 2 batches per epoch"):
            next(iter(batches(loader, state_at(1, 4), limit=2)))


def test_a_large_permutation_is_sliced_and_not_made_a_list() -> None:
    """An epoch over a million rows costs its permutation and one slice a batch."""
    source = Source(DataLoader(range(1_000_000), batch_size=4, shuffle=True))
    first, again = next(source.epoch(0, 0, 249_999)), next(source.epoch(0, 0, 249_999))
    assert first[0].tolist() == again[0].tolist()
    assert first[1:] == (4, True)


def samples_of(loader: Any, epoch: int = 0, start: int = 0) -> dict[int, list[float]]:
    """The random numbers of each sample by its index."""
    return {int(sample[0]): sample[1:] for sample in flat(read(loader, epoch, start))}


@pytest.mark.parametrize("kind", [Noisy, NoisyAtOnce])
def test_random_numbers_of_samples_do_not_depend_on_workers_or_on_skipping(kind: Any) -> None:
    """torch's, Python's and NumPy's draws in a dataset are the same for 0, 1 and 2 workers, and from any batch on."""
    found = [read(DataLoader(kind(10), batch_size=3, shuffle=True, num_workers=n)) for n in (0, 1, 2)]
    assert found[0] == found[1] == found[2]
    for n in (0, 2):
        assert read(DataLoader(kind(10), batch_size=3, shuffle=True, num_workers=n), start=2) == found[0][2:]


def test_random_numbers_of_a_sample_are_its_own() -> None:
    """A sample's draws depend on the seed, the epoch and its index, not on the batch it is in."""
    found = samples_of(DataLoader(Noisy(8), batch_size=3, shuffle=True))
    assert found == samples_of(DataLoader(Noisy(8), batch_size=5))
    assert found == samples_of(DataLoader(Subset(Noisy(8), range(8)), batch_size=2))
    assert len({tuple(numbers) for numbers in found.values()}) == 8
    other = samples_of(DataLoader(Noisy(8), batch_size=3), epoch=1)
    assert all(found[i] != other[i] for i in range(8))


def test_repeated_samples_of_a_sampler_draw_different_numbers() -> None:
    """A sampler that gives one index many times gets a different augmentation each time, keyed by the place in the epoch."""
    loader = DataLoader(Noisy(3), batch_size=2, sampler=WeightedRandomSampler([0.0, 0.0, 1.0], 6))
    found = flat(read(loader))
    assert [sample[0] for sample in found] == [2.0] * 6
    assert len({sample[1] for sample in found}) == 6
    assert flat(read(loader, start=1)) == found[2:]


def noisy_collate(samples: list[Any]) -> Any:
    """A collate function that draws."""
    return torch.cat([default_collate(samples).double().flatten(), torch.rand(1, dtype=torch.float64)])


@pytest.mark.parametrize("data", [Noisy(6), TensorDataset(torch.arange(6))])
def test_a_collate_function_draws_keyed_numbers(data: Any) -> None:
    """What a collate function draws does not depend on workers or skipping, and differs from batch to batch."""

    def collate(samples: list[Any]) -> Any:
        return noisy_collate([s[0] if isinstance(s, tuple) else s for s in samples])

    found = [read(DataLoader(data, batch_size=2, shuffle=True, num_workers=n, collate_fn=collate)) for n in (0, 2)]
    assert found[0] == found[1]
    assert read(DataLoader(data, batch_size=2, shuffle=True, collate_fn=collate), start=1) == found[0][1:]
    assert len({batch[-1] for batch in found[0]}) == 3


def test_datasets_known_to_draw_nothing_are_spared_the_seeding() -> None:
    """Reading tensors, lists and parts of them leaves the global generators alone."""
    tensors = TensorDataset(torch.arange(4.0))
    before = generators()
    for data in (tensors, [1, 2, 3, 4], Subset(tensors, [0, 1]), ConcatDataset([tensors, tensors]), StackDataset(a=tensors, b=tensors)):
        assert list(Source(DataLoader(data, batch_size=2, shuffle=True)).epoch(0, 0))
    assert generators() == before


def test_a_loader_without_collation_is_keyed_and_skipped_too() -> None:
    """``batch_size=None`` hands over what the dataset gives, in keyed order, with keyed draws and exact flags."""
    loaders = [DataLoader(Noisy(5), batch_size=None, shuffle=True, num_workers=n) for n in (0, 1)]
    found = [read(loader) for loader in loaders]
    assert found[0] == found[1]
    assert read(loaders[0], start=3) == found[0][3:]
    assert flags(Source(loaders[0])) == [(4, False)] * 4 + [(4, True)]
    lists = DataLoader(TensorDataset(torch.arange(7)), batch_size=None, sampler=BatchSampler(SequentialSampler(range(7)), 3, False))
    assert [b[0].tolist() for b, _, _ in Source(lists).epoch(0, 0)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert flags(Source(lists)) == [(3, False), (3, False), (1, True)]


def show_dataset(worker_id: int) -> None:
    """A worker_init_fn that changes the dataset as its worker sees it."""
    info = get_worker_info()
    assert info is not None
    info.dataset.n = 100 + worker_id  # pyright: ignore[reportAttributeAccessIssue]


class Telling(Numbers):
    """Tells the dataset that the worker sees, and the process it runs in."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        return torch.tensor([self.n, int(info.dataset is self), info.id, torch.initial_seed() >= 0, os.getpid()])


def test_workers_see_the_users_own_dataset() -> None:
    """In a worker, ``worker_init_fn`` and ``get_worker_info().dataset`` mean the user's dataset, as with torch's own loop."""
    found = flat(read(DataLoader(Telling(4), batch_size=2, num_workers=1, worker_init_fn=show_dataset)))
    assert [row[:2] for row in found] == [[100, 1]] * 4


def test_persistent_workers_are_kept_over_epochs_and_keyed_by_each() -> None:
    """With ``persistent_workers`` all epochs of a source have the same processes, also after an epoch that was left early."""
    source = Source(DataLoader(Telling(6), batch_size=1, num_workers=2, persistent_workers=True))
    pids = [{row[4] for row in flat(read(source, epoch))} for epoch in (0, 1)]
    assert len(pids[0]) == 2
    assert pids[0] == pids[1]
    loaders = [DataLoader(Noisy(8), batch_size=2, shuffle=True, num_workers=2, persistent_workers=flag) for flag in (True, False)]
    kept, fresh = map(Source, loaders)
    assert read(kept, 0) == read(fresh, 0)
    next(kept.epoch(0, 1))
    assert read(kept, 2, start=1) == read(fresh, 2, start=1)


def test_workers_that_do_not_persist_see_what_changed_in_the_dataset() -> None:
    """A new epoch has new workers, with the dataset as it is then."""
    data = Telling(2)
    source = Source(DataLoader(data, batch_size=1, num_workers=1))
    assert flat(read(source))[0][0] == 2
    data.n = 3
    assert [row[0] for row in flat(read(source, 1))] == [3, 3, 3]


def test_spawned_workers_read_the_same() -> None:
    """What goes to the workers can be pickled."""
    loader = DataLoader(Noisy(4), batch_size=2, shuffle=True, num_workers=1, multiprocessing_context="spawn")
    assert read(loader) == read(DataLoader(Noisy(4), batch_size=2, shuffle=True))


def test_the_users_loader_is_left_as_it_was() -> None:
    """No attribute of the loader, its sampler or its generators changes, and torch's own loop gives what it would have given."""
    generator = torch.Generator().manual_seed(3)
    loaders = [
        DataLoader(range(8), batch_size=3, shuffle=True, generator=generator),
        DataLoader(range(8), batch_size=3, sampler=Epochal(8)),
        DataLoader(range(8), batch_size=3, sampler=Owner(8, random.Random(0))),
        DataLoader(SizedStream(8), batch_size=3),
    ]
    for loader in loaders:
        before = {name: copy.deepcopy(vars(value)) if isinstance(value, Sampler) else value for name, value in vars(loader).items()}
        state = loader.generator.get_state() if loader.generator is not None else None
        owner = getattr(loader.sampler, "generator", None)
        own = owner.getstate() if isinstance(owner, random.Random) else None
        source = Source(loader, limit=0.9)
        assert [len(read(source, epoch)) for epoch in (0, 1)] == [2, 2]
        assert before.keys() == vars(loader).keys()
        for name, value in vars(loader).items():
            kept = before[name]
            if not isinstance(value, Sampler):
                assert value is kept
            elif not isinstance(value, BatchSampler):
                assert {k: v for k, v in vars(value).items() if k in ("epoch", "n")} == {
                    k: v for k, v in kept.items() if k in ("epoch", "n")
                }
        assert state is None or bool((loader.generator.get_state() == state).all())
        assert own is None or (isinstance(owner, random.Random) and owner.getstate() == own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(range(12), batch_size=3, sampler=WeightedRandomSampler(torch.arange(1.0, 13.0), 12)),
        lambda: DataLoader(range(12), batch_size=3, sampler=SubsetRandomSampler(range(12), generator=torch.Generator())),
        lambda: DataLoader(range(12), batch_size=3, sampler=RandomSampler(range(12), replacement=True)),
        lambda: DataLoader(range(12), batch_size=3, sampler=RandomSampler(range(12), num_samples=12 * 3)),
        lambda: DataLoader(range(12), batch_size=3, sampler=Owner(12, torch.Generator())),
        lambda: DataLoader(range(12), batch_size=3, sampler=Owner(12, random.Random(0))),
        lambda: DataLoader(range(12), batch_size=3, sampler=Owner(12, np.random.default_rng(0))),
        lambda: DataLoader(range(12), batch_size=3, sampler=Owner(12, np.random.RandomState(0))),
        lambda: DataLoader(range(12), batch_size=3, sampler=Epochal(12)),
        lambda: DataLoader(Numbers(12), batch_sampler=ByLength(Numbers(12))),
    ],
)  # fmt: skip
def test_a_sampler_of_the_users_own_is_kept_and_keyed(make: Any) -> None:
    """It is drawn from a copy, keyed by (seed, epoch) and nothing else, and entered at any batch."""
    torch.manual_seed(1)
    source = Source(make())
    first = read(source)
    torch.manual_seed(2)
    assert read(source) == first == read(make())
    assert read(source, 1) != first
    assert read(source, 0, start=2) == first[2:]
    assert [last for _, last in flags(source)] == [False] * (len(first) - 1) + [True]


def test_samples_a_weight_of_zero_never_come() -> None:
    """A weighted sampler keeps its weights: it is not replaced by a permutation."""
    weights = [0.0] * 5 + [1.0] * 5
    assert min(flat(read(DataLoader(range(10), batch_size=2, sampler=WeightedRandomSampler(weights, 20))))) >= 5


def test_set_epoch_is_called_on_the_copy_of_a_sampler() -> None:
    """A sampler that wants to know the epoch is told, also behind a batch sampler."""
    assert flat(read(DataLoader(range(4), batch_size=2, sampler=Epochal(4)), epoch=1)) == [1, 2, 3, 0]
    assert flat(read(DataLoader(range(4), batch_sampler=BatchSampler(Epochal(4), 2, False)), epoch=2)) == [2, 3, 0, 1]


def test_a_sampler_without_end_is_read_as_far_as_it_is_needed() -> None:
    """Indices are drawn some at a time, so an endless sampler makes an endless epoch, or one that a limit ends."""
    loader = DataLoader(range(10), batch_size=2, sampler=Endless(10))
    found = [item.batches[0].tolist() for item in islice(batches(loader, state_at()), 100)]
    assert [item.batches[0].tolist() for item in islice(batches(loader, state_at(0, 90)), 10)] == found[90:]
    assert flags(Source(loader, limit=3)) == [(2, False), (2, False), (2, True)]


def test_a_sampler_that_cannot_be_copied_is_named() -> None:
    """A sampler that holds a running generator is refused with what to do."""
    loader = DataLoader(range(4), batch_sampler=([i] for i in range(4)))
    with pytest.raises(LoaderError, match=r"the sampler generator cannot be copied.*create what it needs in its __iter__"):
        read(loader)


def test_drawing_indices_leaves_the_global_generators_alone() -> None:
    """Orders, permutations and the user's samplers are drawn aside; nor is the workers' seed drawn from the global generator."""
    loaders = [
        DataLoader(range(9), batch_size=2, shuffle=True),
        DataLoader(range(9), batch_size=2, shuffle=True, num_workers=1),
        DataLoader(range(9), batch_size=2, sampler=WeightedRandomSampler([1.0] * 9, 9)),
        DataLoader(Numbers(8), batch_sampler=ByLength(Numbers(8)), num_workers=1),
        DataLoader(Stream(4), batch_size=2, num_workers=1),
    ]
    for loader in loaders:
        source, before = Source(loader), generators()
        read(source)
        assert generators() == before


def test_a_batch_sampler_given_as_the_sampler_is_kept_and_keyed() -> None:
    """Without collation, a sampler that gives lists of indices hands them to the dataset whole."""
    sampler = BatchSampler(SubsetRandomSampler(range(12)), 5, False)
    source = Source(DataLoader(TensorDataset(torch.arange(12)), batch_size=None, sampler=sampler))
    found = [(batch[0].tolist(), samples, last) for batch, samples, last in source.epoch(0, 0)]
    assert sorted(flat([batch for batch, _, _ in found])) == list(range(12))
    assert [(samples, last) for _, samples, last in found] == [(5, False), (5, False), (2, True)]
    assert [batch[0].tolist() for batch, _, _ in source.epoch(0, 0, start=1)] == [batch for batch, _, _ in found[1:]]
