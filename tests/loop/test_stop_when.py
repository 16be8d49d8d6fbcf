"""`stop_when` ends a run, says why, and is asked before the first step, too."""

import pytest

from fnlight.errors import ConfigError
from fnlight.gradients import grad
from fnlight.loop import run, stop_when
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.triggers import max_epochs, max_steps
from tests.loop.runs import ran
from tests.small_runs import loader, train_step


def test_a_run_goes_through_the_epochs_until_a_rule_says_why_it_stops():
    """The last state carries the reason; those before it carry none."""
    state, found = ran(stop_when(max_epochs(2)))
    assert [s.progress.step for s, _ in found] == list(range(1, 9))
    assert [(s.progress.epoch, s.progress.batch) for s, _ in found][3:5] == [(1, 0), (1, 1)]
    assert state.stopped == "2 epochs done"
    assert found[-2][0].stopped is None
    assert state.progress.samples == 16


def test_a_run_that_is_over_stays_over():
    """Rules are asked before the first step too, and the generator's value is the state."""
    state, _ = ran(stop_when(max_steps(3)))
    steps_taken = run(pipe(train_step, grad(), apply(), stop_when(max_steps(3))), state, loader())
    with pytest.raises(StopIteration) as end:
        next(steps_taken)
    assert end.value.value.stopped == "3 steps done"
    assert end.value.value.progress.step == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stop_when(), r"stop_when needs stop rules"),
        (lambda: stop_when(3), r"stop_when needs stop rules such as max_epochs\(10\), but got \(3,\)"),
    ],
)
def test_a_combinator_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()
