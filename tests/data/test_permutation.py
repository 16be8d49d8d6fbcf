"""An order of any number of samples is a permutation of them, a function of its key, and any slice of it is computed directly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fnlight.data import Source, TensorLoader
from fnlight.data.order import Span
from fnlight.data.permutation import Permutation, permutation
from fnlight.tensors import ORDER, fold_in

keys = st.integers(0, 2**64 - 1)
counts = st.integers(1, 3000)


@given(keys, counts)
def test_every_sample_comes_once(key: int, count: int) -> None:
    """Whatever the number of samples: none is lost, none comes twice."""
    assert torch.equal(Permutation.of(key, count)[:].sort().values, torch.arange(count))


@given(keys, counts, st.data())
def test_a_part_is_what_it_is_in_the_whole(key: int, count: int, data: st.DataObject) -> None:
    """Where one begins to look, and how far, makes no difference."""
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(Permutation.of(key, count)[start:stop], Permutation.of(key, count)[:][start:stop])


def test_keys_have_orders_that_have_nothing_in_common() -> None:
    """Two orders of n samples agree, on average, in one place."""
    orders = torch.stack([Permutation.of(fold_in(0, i), 1000)[:] for i in range(60)])
    same = (orders[:, None] == orders[None]).sum(-1).float()
    agreed = same[torch.ones(60, 60).triu(1).bool()]
    assert abs(agreed.mean() - 1) < 5 / math.sqrt(len(agreed))


def test_every_sample_is_as_likely_anywhere() -> None:
    """Chi-square of which of 37 samples comes at a place, and of how far the next one is from it, over 4,000 keys."""
    orders = torch.stack([Permutation.of(fold_in(1, i), 37)[:] for i in range(4000)])
    for place in (0, 1, 20, 36):
        steps = (orders[:, (place + 1) % 37] - orders[:, place]) % 37 - 1
        for values, kinds in ((orders[:, place], 37), (steps, 36)):
            seen, expected = torch.bincount(values, minlength=kinds).double(), 4000 / kinds
            chi = float(((seen - expected) ** 2 / expected).sum())
            assert len(seen) == kinds
            assert abs(chi - (kinds - 1)) < 5 * math.sqrt(2 * (kinds - 1))


def test_neighbours_of_many_samples_have_nothing_to_do_with_each_other() -> None:
    """In an order of a hundred million, numbers that follow each other are no more alike than random ones; nor are those of two places."""
    part = Permutation.of(3, 10**8)[70_000_000:70_200_000].double() / 10**8
    for lag in (1, 2, 10_000):
        assert abs(torch.corrcoef(torch.stack([part[:-lag], part[lag:]]))[0, 1]) < 5 / math.sqrt(len(part))
    assert abs(part.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(part))
    ups = float((part[1:] > part[:-1]).double().mean())
    assert abs(ups - 0.5) < 5 * math.sqrt(1 / 12 / len(part))


def test_a_large_order_holds_little() -> None:
    """Of a hundred million samples some tens of thousands of numbers are kept, and both kinds of order are read alike."""
    order = permutation(7, 10**8)
    assert isinstance(order, Permutation)
    assert sum(move.numel() for move in order.moves) < 100_000
    assert len(order) == 10**8
    assert isinstance(permutation(7, 2**20), torch.Tensor)


@pytest.mark.parametrize("start", [0, 400_000])
def test_loaders_of_many_samples_read_them_in_the_same_order(start: int) -> None:
    """A `DataLoader` and a `TensorLoader` of more samples than are shuffled at once give the same batches, from any batch on."""
    count, found = 2**20 + 9, []
    for loader in (DataLoader(range(count), batch_size=2, shuffle=True), TensorLoader(torch.arange(count), batch_size=2, shuffle=True)):
        batches = Source(loader).epoch(0, 0, start)
        found.append(torch.cat([next(batches)[0] for _ in range(3)]))
    order = permutation(Span(seed=0, epoch=0, stream=ORDER).order_key, count)[2 * start : 2 * start + 6]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], order)
