"""Laws of `fnlight.metrics`: monoids that merge exactly, and a tally that may be read at any time."""

import copy
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.errors import MemoryWarning, StepError
from fnlight.metrics import Cat, Figure, Histogram, Image, Last, Max, Mean, Min, Sum, Tally, Text

NUMBERS = st.integers(-(2**20), 2**20).map(float)  # sums of these are exact, in whatever order they are taken
WEIGHTS = st.integers(0, 1000)
TENSORS = NUMBERS.map(lambda value: torch.tensor(value, dtype=torch.float64))
ONE: dict[str, st.SearchStrategy[Any]] = {
    "Mean": st.builds(Mean, st.one_of(NUMBERS, TENSORS), WEIGHTS),
    "Sum": st.builds(Sum, st.one_of(NUMBERS, TENSORS)),
    "Max": st.builds(Max, st.one_of(NUMBERS, TENSORS, st.just(math.nan))),
    "Min": st.builds(Min, st.one_of(NUMBERS, TENSORS, st.just(math.nan))),
    "Last": st.builds(Last, st.one_of(NUMBERS, TENSORS, st.none())),
    "Cat": st.builds(Cat, st.lists(NUMBERS, max_size=3).map(torch.tensor)),
}
KINDS = {"Mean": Mean, "Sum": Sum, "Max": Max, "Min": Min, "Last": Last, "Cat": Cat}


def value(monoid: Any) -> Any:
    """What a monoid comes to, in a form that compares, NaN included."""
    found = monoid.compute()
    if isinstance(found, torch.Tensor) and found.dim():
        return found.tolist()
    return "nan" if found is not None and found != found else found if found is None else float(found)


@pytest.mark.parametrize("name", ONE)
@given(st.data())
def test_merging_is_associative(name: str, data: st.DataObject) -> None:
    """It does not matter which neighbours are merged first."""
    a, b, c = (data.draw(ONE[name]) for _ in range(3))
    assert value(a.merge(b).merge(c)) == value(a.merge(b.merge(c)))


@pytest.mark.parametrize("name", ONE)
@given(st.data())
def test_the_empty_value_is_neutral_on_both_sides(name: str, data: st.DataObject) -> None:
    """Merging `empty` before or behind changes nothing."""
    one, empty = data.draw(ONE[name]), KINDS[name].empty()
    assert value(empty.merge(one)) == value(one) == value(one.merge(empty))


@pytest.mark.parametrize("name", ["Mean", "Sum", "Max", "Min"])
@given(st.data())
def test_merging_is_commutative_where_order_means_nothing(name: str, data: st.DataObject) -> None:
    """Ranks and micro-batches may come in any order."""
    a, b = data.draw(ONE[name]), data.draw(ONE[name])
    assert value(a.merge(b)) == value(b.merge(a))


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=7), min_size=1, max_size=7))
def test_a_mean_over_uneven_parts_is_the_mean_of_all(parts: list[list[float]]) -> None:
    """Summed and weighted parts give the mean of all samples, which the mean of their means does not."""
    merged = reduce(lambda a, b: a.merge(b), [Mean(sum(part), len(part)) for part in parts])
    every = [x for part in parts for x in part]
    assert merged.compute() == sum(every) / len(every)


def test_nothing_counted_is_nan() -> None:
    """What nothing was merged into has no value, and says so without an exception."""
    assert all(math.isnan(float(kind.empty())) for kind in (Mean, Last, Cat))
    assert (Sum.empty().compute(), Max.empty().compute(), Min.empty().compute()) == (0, -math.inf, math.inf)


@pytest.mark.parametrize("kind", [Max, Min])
@pytest.mark.parametrize("cast", [float, torch.tensor])
def test_nan_wins_over_any_number(kind: Any, cast: Callable[[float], Any]) -> None:
    """A NaN among the parts is seen in the whole, whichever side it comes from."""
    nan, one = kind(cast(math.nan)), kind(cast(1.0))
    assert math.isnan(float(nan.merge(one)))
    assert math.isnan(float(one.merge(nan)))


def test_monoids_are_floats() -> None:
    """float() gives the value of a monoid, of tensors too."""
    assert [float(Mean(torch.tensor(6.0), torch.tensor(4))), float(Sum(2)), float(Max(3)), float(Min(torch.tensor(4))), float(Last(5))] == [
        1.5,
        2.0,
        3.0,
        4.0,
        5.0,
    ]


def test_cat_gives_its_function_all_samples_in_order() -> None:
    """The function sees tensors as they would be, had all come in one batch, several columns in step."""

    def accuracy(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        assert predicted.tolist() == [1, 0, 2]
        return (predicted == wanted).float().mean()

    parts = [Cat((torch.tensor([1, 0]), torch.tensor([1, 1])), accuracy), Cat((torch.tensor([2]), torch.tensor([2])), accuracy)]
    assert float(parts[0].merge(parts[1])) == pytest.approx(2 / 3)


def test_cat_without_a_function_gives_the_samples() -> None:
    """One column comes as a tensor, several as a tuple."""
    one = Cat(torch.tensor([1.0])).merge(Cat(torch.tensor([2.0, 3.0])))
    two = Cat((torch.ones(1), torch.zeros(1))).merge(Cat((torch.ones(2), torch.zeros(2))))
    assert one.compute().tolist() == [1.0, 2.0, 3.0]
    assert [column.tolist() for column in two.compute()] == [[1.0] * 3, [0.0] * 3]


ROWS = st.fixed_dictionaries(
    {
        "loss": st.one_of(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3, width=32).map(torch.tensor)),
        "acc": st.builds(Mean, st.floats(0, 50).map(lambda v: torch.tensor(v, dtype=torch.float64)), st.integers(0, 64)),
        "tokens": st.builds(Sum, st.integers(0, 2**40)),
        "peak": st.builds(Max, st.one_of(st.floats(-10, 10), st.just(-math.inf))),
        "low": st.builds(Min, st.floats(-10, 10, width=32).map(torch.tensor)),
        "note": st.builds(Last, st.one_of(st.floats(-10, 10), st.none())),
    }
)


def same(found: dict[str, Any]) -> dict[str, Any]:
    """A mapping that compares, NaN included."""
    return {name: "nan" if v != v else v for name, v in found.items()}


@given(st.lists(ROWS, min_size=1, max_size=12), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_a_tally_does_not_depend_on_when_it_is_read(rows: list[dict[str, Any]], reads: set[int], stacks: set[int]) -> None:
    """Read, settled or copied in between as often as one likes, the totals are bitwise those of one read at the end."""
    late, often = Tally(), Tally()
    for i, row in enumerate(rows):
        late.add(i, row)
        often.add(i, row)
        if i in stacks:
            often = copy.deepcopy(often)
        if i in reads:
            often.read()
    assert same(often.read()) == same(late.read())
    assert (often.totals, often.bad) == (late.totals, late.bad)


@given(st.lists(ROWS, min_size=1, max_size=12))
def test_a_tally_equals_the_merge_of_its_monoids(rows: list[dict[str, Any]]) -> None:
    """The totals are what merging the monoids one after the other gives, in float64."""
    tally = Tally()
    for i, row in enumerate(rows):
        tally.add(i, row)
    merged = {"loss": reduce(lambda a, b: a.merge(b), [Mean(float(row["loss"]), 1) for row in rows])}
    merged["acc"] = reduce(lambda a, b: a.merge(b), [Mean(float(row["acc"].total), row["acc"].weight) for row in rows])
    for name in ("tokens", "peak", "low", "note"):
        merged[name] = reduce(lambda a, b: a.merge(b), [row[name] for row in rows])
    assert same(tally.read()) == same({name: float(monoid) for name, monoid in merged.items()})
    assert list(tally.read()) == list(rows[0])


def test_a_long_tally_stacks_without_changing_what_it_reads() -> None:
    """Past the number of steps that are kept apart, sums and the first bad step stay exact."""
    short, long = Tally(), Tally()
    values = [1.0 / (i + 1) for i in range(1000)]
    values[700] = math.inf
    for i, v in enumerate(values):
        long.add(i, {"loss": torch.tensor(v, dtype=torch.float64), "n": Sum(1)})
        short.add(i, {"loss": torch.tensor(v, dtype=torch.float64), "n": Sum(1)})
        short.settle()
    assert long.totals == {}
    assert long.read() == short.read() == {"loss": math.inf, "n": 1000.0}
    assert long.bad == short.bad == (700, "loss")


def test_large_integers_and_double_precision_are_not_rounded() -> None:
    """What is mixed of numbers and tensors of several types is added as it is."""
    tally = Tally()
    for i, v in enumerate([2**24 + 1, torch.tensor(2**24 + 1), torch.tensor(0.5), 0.1]):
        tally.add(i, {"n": Sum(v)})
    assert tally.totals == {}
    assert tally.read() == {"n": 2**24 + 1 + 2**24 + 1 + 0.5 + 0.1}


def test_gradients_do_not_hang_on_metrics() -> None:
    """A tensor with a graph is counted like any other."""
    tally = Tally()
    tally.add(1, {"loss": torch.tensor(2.0, requires_grad=True) * 2})
    assert tally.read() == {"loss": 4.0}


def test_the_first_bad_step_is_found_whichever_metric_it_is_in() -> None:
    """The earliest step counts, and within it the order of the names."""
    tally = Tally()
    for step in range(1, 6):
        tally.add(step, {"loss": math.nan if step == 4 else 1.0, "aux": torch.tensor(math.inf if step >= 3 else 0.0)})
    tally.settle()
    assert tally.bad == (3, "aux")


def test_what_nothing_comes_to_is_no_bad_number() -> None:
    """Steps with nothing to count may give the neutral element, also where that is infinite or None."""
    tally = Tally()
    tally.add(1, {"mean": Mean(0.0, 0), "max": Max.empty(), "min": Min.empty(), "last": Last.empty()})
    assert same(tally.read()) == {"mean": "nan", "max": -math.inf, "min": math.inf, "last": "nan"}
    tally.add(2, {"mean": Mean(3.0, 2), "max": Max(1.0), "min": Min(2.0), "last": Last(3.0)})
    assert tally.read() == {"mean": 1.5, "max": 1.0, "min": 2.0, "last": 3.0}
    assert tally.bad is None


def test_names_that_change_are_refused() -> None:
    """A later step with other names is named, with what is missing, what is new and what to do."""
    tally = Tally()
    tally.add(1, {"loss": 1.0, "acc": 0.5})
    message = (
        r"step 2: .* same names at every step, \['acc', 'loss'\]; missing now: \['acc'\], new: \['top5'\]. Give every .* Mean\(0.0, 0\)"
    )
    with pytest.raises(StepError, match=message):
        tally.add(2, {"loss": 1.0, "top5": 0.5})


def test_kinds_that_change_are_refused() -> None:
    """A name that is a mean at one step and a sum at another has no meaning, also across reads."""
    tally = Tally()
    tally.add(1, {"n": Sum(1)})
    tally.add(2, {"n": 1.0})
    with pytest.raises(StepError, match="metric 'n' must be of one kind at every step, but came as Sum and as float"):
        tally.read()
    tally = Tally()
    tally.add(1, {"n": Sum(1)})
    tally.settle()
    tally.add(2, {"n": Max(1)})
    with pytest.raises(StepError, match="metric 'n' must be of one kind at every step, but came as Max and as Sum"):
        tally.read()


@pytest.mark.parametrize(
    "metric, message",
    [
        (torch.ones(3), r"metric 'x' must be one number, but has shape \[3\]; reduce it, or use Mean, Cat or Histogram"),
        ("high", "metric 'x' must be a number, a scalar tensor, or a value such as Mean or Image, but got 'high'"),
        (None, "metric 'x' must be a number, .* but got None"),
        ([1.0], r"metric 'x' must be a number, .* but got \[1.0\]"),
    ],
)
def test_what_is_no_metric_is_refused(metric: Any, message: str) -> None:
    """A value that cannot come to a number is refused when it comes, not when somebody reads."""
    with pytest.raises(StepError, match=message):
        Tally().add(1, {"x": metric})


def test_a_cat_must_come_to_one_number() -> None:
    """Concatenated samples without a function that reduces them are no metric of a history."""
    tally = Tally()
    tally.add(1, {"x": Cat(torch.ones(3))})
    with pytest.raises(
        StepError, match=r"metric 'x' must come to one number, but Cat.compute\(\) gave Tensor\[3\]; pass Cat\(values, fn\)"
    ):
        tally.read()


def test_objects_are_merged_and_read_in_their_place() -> None:
    """Cat and monoids of the user are merged over all steps, also past a read, in the order of the names."""

    class Longest:
        def __init__(self, text: str) -> None:
            self.text = text

        def merge(self, other: "Longest") -> "Longest":
            return max(self, other, key=lambda one: len(one.text))

        def compute(self) -> int:
            return len(self.text)

    tally = Tally()
    for i, text in enumerate(["ab", "abcd", "a"], start=1):
        tally.add(i, {"spread": Cat(torch.tensor([float(i)]), lambda x: x.max() - x.min()), "loss": 1.0, "longest": Longest(text)})
        tally.settle()
    assert tally.read() == {"spread": 2.0, "loss": 1.0, "longest": 4.0}
    assert list(tally.read()) == ["spread", "loss", "longest"]
    assert copy.deepcopy(tally).read() == tally.read()


def test_of_media_the_last_counts() -> None:
    """Pictures, histograms, figures and texts are not merged: the last one is read, next to the numbers."""
    tally, last = Tally(), Text("two")
    for text in (Text("one"), last):
        tally.add(
            1, {"loss": 1.0, "note": text, "picture": Image(torch.zeros(2, 2)), "values": Histogram(torch.ones(2)), "plot": Figure(None)}
        )
    found = tally.read()
    assert found["note"] is last
    assert [type(v) for v in found.values()] == [float, Text, Image, Histogram, Figure]


def test_clearing_starts_afresh_and_keeps_the_names() -> None:
    """After `clear` nothing is left of the values, and other names are still refused."""
    tally = Tally()
    assert tally.is_empty()
    tally.add(1, {"loss": math.nan, "note": Text("one")})
    assert not tally.is_empty()
    tally.settle()
    tally.clear()
    assert (tally.is_empty(), tally.bad) == (True, None)
    tally.add(2, {"loss": 2.0, "note": Text("two")})
    assert tally.read()["loss"] == 2.0
    with pytest.raises(StepError, match="missing now"):
        tally.add(3, {"loss": 1.0})


def test_a_copy_is_independent() -> None:
    """What is added to a copy is not in the original, nor the other way round."""
    tally = Tally()
    tally.add(1, {"loss": 1.0, "all": Cat(torch.ones(1), torch.sum)})
    twin = copy.deepcopy(tally)
    twin.add(2, {"loss": 3.0, "all": Cat(torch.ones(1), torch.sum)})
    assert tally.read() == {"loss": 1.0, "all": 1.0}
    assert twin.read() == {"loss": 2.0, "all": 2.0}


def test_a_tally_from_a_file_goes_on() -> None:
    """Totals that were saved go on exactly; pictures are not saved, and may come anew; other numbers are said."""
    tally = Tally({"loss": ["Mean", 3.0, 2]}, None)
    tally.add(7, {"loss": 3.0, "picture": Image(torch.zeros(2, 2))})
    assert tally.read()["loss"] == 2.0
    other = Tally({"loss": ["Mean", 3.0, 2], "old": ["Last", 1.0]}, None)
    with pytest.warns(MemoryWarning, match=r"step 8: the metrics \['acc'\] are new since .*, \['old'\] are given no more"):
        other.add(8, {"loss": 3.0, "acc": 1.0})
    assert other.read() == {"loss": 2.0, "acc": 1.0}
    with pytest.raises(StepError, match=r"step 9: .*missing now: \['acc'\]"):
        other.add(9, {"loss": 3.0})
