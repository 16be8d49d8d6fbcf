"""Averages of weights are what their formulas say, and what torch's own averages are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.averages import ema
from fnlight.errors import ConfigError
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.update import apply, grad


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def created():
    torch.manual_seed(0)
    task = Task(nn.Linear(3, 3), loss_fn, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return TrainState.create(task, seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_ema_is_the_recurrence():
    """average = decay * average + (1 - decay) * params, from the initial parameters on."""
    state = created()
    step = pipe(loss_fn, grad(), apply(), ema(0.9))
    average = {name: p.clone() for name, p in state.params.items()}
    for i in range(3):
        state, _ = step(state, data(seed=i))
        average = {name: torch.lerp(value, state.params[name], 1 - 0.9) for name, value in average.items()}
    assert all(torch.equal(state.memory["ema"][name], value) for name, value in average.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema(1.0), r"ema must be a decay of at least 0 and below 1, but got 1.0"),
    ],
)
def test_an_average_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()
