"""Laws of items and loaders: the endless stream of groups that a run consumes knows its position in the data."""

import gc
import weakref
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    DataLoader,
)

from fnlight.data import Item, Loaders, Source, batches, num_samples
from fnlight.errors import LoaderError
from fnlight.pipe import batches_at
from tests.data.loaders import Noisy, Numbers, Pair, Placed, Stream, state_at


def test_a_hand_made_item_stands_where_the_state_stands() -> None:
    """`Item.of` counts batches from the state's place, sums the samples and never ends an epoch."""
    item = Item.of(torch.zeros(3, 2), (torch.zeros(2), 1), state=state_at(epoch=4, batch=5))
    assert (item.epoch, item.batch, item.last, item.samples, item.seconds, item.position) == (4, 7, False, 5, 0.0, None)


@pytest.mark.parametrize(
    "batch, expected",
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(4), torch.zeros(1)), 4),
        ([torch.zeros(2)], 2),
        ({"x": torch.zeros(5)}, 5),
        ({"name": ["a", "b"], "x": {"y": torch.zeros(6, 1)}}, 6),
        (Pair(torch.zeros(7), 0), 7),
        ({"scale": torch.tensor(1.0), "x": torch.zeros(8)}, 8),
        (pack_sequence([torch.zeros(3), torch.zeros(2)]), 2),
        (nn.Parameter(torch.zeros(9)), 9),
        (torch.tensor(1.0), 1),
        ("text", 1),
        ((), 1),
        ({}, 1),
    ],
)
def test_samples_are_counted_along_the_first_tensor_that_has_a_dimension(batch: Any, expected: int) -> None:
    """The number of samples is the leading dimension of the first tensor leaf that has one, or 1."""
    assert num_samples(batch) == expected


def test_loaders_are_listed_by_use_and_name() -> None:
    """`named` gives a mapping for every use: one name, many names or none."""
    loaders = Loaders(train=[1], val={"easy": [2], "hard": [3]})
    assert loaders.named("train") == {"": [1]}
    assert loaders.named("val") == {"easy": [2], "hard": [3]}
    assert loaders.named("test") == {}


@pytest.mark.parametrize(
    "given, match",
    [
        ({"train": {"train": [1], "val": [2]}}, r"mapping of \['train', 'val'\]; give fl.Loaders\(train=..., val=...\)"),
        ({"train": {"a": [1], "b": [2]}}, r"Loaders\(train=...\) must be an iterable of batches.*mapping of \['a', 'b'\].*fl.zip_longest"),
        ({"val": Numbers(3)}, r"Loaders\(val=...\).*got the dataset Numbers; wrap it: DataLoader\(dataset, batch_size=32\)"),
        ({"val": {"a": Numbers(3)}}, r"Loaders\(val=\{'a': ...\}\).*got the dataset Numbers"),
        ({"train": Stream(3)}, "got the dataset Stream; wrap it.*batch_size=None if it yields whole batches"),
        ({"test": 3}, r"Loaders\(test=...\).*got int$"),
        ({"test": lambda: [1]}, "got function; call it if it returns a loader"),
        ({"predict": torch.zeros(3)}, r"got Tensor; for one batch write \[batch\]"),
        ({"val": {}}, r"Loaders\(val=\{\}\) has no loader"),
        ({"val": {"a/b": [1]}}, "strings without a slash, but got the name 'a/b'"),
        ({"val": {1: [1]}}, "strings without a slash, but got the name 1"),
    ],
)
def test_what_is_no_loader_is_refused_with_what_to_pass_instead(given: dict[str, Any], match: str) -> None:
    """`Loaders` names the field, says what it got and what to write."""
    with pytest.raises(TypeError, match=match):
        Loaders(**given)


def test_an_unregistered_map_style_dataset_is_recognised_as_one() -> None:
    """Something with ``__getitem__`` but no ``__iter__`` is a dataset, not a loader, whatever it derives from."""

    class Rows:
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(TypeError, match=r"a loader must be.*got the dataset Rows"):
        Source(Rows())


def test_groups_follow_the_epoch() -> None:
    """A mapping of first epochs says how many batches an item has; the last item of an epoch may be short."""
    items = batches([torch.zeros(1)] * 3, state_at(), {0: 1, 1: 2, 3: 5})
    found = [(item.epoch, len(item.batches), item.batch, item.last) for item in islice(items, 9)]
    assert found == [(0, 1, 1, False), (0, 1, 2, False), (0, 1, 3, True), (1, 2, 2, False), (1, 1, 3, True), (2, 2, 2, False), (2, 1, 3, True),
                     (3, 3, 3, True), (4, 3, 3, True)]  # fmt: skip


@pytest.mark.parametrize(
    "group, match", [(0, "batches per step must be a whole number >= 1, but got 0"), ({2: 3}, "must start at epoch 0.*add 0: 1")]
)
def test_a_group_that_means_nothing_is_refused(group: Any, match: str) -> None:
    """The group is checked before anything is read."""
    with pytest.raises(LoaderError, match=match):
        batches([torch.zeros(1)], state_at(), group)


def test_group_at_takes_the_newest_entry() -> None:
    """The entry with the greatest first epoch that has begun holds."""
    assert [batches_at({0: 1, 5: 4}, epoch) for epoch in (0, 4, 5, 9)] == [1, 1, 4, 4]


def test_items_carry_samples_and_seconds() -> None:
    """Samples are summed over the group; seconds are those since the item before was handed out, from the given clock."""
    ticks = iter([10.0, 11.0, 13.0, 16.0])
    items = batches([torch.zeros(3), torch.zeros(2), torch.zeros(4)], state_at(), 2, clock=lambda: next(ticks))
    assert [(item.samples, item.seconds) for item in islice(items, 3)] == [(5, 1.0), (4, 2.0), (5, 3.0)]


def test_nothing_is_kept_of_batches_that_were_handed_out() -> None:
    """When a batch is dropped by its consumer it is gone: no generator holds on to it."""
    loaders: list[Any] = [
        DataLoader(Noisy(8), batch_size=2),
        DataLoader(Stream(8), batch_size=2),
        Placed(4),
        Source(DataLoader(Noisy(8), batch_size=2), device=torch.device("meta")),
    ]
    gc.disable()
    try:
        for loader in loaders:
            refs = []
            for item in islice(batches(loader, state_at()), 3):
                assert [ref() for ref in refs[:-1]] == [None] * max(0, len(refs) - 1)
                refs.append(weakref.ref(item.batches[0]))
                del item
            assert refs[0]() is None
    finally:
        gc.enable()


def test_a_list_gives_its_own_batches() -> None:
    """Batches in memory are handed over as they are, uncopied, and in order, in every epoch."""
    given = [torch.zeros(1), torch.zeros(2)]
    found = [item.batches[0] for item in islice(batches(given, state_at()), 4)]
    assert all(one is other for one, other in zip(found, given * 2, strict=True))


def test_a_source_is_taken_as_it_is() -> None:
    """`batches` takes a source with its own options, and adds what it is given besides."""
    source = Source(DataLoader(range(8), batch_size=2, shuffle=True), limit=2)
    assert [item.last for item in islice(batches(source, state_at(), device="cpu"), 2)] == [False, True]
    assert next(batches(source, state_at(), limit=1)).last
    assert next(batches(source, state_at(), shuffle=False)).batches[0].tolist() == [0, 1]
    assert next(batches(source, state_at(), device="meta")).batches[0].device.type == "meta"
