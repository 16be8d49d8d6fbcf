"""Laws of `fnlight.state.history`: append-only, and printed as a table."""

from fnlight.state import History, Record


def test_history_is_append_only_and_joins_what_falls_on_one_step() -> None:
    """Adding gives a new history; records of one step become one, and the later value of a name wins."""
    first = History().add(Record(1, 0, {"val/loss": 2.0}))
    both = first.add(Record(1, 1, {"train/loss": 3.0, "val/loss": 1.0}))
    third = both.add(Record(2, 1, {"val/loss": 0.5}))
    assert (len(first), len(both), len(third)) == (1, 1, 2)
    assert first[0].metrics == {"val/loss": 2.0}
    assert both[0] == Record(1, 1, {"val/loss": 1.0, "train/loss": 3.0})
    assert isinstance(third[-1:], History)
    assert third[-1].step == 2


def test_history_prints_as_a_table() -> None:
    """One line a record, one column a name, in the order in which names came up; holes stay empty."""
    history = History().add(Record(5, 0, {"val/loss": 0.123456})).add(Record(100, 1, {"val/loss": 2.0, "val/acc": 1e-7}))
    assert str(history).splitlines() == [
        "step  epoch  val/loss  val/acc",
        "   5      0    0.1235         ",
        " 100      1         2    1e-07",
    ]
    assert str(History()) == "step  epoch"
