"""Laws of loaders joined into one: each child is keyed by its index, and reading can start at any position in the joint epoch."""

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fnlight.data import Source, batches, concat, zip_longest, zip_shortest
from fnlight.errors import LoaderError, LoaderWarning
from tests.data.loaders import Epochal, Noisy, Numbers, Stream, flat, state_at

JOINS = [zip_shortest, zip_longest, concat]


def plain(batch: Any) -> Any:
    """Tensors of a batch as lists."""
    if isinstance(batch, dict):
        return {name: plain(value) for name, value in batch.items()}
    return [plain(part) for part in batch] if isinstance(batch, tuple) else batch.tolist()


def triples(source: Source, epoch: int = 0, start: int = 0) -> list[Any]:
    """An epoch as lists."""
    return [(plain(batch), samples, last) for batch, samples, last in source.epoch(0, epoch, start)]


def shuffled(n: int, size: int = 2, first: int = 0) -> DataLoader[Any]:
    """A shuffled loader over integers."""
    return DataLoader(range(first, first + n), batch_size=size, shuffle=True)


def test_zip_shortest_ends_with_the_shortest() -> None:
    """A batch is a tuple of the children's batches, samples are summed, and the last is where the shortest ends."""
    source = Source(zip_shortest(shuffled(8), shuffled(5)))
    found = triples(source)
    assert source.num_batches == 3
    assert [(len(batch), samples, last) for batch, samples, last in found] == [(2, 4, False), (2, 4, False), (2, 3, True)]
    assert sorted(flat([batch[1] for batch, _, _ in found])) == list(range(5))


def test_zip_longest_begins_shorter_loaders_again_in_a_new_order() -> None:
    """The shorter child is gone over in full, then again, in another order; the next epoch has others still."""
    source = Source(zip_longest(long=shuffled(24), short=shuffled(8)))
    assert source.num_batches == 12
    turns = []
    for epoch in (0, 1):
        found = triples(source, epoch)
        assert [last for _, _, last in found] == [False] * 11 + [True]
        assert sorted(flat([batch["long"] for batch, _, _ in found])) == list(range(24))
        turns += [flat([batch["short"] for batch, _, _ in found[i : i + 4]]) for i in (0, 4, 8)]
    assert [sorted(turn) for turn in turns] == [list(range(8))] * 6
    assert len({tuple(turn) for turn in turns}) == 6


def test_every_turn_of_a_sampler_that_knows_epochs_has_a_number_of_its_own() -> None:
    """A sampler with ``set_epoch`` is told another epoch in each turn, so that it gives another order."""
    child = DataLoader(range(3), batch_size=3, sampler=Epochal(3))
    found = [batch[1] for batch, _, _ in triples(Source(zip_longest([torch.zeros(1)] * 3, child)), 1)]
    assert found == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_concat_goes_through_one_loader_after_the_other() -> None:
    """All batches of the first, then of the second; only the very last ends the epoch."""
    source = Source(concat(shuffled(3), shuffled(4, first=10)))
    found = triples(source)
    assert source.num_batches == 4
    assert sorted(found[0][0] + found[1][0]) == [0, 1, 2]
    assert sorted(found[2][0] + found[3][0]) == [10, 11, 12, 13]
    assert [(samples, last) for _, samples, last in found] == [(2, False), (1, False), (2, False), (2, True)]


@given(join=st.sampled_from(JOINS), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), group=st.integers(1, 3), data=st.data())
def test_joined_loaders_go_on_from_any_step(join: Any, sizes: list[int], group: int, data: st.DataObject) -> None:
    """The items from a place on are those of the uninterrupted stream, over the end of the epoch."""
    joined = join(*(shuffled(n) for n in sizes))
    length = Source(joined).num_batches
    assert length == {zip_shortest: min, zip_longest: max, concat: sum}[join](-(-n // 2) for n in sizes)
    steps = -(-length // group)
    done = data.draw(st.integers(0, steps - 1))

    def told(item: Any) -> Any:
        return [plain(batch) for batch in item.batches], item.epoch, item.batch, item.last, item.samples

    whole = [told(item) for item in islice(batches(joined, state_at(), group), 2 * steps)]
    assert [told(item) for item in islice(batches(joined, state_at(0, done * group), group), 2 * steps - done)] == whole[done:]
    assert [last for _, _, _, last, _ in whole] == ([False] * (steps - 1) + [True]) * 2


@pytest.mark.parametrize("join", JOINS)
def test_skipping_in_joined_loaders_reads_nothing_of_what_is_skipped(join: Any) -> None:
    """A place in the joint epoch is entered in each child without reading before it."""
    data = [Numbers(12), Numbers(8)]
    source = Source(join(*(DataLoader(each, batch_size=2, shuffle=True) for each in data)))
    whole = triples(source)
    for each in data:
        each.read.clear()
    assert triples(source, start=len(whole) - 1) == whole[-1:]
    assert sum(len(each.read) for each in data) == whole[-1][1]


@pytest.mark.parametrize("join", JOINS)
def test_two_children_of_one_dataset_have_orders_and_random_numbers_of_their_own(join: Any) -> None:
    """The place among the children is folded into the seed."""
    loader = DataLoader(Noisy(8), batch_size=8, shuffle=True)
    found = triples(Source(join(loader, loader)))
    one, other = found[0][0] if join is not concat else [batch for batch, _, _ in found]
    assert [row[0] for row in one] != [row[0] for row in other]
    assert {tuple(row[1:]) for row in one}.isdisjoint(tuple(row[1:]) for row in other)


def test_joins_nest() -> None:
    """A joined loader may be joined again."""
    source = Source(zip_longest(x=concat(shuffled(3), shuffled(4)), y=zip_shortest(shuffled(6), [torch.zeros(1)] * 2)))
    found = triples(source)
    assert source.num_batches == len(found) == 4
    assert triples(source, start=3) == found[3:]
    assert [len(batch["y"]) for batch, _, _ in found] == [2] * 4


def test_children_with_workers_read_the_same() -> None:
    """The number of workers of a child changes nothing, in turns of the shorter one neither."""

    def source(workers: int, persist: bool = False) -> Source:
        child = DataLoader(Noisy(4), batch_size=2, shuffle=True, num_workers=workers, persistent_workers=persist)
        return Source(zip_longest([torch.zeros(1)] * 5, child))

    assert triples(source(0)) == triples(source(1)) == triples(source(1, True))


@pytest.mark.parametrize("join", JOINS)
def test_a_limit_ends_a_joint_epoch(join: Any) -> None:
    """The last batch is flagged where the limit is; a fraction is one of the joint length."""
    source = Source(join(shuffled(8), shuffled(8)), limit=3)
    assert source.num_batches == 3
    assert [last for _, _, last in triples(source)] == [False, False, True]
    assert triples(source, start=2) == triples(source)[2:]
    assert Source(join(shuffled(8), shuffled(8)), limit=0.5).num_batches == (4 if join is concat else 2)
    with pytest.raises(LoaderError, match="is at batch 4 of epoch 0, but this Combined has 3 batches per epoch"):
        triples(source, start=4)


def test_a_stream_ends_a_zip_of_the_shortest() -> None:
    """Loaders without a length are zipped and concatenated; the last is known all the same."""
    stream = DataLoader(Stream(6), batch_size=2)
    found = triples(Source(zip_shortest(shuffled(20), stream)))
    assert [last for _, _, last in found] == [False, False, True]
    assert [last for _, _, last in triples(Source(concat(shuffled(2), stream)))] == [False, False, False, True]
    with pytest.warns(LoaderWarning, match="1 batches of epoch 0 are read and discarded"):
        assert triples(Source(zip_shortest(shuffled(20), stream)), start=1) == found[1:]


def test_zip_longest_needs_lengths() -> None:
    """Without a length nobody knows which is the longest: the message says how to give one."""
    with pytest.raises(LoaderError, match="zip_longest needs the length of its loaders, but loader 1 has none; use zip_shortest"):
        triples(Source(zip_longest(shuffled(4), DataLoader(Stream(4)))))
    source = Source(zip_longest(shuffled(8), Source(DataLoader(Stream(4), batch_size=2), limit=2)))
    assert [batch[1][0][0] for batch, _, _ in triples(source)] == [0.0, 2.0, 0.0, 2.0]


def test_a_child_of_zip_longest_that_is_shorter_than_it_says_is_an_error() -> None:
    """A length that does not hold would misplace every later turn."""
    source = Source(zip_longest([torch.zeros(1)] * 9, Source(DataLoader(Stream(4), batch_size=2), limit=3)))
    with pytest.raises(LoaderError, match="has the length 3, but ended after 2 batches; correct its __len__ or its limit"):
        triples(source)


def test_concat_enters_behind_a_stream_only_where_it_is_last() -> None:
    """A place behind a loader of unknown length cannot be found: the message says how to order them."""
    joined = concat(DataLoader(Stream(4), batch_size=2), shuffled(4))
    assert len(triples(Source(joined))) == 4
    with pytest.raises(
        LoaderError, match="concat cannot resume at batch 1, because its loader 0 has no length; put loaders without a length last"
    ):
        triples(Source(joined), start=1)
    turned = Source(concat(shuffled(4), DataLoader(Stream(4), batch_size=2)))
    with pytest.warns(LoaderWarning, match="1 batches of epoch 0 are read and discarded"):
        assert triples(turned, start=3) == triples(turned)[3:]


def test_an_empty_child_is_refused_by_name() -> None:
    """A child without batches is an error before any work."""
    with pytest.raises(LoaderError, match="this list has no batch"):
        Source(zip_shortest(shuffled(4), []))


@pytest.mark.parametrize(
    "call, match",
    [
        (zip_shortest, "zip_shortest takes loaders.*but got none"),
        (
            lambda: zip_longest([1], b=[2]),
            "zip_longest takes loaders, either all positional or all by name, but got 1 positional and 1 by name",
        ),
        (concat, "concat takes loaders.*but got none"),
        (lambda: Source(concat([1], 3)), "a loader must be an iterable of batches.*but got int"),
        (lambda: Source(zip_shortest(Numbers(3))), "got the dataset Numbers; wrap it"),
    ],
)
def test_what_cannot_be_joined_is_refused(call: Any, match: str) -> None:
    """Joins say what they take."""
    with pytest.raises(TypeError, match=match):
        call()


def test_shuffle_false_reaches_the_children() -> None:
    """Unshuffled, every child comes in its own order, in every turn; also one that came as a source."""
    source = Source(zip_longest(shuffled(8), Source(shuffled(4))), shuffle=False)
    assert [batch for batch, _, _ in triples(source, 1)] == [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[4, 5], [0, 1]], [[6, 7], [2, 3]]]
