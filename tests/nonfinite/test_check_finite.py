"""What looks at every step remembers in the state, and is exact wherever a run was stopped."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fnlight.errors import NonFiniteError
from fnlight.gradients import clip_norm, grad
from fnlight.loop import epoch_means, run, stop_when
from fnlight.metrics import Mean
from fnlight.nonfinite import check_finite, skip_nonfinite
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.triggers import epochs, max_epochs, max_steps, patience, steps


def train_step(model, batch):
    return F.mse_loss(model(batch), batch)


def created(fn):
    """A state of the first step."""
    torch.manual_seed(0)
    return TrainState.create(Task(nn.Linear(3, 3), fn, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))


def ran(*combinators, state=None, data=None, fn=train_step):
    """The last state of a run, and what it yielded."""
    if state is None:
        state = created(fn)
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    found = list(run(pipe(fn, grad(), apply(), *combinators), state, data or DataLoader(rows, batch_size=2, shuffle=True)))
    return found[-1][0], found


def test_epoch_means_are_exact_and_survive_a_resume_within_the_epoch():
    """The mean over an epoch is that of its losses, however often the run was stopped in between."""
    whole, found = ran(epoch_means(), stop_when(max_epochs(1)))
    losses = [float(metrics["loss"]) for _, metrics in found]
    assert whole.history[0].metrics == {"train/loss": pytest.approx(sum(losses) / 4)}
    for k in (1, 2, 3):
        part, _ = ran(epoch_means(), stop_when(max_steps(k)))
        again, _ = ran(epoch_means(), stop_when(max_epochs(1)), state=part)
        assert again.history == whole.history


def test_a_rule_may_monitor_training_metrics():
    """train/loss can be monitored where epoch_means yields it."""
    state, _ = ran(epoch_means(), stop_when(patience("train/loss", 1) | max_epochs(3)))
    assert state.stopped is not None


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
