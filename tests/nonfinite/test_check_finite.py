"""`check_finite` names the first step whose loss was not finite, however late it is asked."""

import pytest
import torch

from fnlight.errors import NonFiniteError
from fnlight.gradients import clip_norm, grad
from fnlight.loop import run, stop_when
from fnlight.metrics import Mean
from fnlight.nonfinite import check_finite, skip_nonfinite
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.triggers import epochs, max_epochs, max_steps, steps
from tests.loop.runs import ran
from tests.small_runs import created, train_step


def test_a_loss_that_is_not_finite_names_its_step():
    """It is noticed when looked at, and the first bad step is named."""

    def failing(model, batch):
        return train_step(model, batch) * (float("nan") if batch.sum() == 0 else 1.0)

    data = [torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)]
    with pytest.raises(
        NonFiniteError, match=r"at step 3 \(in epoch 0, up to its batch 3; noticed at step 4\); by now NaN or infinite: weight, bias"
    ):
        ran(check_finite(epochs(1)), stop_when(max_epochs(2)), fn=failing, data=data)


def test_nan_gradients_of_a_finite_loss_name_their_step():
    """The norm of the gradients is looked at where a stage has computed it, so the step itself is named, not the one after it."""

    def failing(model, batch):
        return train_step(model, batch) + (torch.sqrt((model.weight * 0).sum()) if batch.sum() == 0 else 0.0)

    step = pipe(failing, grad(), clip_norm(1.0), apply(), check_finite(epochs(1)), stop_when(max_epochs(2)))
    data = [torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)]
    with pytest.raises(NonFiniteError, match=r"the norm of the gradients was NaN or infinite at step 2 \(in epoch 0"):
        list(run(step, created(failing), data))


def test_a_step_that_is_left_out_is_no_bad_one():
    """The norm of gradients that were not applied may be NaN."""

    def failing(model, batch):
        return train_step(model, batch) + (torch.sqrt((model.weight * 0).sum()) if batch.sum() == 0 else 0.0)

    step = pipe(failing, grad(), skip_nonfinite(), clip_norm(1.0), apply(), check_finite(epochs(1)), stop_when(max_epochs(2)))
    *_, (state, _) = run(step, created(failing), [torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)])
    assert all(p.isfinite().all() for p in state.params.values())


def test_a_mean_over_nothing_names_its_step():
    """0 / 0 is NaN: a loss Mean(0, 0) is found like any other, at its own step."""

    def failing(model, batch):
        count = float(batch.abs().sum() > 0)
        return Mean(train_step(model, batch) * count, torch.tensor(count))

    with pytest.raises(NonFiniteError, match=r"at step 2 \(in epoch 0"):
        ran(check_finite(epochs(1)), stop_when(max_epochs(2)), fn=failing, data=[torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)])


def test_a_loss_that_is_not_finite_is_noticed_at_the_end_of_a_run():
    """Nothing is let through because the run was short."""
    with pytest.raises(NonFiniteError, match="at step 2"):
        ran(check_finite(steps(100)), stop_when(max_steps(2)), fn=lambda m, b: train_step(m, b) / 0)
