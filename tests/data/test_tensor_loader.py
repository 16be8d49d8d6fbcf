"""Laws of `TensorLoader`: the batches of a DataLoader over the same tensors, without fetching samples one by one."""

from itertools import islice
from typing import Any

import attrs
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.data import Source, batches
from fnlight.errors import LoaderError
from fnlight.tensors import equal
from fnlight.testing import tiny_batches, tiny_task
from tests.data.loaders import Pair, state_at

TENSORS = (torch.arange(23).float(), torch.arange(23) * 10)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_its_batches_are_those_of_a_data_loader_over_the_same_tensors(shuffle: bool, drop_last: bool) -> None:
    """Order, contents, counts and the flag of the last batch agree, in every epoch and from every batch on."""
    ours = Source(fl.TensorLoader(TENSORS, 4, shuffle, drop_last))
    theirs = Source(DataLoader(TensorDataset(*TENSORS), 4, shuffle, drop_last=drop_last))
    assert ours.num_batches == theirs.num_batches
    for epoch in (0, 1):
        for start in range(ours.num_batches + 1):
            found, wanted = (list(source.epoch(3, epoch, start)) for source in (ours, theirs))
            assert [(samples, last) for _, samples, last in found] == [(samples, last) for _, samples, last in wanted]
            assert equal([list(batch) for batch, _, _ in found], [list(batch) for batch, _, _ in wanted])


def test_a_run_over_tensors_is_bitwise_the_run_over_a_data_loader() -> None:
    """Whether samples are collated or rows are gathered makes no difference to the weights."""
    x, y = (torch.cat(part) for part in zip(*tiny_batches("mlp", num_batches=9), strict=True))
    config = fl.FitConfig(max_epochs=3, progress=False)
    ends = [
        fl.fit(fl.TrainState.create(tiny_task(), seed=1), loader, config)
        for loader in (fl.TensorLoader((x, y), 8, shuffle=True), DataLoader(TensorDataset(x, y), 8, shuffle=True))
    ]
    assert equal(dict(ends[0].params), dict(ends[1].params))
    assert ends[0].progress == ends[1].progress


@given(samples=st.integers(1, 300), size=st.integers(1, 9), shuffle=st.booleans(), limit=st.integers(1, 400))
def test_every_sample_comes_once_an_epoch(samples: int, size: int, shuffle: bool, limit: int) -> None:
    """However many batches are gathered at a time, and wherever a limit ends the epoch."""
    source = Source(fl.TensorLoader(torch.arange(samples), size, shuffle), limit=limit)
    found = [batch for batch, _, _ in source.epoch(0, 0)]
    seen = torch.cat(found).tolist()
    assert len(seen) == len(set(seen)) == min(samples, limit * size)
    assert all(len(batch) == size for batch in found[:-1])


@pytest.mark.parametrize(
    "tree", [torch.arange(6), [torch.arange(6)], {"x": torch.arange(6), "y": (torch.ones(6, 2),)}, Pair(torch.arange(6), torch.ones(6, 2))]
)
def test_a_batch_is_the_tree_that_was_given(tree: Any) -> None:
    """Tuples, lists, dicts, namedtuples and nests of them keep their types."""
    found = list(fl.TensorLoader(tree, 4))
    assert [type(batch) for batch in found] == [type(tree)] * 2
    assert equal(found[0], fl.tensors.map_tensors(lambda t: t[:4], tree))


def test_outside_of_a_run_the_order_is_drawn_from_the_global_generator() -> None:
    """As with a DataLoader: the same seed gives the same order, and every epoch has its own."""
    loader = fl.TensorLoader(torch.arange(50), 50, shuffle=True)
    torch.manual_seed(0)
    first = [next(iter(loader)) for _ in range(2)]
    torch.manual_seed(0)
    assert equal(first, [next(iter(loader)) for _ in range(2)])
    assert not torch.equal(*first)


def test_shuffled_batches_are_copies_and_the_tensors_stay_as_they_are() -> None:
    """What a step does to a batch does not reach the data."""
    rows = torch.arange(9.0)
    for item in islice(batches(fl.TensorLoader(rows, 4, shuffle=True), state_at()), 6):
        item.batches[0].zero_()
    assert rows.tolist() == list(range(9))


def test_tensors_are_moved_once() -> None:
    """A device is where all batches come from."""
    loader = fl.TensorLoader(TENSORS, 4, device="meta")
    assert {t.device.type for t in next(iter(loader))} == {"meta"}
    assert attrs.evolve(loader, batch_size=2).device == torch.device("meta")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: fl.TensorLoader([1, 2], 1), TypeError, "but 0 is int: 1"),
        (lambda: fl.TensorLoader({"x": torch.tensor(1.0)}, 1), TypeError, r"but x is a tensor of shape \[\]"),
        (lambda: fl.TensorLoader((torch.ones(3), torch.ones(4)), 1), LoaderError, "{'0': 3, '1': 4}"),
        (lambda: fl.TensorLoader((), 1), LoaderError, "got no tensor"),
        (lambda: fl.TensorLoader(torch.ones(0, 2), 1), LoaderError, "0 samples do not fill a batch"),
        (lambda: fl.TensorLoader(torch.ones(3), 4, drop_last=True), LoaderError, "drop_last is True"),
        (lambda: fl.TensorLoader(torch.ones(3), 0), LoaderError, "at least 1, but got 0"),
        (lambda: list(Source(fl.TensorLoader(torch.ones(3), 2)).epoch(0, 0, start=3)), LoaderError, "has 2 batches per epoch"),
    ],
)
def test_what_is_no_table_of_samples_is_refused(make: Any, error: type[Exception], match: str) -> None:
    """The message names the place in the tree and what to do."""
    with pytest.raises(error, match=match):
        make()
