"""Stop rules are pure functions of a state, and say why."""

import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fnlight as fl
from fnlight.errors import ConfigError, MonitorError, StepError
from fnlight.state import History, Progress, Record
from fnlight.triggers import diverged, max_epochs, max_steps, max_time, min_epochs, min_steps, nonfinite, patience, reached


def after(*values, step=0, epoch=0, seconds=0.0, name="val/loss"):
    """A state with these evaluations behind it."""
    history = History(Record(i, i, {name: v}) for i, v in enumerate(values))
    return SimpleNamespace(history=history, progress=Progress(step, epoch, 0, 0, seconds))


def test_patience_waits_for_n_evaluations_without_improvement():
    """The count starts at the best value and ends with the reason."""
    assert patience("val/loss", 2)(after(0.5, 0.4, 0.45)) is None
    assert patience("val/loss", 2)(after(0.5, 0.4, 0.45, 0.41)) == "val/loss has not improved in 2 evaluations (best 0.4)"
    assert patience("val/loss", 2)(after(0.5, 0.4, 0.45, 0.39)) is None


def test_patience_knows_which_way_is_better():
    """With mode="max", higher is better; ties are no improvement."""
    assert patience("val/acc", 2, "max")(after(0.5, 0.6, 0.6, 0.6, name="val/acc")) is not None
    assert patience("val/acc", 2, "max")(after(0.5, 0.6, 0.6, 0.7, name="val/acc")) is None


def test_patience_asks_for_more_than_min_delta():
    """What improves by no more than min_delta does not count."""
    assert patience("val/loss", 2, min_delta=0.1)(after(0.5, 0.45, 0.41)) is not None
    assert patience("val/loss", 2, min_delta=0.1)(after(0.5, 0.45, 0.39)) is None


def test_nan_never_improves():
    """A NaN counts as an evaluation without improvement, first or later."""
    assert patience("val/loss", 2)(after(0.5, math.nan, math.nan)) is not None
    assert patience("val/loss", 2)(after(math.nan, 0.5, 0.6)) is None
    assert patience("val/loss", 2)(after(math.nan, math.nan)) is not None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 4))
def test_patience_depends_on_the_history_alone(values, n):
    """One rule asked along the way gives what a fresh one gives at the end: nothing is remembered."""
    used = patience("val/loss", n)
    for k in range(1, len(values) + 1):
        assert used(after(*values[:k])) == patience("val/loss", n)(after(*values[:k]))


def test_reached_looks_at_the_last_evaluation():
    """The goal may be a lower or an upper one."""
    assert reached("val/acc", 0.9)(after(0.95, 0.8, name="val/acc")) is None
    assert reached("val/acc", 0.9)(after(0.8, 0.9, name="val/acc")) == "val/acc reached 0.9 (goal 0.9)"
    assert reached("val/loss", 0.1, "min")(after(0.1)) is not None


def test_diverged_stops_past_the_limit_and_at_nan():
    """Worse than the limit, or no number at all."""
    assert diverged("val/loss", 10.0)(after(9.0)) is None
    assert diverged("val/loss", 10.0)(after(11.0)) == "val/loss diverged to 11 (limit 10)"
    assert diverged("val/loss", 10.0)(after(math.nan)) is not None
    assert diverged("val/acc", 0.1, "max")(after(0.05, name="val/acc")) is not None


def test_nonfinite_names_the_metric():
    """Without a name every metric of the last record is looked at."""
    assert nonfinite()(after(math.inf)) == "val/loss is inf"
    assert nonfinite("val/loss")(after(0.5, math.nan)) == "val/loss is nan"
    assert nonfinite()(after(math.nan, 0.5)) is None
    assert nonfinite()(after()) is None


def test_limits_count_the_total_progress():
    """Steps, epochs and seconds before a resume count as well."""
    assert max_steps(10)(after(step=9)) is None
    assert max_steps(10)(after(step=10)) == "10 steps done"
    assert max_epochs(2)(after(epoch=2)) == "2 epochs done"
    assert max_time(timedelta(minutes=1))(after(seconds=60.0)) == "60 seconds of training done"
    assert max_time(60)(after(seconds=59.0)) is None


def test_a_guard_heeds_a_rule_only_from_then_on():
    """The rule is asked afresh each time: what it said before the minimum is forgotten."""
    guarded = patience("val/loss", 1) & min_steps(10)
    assert guarded(after(0.4, 0.5, step=9)) is None
    assert guarded(after(0.4, 0.5, step=10)) == "val/loss has not improved in 1 evaluations (best 0.4) and at least 10 steps done"
    assert guarded(after(0.4, 0.5, 0.3, step=11)) is None
    assert (patience("val/loss", 1) & min_epochs(2))(after(0.4, 0.5, epoch=1)) is None


def test_the_first_reason_counts():
    """`|` gives the reason of the left rule where both have one, and joins functions on either side."""

    def sunday(state):
        return "it is Sunday" if state.progress.step == 7 else None

    rule = max_epochs(1) | max_steps(5) | sunday
    assert rule(after(step=7, epoch=1)) == "1 epochs done"
    assert rule(after(step=7)) == "5 steps done"
    assert (sunday | max_epochs(1))(after(step=7)) == "it is Sunday"
    assert (sunday & max_steps(5))(after(step=7)) == "it is Sunday and 5 steps done"


def seven_steps(state):
    """A rule that answers with a bool."""
    return state.progress.step >= 7


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (seven_steps, "seven_steps"),
        (~fl.triggers.stop_rule(lambda state: state.progress.step < 7), "~<lambda>"),
        (seven_steps | max_steps(9), "seven_steps"),
        (max_steps(9) | seven_steps, "seven_steps"),
        (max_steps(7) & seven_steps, "7 steps done and seven_steps"),
    ],
)
def test_false_continues_and_true_stops_for_the_name_of_the_rule(rule, reason):
    """A rule that answers with a bool stops a run at the step where it is True, in whatever it is joined."""
    task = fl.Task(nn.Linear(1, 1), lambda model, batch: model(batch).sum(), configure_optimizers=lambda m: torch.optim.SGD(m.parameters()))
    state = fl.fit(fl.TrainState.create(task), [torch.ones(2, 1)], fl.FitConfig(stop=rule, max_epochs=20, progress=False))
    assert (state.progress.step, state.stopped) == (7, reason)


@pytest.mark.parametrize("answer", [0, "", torch.tensor(False), [], 0.5], ids=repr)
def test_an_answer_that_is_no_reason_names_the_rule(answer):
    """What is neither None, a bool nor a reason is a mistake: the error names the rule and where it is."""

    def mine(state):
        return answer

    step = fl.pipe(lambda state, batch: (state, {}), fl.stop_when(mine))
    state = fl.TrainState.create(fl.Task(nn.Identity(), lambda model, batch: batch))
    with pytest.raises(
        StepError, match=r"the stop rule .*mine \(.*test_rules.py:\d+\) must answer None or False to continue.*but answered"
    ):
        next(fl.run(step, state, [torch.ones(1)]))
    with pytest.raises(StepError, match=r"the stop rule mine .*must answer"):
        (mine | max_steps(3))(after())


def test_a_rule_prints_as_its_source_text():
    """The text says what was written, with the parentheses that it needs."""
    rule = (patience("val/acc", 3, "max", min_delta=0.1) | reached("val/acc", 0.9)) & min_steps(5)
    assert repr(rule) == "(patience('val/acc', 3, 'max', min_delta=0.1) | reached('val/acc', 0.9)) & min_steps(5)"
    assert rule.monitors == ("val/acc", "val/acc")


def test_rules_are_compared_by_what_they_are_and_not_by_how_they_print():
    """Equal arguments make equal rules with one hash; two functions that print alike make different ones."""
    assert patience("val/loss", 3) == patience("val/loss", n=3, mode="min")
    assert hash(patience("val/loss", 3) | max_steps(5)) == hash(patience("val/loss", 3) | max_steps(5))
    assert patience("val/loss", 3) != patience("val/loss", 3, "max")
    assert max_steps(5) | max_epochs(1) != max_steps(5) & max_epochs(1)
    one, two = (lambda state: None), (lambda state: "now")
    assert repr(max_steps(5) | one) == repr(max_steps(5) | two)
    assert max_steps(5) | one != max_steps(5) | two
    assert max_steps(5) | one == max_steps(5) | one


def test_the_opposite_of_a_rule_stops_while_the_rule_does_not():
    """`~` joins as it does for triggers: its reason is its text, and two of them give the rule's answer again."""
    rule = ~min_steps(5)
    assert rule(after(step=4)) == "~min_steps(5)"
    assert rule(after(step=5)) is None
    assert (max_epochs(1) & rule)(after(step=4, epoch=1)) == "1 epochs done and ~min_steps(5)"
    assert (~rule)(after(step=4)) is None
    assert (~patience("val/loss", 2)).monitors == ("val/loss",)


def test_two_runs_that_share_a_rule_get_their_own_answers():
    """A rule is asked about another history in turn, as two runs with one pipe do, and answers about the one that it is given."""
    rule, good, bad = patience("val/loss", 2), after(0.5, 0.4, 0.3), after(0.3, 0.4, 0.5)
    for _ in range(2):
        assert rule(good) is None
        assert rule(bad) == "val/loss has not improved in 2 evaluations (best 0.3)"


def test_a_monitor_that_no_evaluation_yields_is_named():
    """The error lists the names that exist; before the first evaluation nothing is known."""
    assert patience("val/accuracy", 3)(after()) is None
    with pytest.raises(MonitorError, match=r"'val/accuracy' is monitored, but no evaluation yields it; there are \['val/loss'\]"):
        patience("val/accuracy", 3)(after(0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patience("loss", 3), r"must be a string with its kind, such as \"val/loss\""),
        (lambda: patience("val/loss", 0), r"at least 1, but got 0"),
        (lambda: patience("val/loss", 3, "low"), r"must be \"min\" or \"max\", but got 'low'"),
        (lambda: patience("val/loss", 3, min_delta=-1.0), r"min_delta=...\) must be at least 0, but got -1.0"),
        (lambda: max_steps(-1), r"max_steps must be a whole number of at least 0, but got -1"),
        (lambda: max_epochs(1.5), r"max_epochs must be a whole number of at least 0, but got 1.5"),
        (lambda: max_time(0), r"max_time must be seconds above 0 or a timedelta, but got 0"),
        (lambda: max_steps(3) | 5, r"joins with another one or with a function of a state, but got 5"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(make, message):
    """Every argument is checked when the rule is made."""
    with pytest.raises(ConfigError, match=message):
        make()
