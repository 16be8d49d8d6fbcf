"""Triggers fire where they say, wherever a run was resumed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnlight.errors import ConfigError
from fnlight.state import Progress
from fnlight.triggers import Tick, at_end, epochs, minutes, seconds, steps


def ticks(num_epochs=3, batches=4, seconds_a_step=10.0):
    """Every tick of a run."""
    before = Progress()
    for step in range(1, num_epochs * batches + 1):
        after = Progress(step, step // batches, step % batches, step, step * seconds_a_step)
        yield Tick(before, after)
        before = after


def fired(when):
    return [tick.after.step for tick in ticks() if when(tick)]


def test_steps_fire_at_multiples():
    """`steps(n)` fires at completed steps n, 2n, 3n."""
    assert fired(steps(5)) == [5, 10]


def test_steps_do_not_fire_when_no_step_was_completed():
    """A skipped update leaves the step count where it was, and fires nothing twice."""
    assert not steps(5)(Tick(Progress(step=5), Progress(step=5)))


def test_epochs_fire_at_the_end_of_an_epoch():
    """`epochs(n)` fires at the last step of every n-th epoch."""
    assert fired(epochs(1)) == [4, 8, 12]
    assert fired(epochs(2)) == [8]


def test_minutes_and_seconds_fire_when_time_has_passed():
    """Timed triggers fire at the first step past each multiple of their period."""
    assert fired(minutes(0.5)) == [3, 6, 9, 12]
    assert fired(seconds(25)) == [3, 5, 8, 10]


def test_at_end_fires_once_after_the_last_step():
    """`at_end` fires on the closing tick only, where nothing else does."""
    end = Tick(Progress(step=5, epoch=1), Progress(step=5, epoch=1), end=True)
    assert fired(at_end) == []
    assert at_end(end)
    assert not (steps(5) | epochs(1) | minutes(1))(end)


@given(st.integers(1, 6), st.integers(1, 3))
def test_triggers_join_as_booleans_do(n, m):
    """`|`, `&` and `~` fire at the union, the intersection and the complement."""
    a, b = set(fired(steps(n))), set(fired(epochs(m)))
    assert set(fired(steps(n) | epochs(m))) == a | b
    assert set(fired(steps(n) & epochs(m))) == a & b
    assert set(fired(~steps(n))) == set(range(1, 13)) - a


def test_a_plain_function_joins_on_either_side():
    """Any function of a tick is a trigger, and joins with one."""

    def seventh(tick):
        return tick.after.step == 7

    assert fired(steps(5) | seventh) == [5, 7, 10]
    assert fired(seventh | steps(5)) == [5, 7, 10]
    assert fired(seventh & ~steps(5)) == [7]


def test_a_trigger_prints_as_its_source_text():
    """The text says what was written, with the parentheses that it needs."""
    assert repr(~(steps(5) | at_end) & (epochs(1) | minutes(2))) == "~(steps(5) | at_end) & (epochs(1) | minutes(2))"
    assert repr(~~steps(5) & ~(steps(5) & at_end)) == "~~steps(5) & ~(steps(5) & at_end)"


@pytest.mark.parametrize(
    "make",
    [
        lambda: steps(5),
        lambda: minutes(2),
        lambda: at_end,
        lambda: ~steps(5),
        lambda: steps(5) | at_end,
        lambda: (steps(5) | at_end) & ~epochs(1),
        lambda: steps(5) | max,
    ],
)
def test_triggers_made_of_equal_parts_are_equal(make):
    """Two triggers that are written the same way are equal and have one hash."""
    assert make() == make()
    assert hash(make()) == hash(make())


def test_triggers_are_compared_by_what_they_are_and_not_by_how_they_print():
    """Two functions that print alike make different triggers; an argument, an operator or a name makes a difference too."""
    one, two = (lambda tick: True), (lambda tick: False)
    assert repr(steps(5) | one) == repr(steps(5) | two)
    assert steps(5) | one != steps(5) | two
    assert steps(5) | one == steps(5) | one
    assert len({steps(5), steps(6), epochs(5), steps(5) & at_end, steps(5) | at_end, ~steps(5)}) == 6

    def at_end_too(tick):
        return False

    at_end_too.__name__ = "at_end"
    assert steps(5) | at_end_too != steps(5) | at_end


def test_how_operands_of_one_operator_are_grouped_makes_no_difference():
    """`a | (b | c)` is `(a | b) | c`, as its text reads."""
    assert steps(5) | (epochs(1) | at_end) == (steps(5) | epochs(1)) | at_end
    assert steps(5) & (epochs(1) | at_end) != (steps(5) & epochs(1)) | at_end


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "5", None])
def test_a_period_that_means_nothing_is_refused(bad):
    """A period must be a whole number of at least 1, and the error says what it got."""
    with pytest.raises(ConfigError, match=r"steps\(\.\.\.\) must be a whole number of at least 1, but got"):
        steps(bad)
    with pytest.raises(ConfigError, match=r"epochs\(\.\.\.\) must be a whole number"):
        epochs(bad)


def test_a_time_that_means_nothing_is_refused():
    """A time must be above 0 and finite."""
    for bad in (0, -1, float("inf"), float("nan"), "1"):
        with pytest.raises(ConfigError, match=r"minutes\(\.\.\.\) must be a number above 0"):
            minutes(bad)


def test_joining_with_something_else_is_refused():
    """A number is no trigger, and the error shows how to write one."""
    with pytest.raises(ConfigError, match=r"joins with another one or with a function of a tick, but got 5"):
        _ = steps(5) | 5


@given(st.integers(1, 20), st.integers(1, 5))
def test_earliest_of_steps_and_of_epochs_is_when_they_first_fire(a, b):
    """Both know it exactly; "or" is as early as one of them, "and" as late as the other."""
    assert (steps(a).earliest, epochs(b).earliest) == ((a, 0), (0, b))
    assert (steps(a) & epochs(b)).earliest == (a, b)
    assert (steps(a) | steps(a + 1)).earliest == (a, 0)
    assert (steps(a) & steps(a + 1)).earliest == (a + 1, 0)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_earliest_is_never_later_than_the_first_time_it_fires(a, b, c):
    """`earliest` may only err on the early side, for it decides whether a monitor can ever be met."""
    for when in (steps(a), epochs(b), steps(a) | epochs(b), steps(a) & epochs(b), ~steps(c), (steps(a) & epochs(b)) | steps(c)):
        first = next((tick.after for tick in ticks(6, 4) if when(tick)), None)
        if first is not None:
            assert when.earliest[0] <= first.step
            assert when.earliest[1] <= first.epoch
