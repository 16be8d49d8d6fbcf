"""Buckets of lengths are a partition of the data, a function of (seed, epoch), and exact from any batch on."""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from fnlight import FitConfig, Loaders, Mean, TrainState, fit, load, total_steps
from fnlight.data import LengthBuckets, Part, Share, Source, batches
from fnlight.errors import LoaderError
from fnlight.state import Task
from fnlight.testing import assert_trees_equal
from tests.data.loaders import Noisy, Numbers, flags, flat, read, state_at

LENGTHS = [int(n) for n in torch.randint(1, 60, (101,), generator=torch.Generator().manual_seed(0))]


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    """A loader of samples that are their own numbers."""
    given = {"batch_size": 8, "buckets": 4, **options}
    workers = {"num_workers": given.pop("num_workers", 0), "collate_fn": given.pop("collate_fn", None)}
    return DataLoader(range(101) if dataset is None else dataset, batch_sampler=LengthBuckets(LENGTHS, **given), **workers)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    """Epochs and seeds have different batches of the same samples; the same ones have the same, in new loaders too."""
    first = read(loader())
    assert sorted(flat(first)) == list(range(101))
    assert first == read(loader())
    assert len({str(read(loader(), epoch=e, seed=s)) for e in (0, 1) for s in (0, 1)}) == 4
    assert len({str(sorted(map(sorted, read(loader(), epoch=e)))) for e in (0, 1)}) == 2  # the batches themselves are mixed anew


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_whatever_the_lengths_are(lengths: list[int], size: int, buckets: int, tokens: bool, drop_last: bool, epoch: int) -> None:
    """No sample comes twice, none is missing but with `drop_last`, no batch is too large, and the number of batches is the one that is said."""
    bound = {"max_tokens": 40 * size} if tokens else {"batch_size": size}
    try:
        sampler = LengthBuckets(lengths, **bound, buckets=buckets, drop_last=drop_last)
    except LoaderError:
        assert drop_last  # no bucket fills a batch
        return
    found = sampler.order(torch.Generator().manual_seed(epoch))
    assert len(found) == len(sampler)
    assert len(set(flat(found))) == len(flat(found))
    assert drop_last or sorted(flat(found)) == list(range(len(lengths)))
    for batch in found:
        assert batch
        assert len(batch) <= size if not tokens else max(lengths[i] for i in batch) * len(batch) <= 40 * size
    if not tokens and not drop_last:
        assert sum(len(batch) < size for batch in found) <= 1


def test_every_place_is_entered_without_reading_what_is_before() -> None:
    """From any batch on an epoch is the rest of it, and only its samples are read."""
    whole = read(loader())
    for start in range(len(whole) + 1):
        dataset = Numbers(101)
        assert read(loader(dataset), start=start) == whole[start:]
        assert dataset.read == flat(whole[start:])
    with pytest.raises(LoaderError, match="is at batch 14 of epoch 0, but this DataLoader has 13 batches per epoch"):
        read(loader(), start=14)


def test_samples_draw_as_in_any_other_order() -> None:
    """The random numbers of a sample are those it has in a plain shuffled loader, for any number of workers."""
    plain = {row[0]: row for row in flat(read(DataLoader(Noisy(101), batch_size=7, shuffle=True)))}
    for num_workers in (0, 2):
        assert {row[0]: row for row in flat(read(loader(Noisy(101), num_workers=num_workers)))} == plain


def test_samples_and_the_last_batch_are_known() -> None:
    """Each batch says how many samples it has, and the last of an epoch that it is."""
    source = Source(loader())
    found = flags(source)
    assert source.num_batches == len(found) == 13
    assert sum(samples for samples, _ in found) == 101
    assert [last for _, last in found] == [False] * 12 + [True]
    items = list(islice(batches(loader(), state_at(batch=12)), 2))
    assert [(item.epoch, item.batch, item.last) for item in items] == [(0, 13, True), (1, 1, False)]


def test_ranks_read_their_parts_of_every_batch() -> None:
    """Several ranks together read the batches that one process reads, each sample with the random numbers that it has there."""
    whole = read(loader(Noisy(101)))
    shares = [Share(SimpleNamespace(rank=rank, size=2)) for rank in (0, 1)]
    parts = [[whole_of(batch).tolist() for batch, _, _ in Source(loader(Noisy(101)), share=share).epoch(0, 0)] for share in shares]
    assert [[*one, *other] for one, other in zip(*parts, strict=True)] == whole


def whole_of(batch: Any) -> Any:
    """What a rank reads of a batch, which says what it counts where that is uneven."""
    return batch.batch if isinstance(batch, Part) else batch


def test_padding_is_what_it_is_said_to_be() -> None:
    """Counted over padded batches, it is less with more buckets, and one bucket has what a shuffled loader has."""

    def counted(found: list[list[int]]) -> float:
        padded = [pad_sequence([torch.ones(LENGTHS[i]) for i in batch], batch_first=True) for batch in found]
        return 1 - sum(float(p.sum()) for p in padded) / sum(p.numel() for p in padded)

    shares = []
    for buckets in (1, 4, 13):
        sampler = LengthBuckets(LENGTHS, 8, buckets=buckets)
        found = sampler.order(torch.Generator().manual_seed(1))
        assert sampler.padding(found) == pytest.approx(counted(found))
        shares.append(sampler.padding(found))
    assert shares[0] > 2 * shares[1] > 2 * shares[2]
    assert sampler.padding(torch.randperm(101, generator=torch.Generator().manual_seed(0)).split(8)) == pytest.approx(shares[0], abs=0.1)


def test_a_number_of_positions_makes_batches_of_equal_work() -> None:
    """Short samples come in larger batches than long ones."""
    sampler = LengthBuckets(LENGTHS, max_tokens=240, buckets=4)
    sizes = {len(batch): max(LENGTHS[i] for i in batch) for batch in sampler}
    assert max(sizes) >= 2 * min(sizes)
    assert all(size * longest <= 240 for size, longest in sizes.items())


def test_unshuffled_it_goes_from_short_to_long_every_time() -> None:
    """For evaluations, and where an epoch is taken as it lies: the same batches in every epoch."""
    one, other = (read(loader(shuffle=False), epoch=e) for e in (0, 1))
    assert one == other == read(loader(), epoch=3, shuffle=False)
    assert [LENGTHS[i] for i in flat(one)] == sorted(LENGTHS)


def test_outside_of_a_run_it_draws_from_torchs_generator() -> None:
    """A plain loop over the loader is another epoch each time, and the same one after the same seed."""
    torch.manual_seed(3)
    first, second = ([batch.tolist() for batch in loader()] for _ in range(2))
    torch.manual_seed(3)
    assert first == [batch.tolist() for batch in loader()] != second


def collate(samples: list[Any]) -> tuple[Any, Any]:
    """Texts, padded to the longest, with where they are text."""
    return pad_sequence(samples, batch_first=True), pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in samples], batch_first=True)


def train_step(model: Any, batch: Any) -> Any:
    """The exact mean over tokens: padding changes nothing."""
    x, held = batch
    losses = F.cross_entropy(model(x).transpose(1, 2), x, reduction="none")
    return Mean((losses * held).sum(), held.sum()), {"tokens": Mean(held.sum(), 1)}


def test_a_training_over_buckets_resumes_bitwise(tmp_path: Any) -> None:
    """A run that ends within an epoch, is saved and loaded equals one that did not end; its length is known beforehand."""
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 9, (n,), generator=draw) for n in LENGTHS]
    data = DataLoader(texts, batch_sampler=LengthBuckets(LENGTHS, max_tokens=200, buckets=5), collate_fn=collate)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Dropout(0.1), nn.Linear(8, 9))
    task = Task(model, train_step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    config = {"progress": False, "device": "cpu"}
    total = total_steps(FitConfig(max_epochs=2, **config), Loaders(train=data))
    assert total == 2 * len(data.batch_sampler)  # pyright: ignore[reportArgumentType]
    whole = fit(TrainState.create(task), data, FitConfig(max_epochs=2, **config))
    assert whole.progress.step == total
    for k in (3, total // 2, total - 1):
        fit(TrainState.create(task), data, FitConfig(max_steps=k, dir=tmp_path / str(k), **config))
        resumed = fit(load(tmp_path / str(k), task), data, FitConfig(max_epochs=2, **config))
        assert_trees_equal([resumed.params, resumed.opt_state, resumed.history], [whole.params, whole.opt_state, whole.history])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "takes either batch_size or max_tokens, but got batch_size=None, max_tokens=None"),
        ({"batch_size": 2, "max_tokens": 9}, "takes either batch_size or max_tokens, but got batch_size=2, max_tokens=9"),
        ({"batch_size": 0}, r"LengthBuckets\(batch_size=...\) must be a whole number of at least 1, but got 0"),
        ({"max_tokens": 2.5}, r"LengthBuckets\(max_tokens=...\) must be a whole number"),
        ({"batch_size": 2, "buckets": True}, r"LengthBuckets\(buckets=...\) must be a whole number"),
        ({"max_tokens": 5}, "sample 1 has length 7, which is more than max_tokens=5; truncate it, leave it out, or raise max_tokens"),
        (
            {"batch_size": 4, "drop_last": True},
            "LengthBuckets has no batch: no bucket of its 3 samples fills a batch, and drop_last is True",
        ),
        ({"lengths": [], "batch_size": 2}, r"needs the length of every sample, integers >= 0 of shape \[samples\], but got"),
        ({"lengths": [1.5, 2.0], "batch_size": 2}, r"but got torch.float32 of shape \[2\]"),
        ({"lengths": [3, -1], "batch_size": 2}, r"but got torch.int64 of shape \[2\], some below 0"),
        ({"lengths": torch.ones(2, 2, dtype=torch.int64), "batch_size": 2}, r"shape \[2, 2\]"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(given: dict[str, Any], match: str) -> None:
    """Each error says what was expected and what there was."""
    with pytest.raises(LoaderError, match=match):
        LengthBuckets(**{"lengths": [3, 7, 5], **given})


def test_a_dataset_of_another_length_is_an_error() -> None:
    """Samples that nobody would read, or that are not there, are told of before the first batch."""
    for size in (5, 200):
        with pytest.raises(LoaderError, match=f"LengthBuckets has 101 lengths, but the dataset has {size} samples"):
            read(DataLoader(range(size), batch_sampler=LengthBuckets(LENGTHS, 8)))
