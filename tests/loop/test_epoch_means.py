"""`epoch_means` writes exact means of an epoch to the history, wherever a run was stopped in between."""

import pytest

from fnlight.loop import epoch_means, stop_when
from fnlight.triggers import max_epochs, max_steps, reached
from tests.loop.runs import ran


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
    """train/loss can be monitored where epoch_means writes it."""
    state, _ = ran(epoch_means(), stop_when(reached("train/loss", 100.0, "min") | max_epochs(3)))
    assert (state.progress.epoch, state.stopped) == (1, f"train/loss reached {state.history[0].metrics['train/loss']:.6g} (goal 100)")
