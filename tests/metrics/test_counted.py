"""Metrics of a step that does not count change nothing that is measured."""

import pytest
import torch

from fnlight.metrics import Cat, Last, Max, Mean, Min, Sum, Tally, Text, counted_where, uncounted


def test_uncounted_metrics_change_no_mean_sum_or_extreme():
    """A tally that is given them reads what it read before, with the same names."""
    metrics = {"a": torch.tensor(2.0), "b": Mean(torch.tensor(6.0), 2), "c": Sum(3), "d": Max(1.0), "e": Min(1.0), "f": Last(5.0), "g": 4.0}
    alone, both = Tally(), Tally()
    for tally in (alone, both):
        tally.add(1, metrics)
    both.add(1, uncounted({**metrics, "a": torch.tensor(torch.nan)}))
    assert both.read() == alone.read()
    text = Text("x")
    assert uncounted({"note": text, "all": Cat(torch.ones(2))})["note"] is text


@pytest.mark.parametrize("finite", [True, False])
def test_metrics_count_only_where_the_device_says_so(finite):
    """A tally of a step before and of this one reads both where it counts, and the step before alone where it does not."""
    before = {
        "plain": torch.tensor(2.0),
        "mean": Mean(torch.tensor(6.0), 2),
        "sum": Sum(3),
        "max": Max(1.0),
        "min": Min(1.0),
        "number": 4.0,
    }
    now = {
        "plain": torch.tensor(torch.nan),
        "mean": Mean(torch.tensor(2.0), 2),
        "sum": Sum(4),
        "max": Max(9.0),
        "min": Min(-9.0),
        "number": 6.0,
    }
    now["plain"] = torch.tensor(4.0) if finite else now["plain"]
    tally = Tally()
    tally.add(1, before)
    tally.add(1, counted_where(now, torch.tensor(finite)))
    both = {"plain": 3.0, "mean": 2.0, "sum": 7.0, "max": 9.0, "min": -9.0, "number": 5.0}
    alone = {"plain": 2.0, "mean": 3.0, "sum": 3.0, "max": 1.0, "min": 1.0, "number": 4.0}
    assert tally.read() == (both if finite else alone)
