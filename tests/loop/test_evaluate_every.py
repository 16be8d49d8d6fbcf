"""`evaluate_every` adds records to the history where it is due, once, and names the evaluation that fails."""

import pytest
import torch

from fnlight.errors import ConfigError, LoaderError
from fnlight.gradients import grad
from fnlight.loop import evaluate_every, run, stop_when
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.triggers import at_end, epochs, max_epochs, max_steps, steps
from tests.loop.runs import ran
from tests.small_runs import created, loader, train_step


def test_evaluations_are_records_of_the_history():
    """evaluate_every adds val/... at the step where it was due, and leaves the state at that."""
    state, _ = ran(evaluate_every(loader(), steps(3)), stop_when(max_steps(7)))
    assert [(r.step, r.epoch, list(r.metrics)) for r in state.history] == [(3, 0, ["val/loss"]), (6, 1, ["val/loss"])]


def test_several_evaluations_have_names_of_their_own():
    """Two evaluations at one step make one record."""
    state, _ = ran(
        evaluate_every({"a": loader(), "b": loader()}, epochs(1)),
        evaluate_every(loader(), epochs(1), name="test"),
        stop_when(max_epochs(1)),
    )
    assert list(state.history[0].metrics) == ["val/a/loss", "val/b/loss", "test/loss"]


def test_data_that_an_evaluation_used_up_is_an_error_that_says_which_evaluation():
    """A second evaluation finds nothing; the error names it, and where the training stood."""
    step = pipe(
        train_step, grad(), apply(), evaluate_every(iter([torch.ones(2, 3)]), every=steps(1), name="held out"), stop_when(max_steps(3))
    )
    with pytest.raises(LoaderError, match="exhausted") as raised:
        list(run(step, created(), [torch.ones(2, 3)]))
    assert raised.value.__notes__ == ["in the evaluation 'held out', after step 2"]


def test_an_evaluation_at_the_end_happens_once():
    """at_end evaluates after the last step, unless that step was evaluated anyway."""
    state, _ = ran(evaluate_every(loader(), at_end), stop_when(max_steps(3)))
    assert [r.step for r in state.history] == [3]
    state, _ = ran(evaluate_every(loader(), at_end | steps(3)), stop_when(max_steps(3)))
    assert [r.step for r in state.history] == [3]


def test_an_evaluation_without_an_eval_step_is_an_error_before_the_first_step():
    """The loop asks for it when it starts."""
    state = created(eval_step=None)
    with pytest.raises(ConfigError, match="this task has no eval_step"):
        ran(evaluate_every(loader(), steps(1000)), stop_when(max_steps(1)), state=state)
