"""Gradients of a group are one true mean."""

import pytest
import torch
from torch import nn

from fnlight.data import Item
from fnlight.gradients import grad
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply


def train_step(model, batch):
    return model(batch).square().mean()


def created():
    torch.manual_seed(0)
    task = Task(nn.Linear(2, 1), train_step, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return TrainState.create(task)


def test_a_group_is_divided_by_its_summed_weight():
    """Without `accumulate` a step still takes an item of several batches, and sees one mean."""
    state = created()
    a, b = torch.ones(2, 2), 3 * torch.ones(2, 2)
    step = pipe(train_step, grad(), apply())
    one, _ = step(state.copy(), torch.cat([a, b]))
    two, metrics = step(state.copy(), Item.of(a, b, state=state))
    assert all(torch.allclose(one.params[n], p) for n, p in two.params.items())
    assert two.progress.batch == 2
    mean = (train_step(state.module(), a) + train_step(state.module(), b)) / 2
    assert float(metrics["loss"]) == pytest.approx(float(mean.detach()))
