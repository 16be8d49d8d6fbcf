"""Laws of sources: streams, lists and loaders that keep their own position are read as a function of (seed, epoch) too, as far as they can be."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    DataLoader,
    Sampler,
)

from fnlight.data import Source, batches
from fnlight.errors import LoaderError, LoaderWarning
from fnlight.state import Progress, TrainState
from tests.data.loaders import Numbers, Pair, Placed, SizedStream, Stream, flags, read, state_at


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Stream(7), batch_size=2), lambda: DataLoader(SizedStream(7), batch_size=2), lambda: Placed(4, sized=False)]
)
def test_the_last_batch_of_an_unsized_epoch_is_known(make: Any) -> None:
    """One batch is read ahead, so the last is flagged whether there is a length or not."""
    assert [last for _, last in flags(Source(make()))] == [False] * 3 + [True]


def test_a_length_that_lies_does_not_decide_which_batch_is_the_last() -> None:
    """The length of something that is iterated is an estimate."""

    class Liar:
        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[Any]:
            return iter([torch.zeros(1), torch.zeros(2)])

    assert Source(Liar()).num_batches == 10
    assert flags(Source(Liar())) == [(1, False), (2, True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_draw_keyed_numbers(workers: int) -> None:
    """What a stream draws is a function of (seed, epoch), in this process or in workers, that persist or not."""
    found = [read(DataLoader(Stream(8), batch_size=2, num_workers=workers), epoch) for epoch in (0, 1)]
    torch.manual_seed(5)
    assert [read(DataLoader(Stream(8), batch_size=2, num_workers=workers), epoch) for epoch in (0, 1)] == found
    assert found[0] != found[1]
    if workers:
        source = Source(DataLoader(Stream(8), batch_size=2, num_workers=workers, persistent_workers=True))
        assert [read(source, epoch) for epoch in (0, 1)] == found


def test_a_stream_is_skipped_by_reading_with_a_warning_that_says_so() -> None:
    """Going on within an epoch of a stream costs its batches; the rest is what it would have been, with its random numbers."""
    loader = DataLoader(Stream(10), batch_size=2)
    with pytest.warns(
        LoaderWarning,
        match="3 batches of epoch 1 are read and discarded.*because a DataLoader can be read only from its start; a map-style",
    ):
        rest = read(loader, 1, start=3)
    assert rest == read(loader, 1)[3:]


def test_a_stream_in_this_process_draws_by_the_batch_not_by_what_came_between() -> None:
    """Random numbers drawn by the consumer between two batches do not change the next one."""
    plain = read(DataLoader(Stream(6), batch_size=2))
    found = []
    for batch, _, _ in Source(DataLoader(Stream(6), batch_size=2)).epoch(0, 0):
        torch.rand(17)
        found.append(batch.tolist())
    assert found == plain


class Reversed(DataLoader[Any]):
    """A loader with an iteration of its own."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class Sized(DataLoader[Any]):
    """A loader that only adds to torch's."""

    def hello(self) -> str:
        return "hello"


def test_a_loader_that_iterates_in_its_own_way_is_iterated() -> None:
    """A subclass with its own ``__iter__`` is not replaced by ours; one without is read in keyed order."""
    assert read(Reversed(range(4), batch_size=2)) == [[2, 3], [0, 1]]
    assert read(Reversed(range(9), shuffle=True), 1) == read(Reversed(range(9), shuffle=True), 1)
    data = Numbers(8)
    read(Sized(data, batch_size=2, shuffle=True), start=3)
    assert len(data.read) == 2


def test_a_used_up_iterator_is_told_from_an_empty_loader() -> None:
    """The second epoch of an iterator says that it is one, and what to pass instead."""
    items = batches(iter([torch.zeros(1), torch.zeros(2)]), state_at())
    assert [next(items).last for _ in range(2)] == [False, True]
    with pytest.raises(
        LoaderError, match=r"the list_iterator yielded no batch in epoch 1: it is an iterator.*such as a DataLoader or a list"
    ):
        next(items)


def test_an_empty_loader_is_refused_before_any_work_where_that_can_be_known() -> None:
    """A length of 0 is an error at construction, with its reason; a stream is found empty when it is read."""
    with pytest.raises(LoaderError, match="this list has no batch"):
        batches([], state_at())
    with pytest.raises(LoaderError, match="its 3 samples do not fill a batch of batch_size=4, and drop_last is True"):
        Source(DataLoader(range(3), batch_size=4, drop_last=True))
    with pytest.raises(LoaderError, match="its dataset Numbers has 0 samples; check how the data is read"):
        Source(DataLoader(Numbers(0), batch_size=4))
    with pytest.raises(LoaderError, match="the DataLoader yielded no batch in epoch 2; expected at least one"):
        read(DataLoader(Stream(0)), 2)
    with pytest.raises(LoaderError, match="the DataLoader yielded no batch in epoch 0"):
        read(DataLoader(range(3), batch_sampler=Unsized()))


class Unsized(Sampler[list[int]]):
    """A batch sampler that gives nothing and does not say so."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        return iter(())


def test_a_limit_ends_epochs_early() -> None:
    """An int is a number of batches, a float a fraction; the last batch is flagged where the limit ends the epoch."""
    loader = DataLoader(range(20), batch_size=2, shuffle=True)
    whole = read(loader)
    for limit, n in ((3, 3), (0.5, 5), (1.0, 10), (1, 1), (99, 10)):
        source = Source(loader, limit=limit)
        assert source.num_batches == n
        assert read(source) == whole[:n]
        assert [last for _, last in flags(source)] == [False] * (n - 1) + [True]


@pytest.mark.parametrize(
    "make", [lambda: [torch.zeros(1)] * 4, lambda: DataLoader(Stream(4)), lambda: Placed(4), lambda: Placed(4, sized=False)]
)
def test_every_kind_of_loader_obeys_a_limit(make: Any) -> None:
    """Lists, streams and loaders that keep their place end where the limit says, and nothing more is read."""
    loader = make()
    source = Source(loader, limit=2)
    assert source.num_batches == 2
    assert [last for _, last in flags(source)] == [False, True]
    assert not isinstance(loader, Placed) or loader.fetched == [0, 1]


@pytest.mark.parametrize(
    "limit, match",
    [
        (0, "limit must be a number of batches >= 1 .int. or a fraction above 0 and up to 1 .float., but got 0"),
        (-1, "but got -1"),
        (1.5, "but got 1.5"),
        (0.0, "but got 0.0"),
        (float("nan"), "but got nan"),
        (True, "but got True"),
        ("all", "but got 'all'"),
        (0.1, "limit=0.1 of 5 batches leaves none; give at least 0.2"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(limit: Any, match: str) -> None:
    """Limits are checked before any work."""
    with pytest.raises(LoaderError, match=match):
        Source([torch.zeros(1)] * 5, limit=limit)


def test_a_fraction_of_something_without_a_length_is_refused() -> None:
    """A fraction needs a length to be taken of."""
    with pytest.raises(LoaderError, match=r"limit=0.5 is a fraction, but this DataLoader has no length; give a number of batches"):
        Source(DataLoader(Stream(3)), limit=0.5)


@attrs.frozen
class Row:
    """A batch as an attrs object."""

    x: Any
    name: str


class Movable:
    """An object that moves itself."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def to(self, device: Any) -> "Movable":
        return Movable(device)


def test_nested_batches_of_every_kind_are_moved_and_keep_their_kind() -> None:
    """Tensors in dicts, lists, tuples, namedtuples and attrs objects are moved, and so is what has a ``to`` of its own."""
    meta = torch.device("meta")
    x = torch.zeros(2)
    batch = {"a": [x, (x, 1)], "b": Pair(x, "y"), "c": Row(x, "n"), "d": OrderedDict(e=x), "p": pack_sequence([x]), "m": Movable()}
    ((moved, samples, last),) = Source([batch], device=meta).epoch(0, 0)
    tensors = [moved["a"][0], moved["a"][1][0], moved["b"].x, moved["c"].x, moved["d"]["e"], moved["p"].data, moved["m"]]
    assert [t.device for t in tensors] == [meta] * 7
    kinds = [type(moved[name]) for name in "abcdpm"]
    assert kinds == [list, Pair, Row, OrderedDict, PackedSequence, Movable]
    assert (moved["a"][1][1], moved["b"].y, moved["c"].name, samples, last) == (1, "y", "n", 2, True)
    assert x.device.type == "cpu"


def test_what_moves_itself_is_moved_within_any_container() -> None:
    """Objects with a ``to``, and packed sequences, within namedtuples, attrs objects and mappings."""
    meta, x = torch.device("meta"), torch.zeros(2)
    batch = Pair(pack_sequence([x]), Row(Movable(), OrderedDict(m=Movable())))
    ((moved, _, _),) = Source([batch], device=meta).epoch(0, 0)
    assert [moved.x.data.device, moved.y.x.device, moved.y.name["m"].device] == [meta] * 3


def test_tensors_that_cannot_be_moved_are_said() -> None:
    """An object without a ``to`` keeps its tensors where they are, with a warning."""
    with pytest.warns(LoaderWarning, match="a batch holds a SimpleNamespace with tensors that are not moved to meta.*def to"):
        list(Source([{"x": SimpleNamespace(y=torch.zeros(1))}], device=torch.device("meta")).epoch(0, 0))


def test_the_samples_of_a_batch_can_be_said() -> None:
    """A list of pictures has as many samples as pictures, not as channels; what is no number is refused."""
    pictures = [[torch.zeros(3, 4, 4)] * 5]
    assert flags(Source(pictures)) == [(3, True)]
    assert flags(Source(pictures, samples=len)) == [(5, True)]
    with pytest.raises(LoaderError, match=r"Source.samples=fn. must give the number of samples in a batch, a whole number, but gave None"):
        flags(Source(pictures, samples=lambda batch: None))


def test_nothing_is_done_to_batches_on_the_cpu() -> None:
    """For the CPU the very objects are handed over."""
    batch = {"x": torch.zeros(1)}
    assert next(batches([batch], state_at(), device="cpu")).batches[0] is batch


def run_of(loader: Any, state: TrainState, n: int) -> tuple[list[Any], TrainState]:
    """Batches of n items, and the state behind them as `apply` makes it."""
    found = []
    for item in islice(batches(loader, state), n):
        found.append(item.batches[0].tolist())
        state.store.step.position = item.position
        state = attrs.evolve(state, progress=Progress(0, item.epoch + item.last, 0 if item.last else item.batch))
    state.store.settle()
    return found, state


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("done", range(1, 9))
def test_a_loader_that_keeps_its_place_is_put_there(done: int, limit: int | None, sized: bool) -> None:
    """Its own state goes into the state and back, at every step, so that nothing is read twice; random numbers go on as well."""
    whole, _ = run_of(Source(Placed(4, sized), limit=limit), state_at(), 12)
    first, state = run_of(Source(Placed(4, sized), limit=limit), state_at(), done)
    resumed = Placed(4, sized)
    rest, _ = run_of(Source(resumed, limit=limit), state, 12 - done)
    assert first + rest == whole
    epoch = [row[0] for row in whole]
    assert resumed.fetched[: 12 - done] == epoch[done:]


def test_a_sized_loader_that_keeps_its_place_is_not_read_ahead() -> None:
    """Its length is believed, so that it never stands further than the state."""
    loader = Placed(3)
    items = batches(loader, state_at())
    for n, item in enumerate(islice(items, 3), 1):
        assert item.position is not None
        place = item.position()
        assert {name: place[name] for name in ("epoch", "batch", "loader")} == {"epoch": int(n == 3), "batch": n % 3, "loader": {"at": n}}
        assert len(loader.fetched) == n


def test_a_place_that_belongs_to_another_progress_is_not_used() -> None:
    """A stale place in the memory is passed over: the loader is read up to where the state stands, with a warning."""
    state = state_at(0, 2)
    state.store.memory["loader"] = {"epoch": 0, "batch": 1, "loader": {"at": 1}}
    with pytest.warns(LoaderWarning, match="2 batches of epoch 0 are read and discarded"):
        assert next(batches(Placed(4), state)).batches[0].tolist()[0] == 2


def test_a_loader_whose_length_is_too_great_says_so() -> None:
    """A length that is believed and not kept is an error that names both numbers."""
    loader = Placed(3)
    source = Source(loader)
    found = source.epoch(0, 0)
    next(found)
    loader.n = 2
    with pytest.raises(LoaderError, match=r"the length of this PlacedAndSized is \d+, but epoch 0 ended after 2 batches"):
        list(found)


def test_a_map_style_loader_has_no_place_of_its_own() -> None:
    """In the middle of an epoch a state keeps what the data is; between two epochs there is nothing to keep."""
    kept = [item.position() for item in islice(batches(DataLoader(range(2)), state_at()), 2)]
    assert kept[0]["data"] | {"digest": ""} == {"samples": 2, "order": "in order", "digest": ""}
    assert kept[1] == {"epoch": 1, "batch": 0}


def test_orders_of_neighbouring_epochs_differ_everywhere() -> None:
    """No epoch repeats the order of the one before."""
    source = Source(DataLoader(range(30), batch_size=30, shuffle=True))
    orders = [read(source, epoch)[0] for epoch in range(6)]
    assert all(one != other for one, other in pairwise(orders))
