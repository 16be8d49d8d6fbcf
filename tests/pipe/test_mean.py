"""Gradients of a group are one true mean."""

from functools import reduce

import pytest
import torch
from torch import nn

from fnlight.data import Item
from fnlight.gradients import grad
from fnlight.metrics import join_metrics
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


def test_means_of_few_digits_are_exact():
    """A thousand numbers in bfloat16 have the mean that they have, although their sum has no more digits than they."""
    value = torch.tensor(1.0078125, dtype=torch.bfloat16)
    found = reduce(join_metrics, [{"loss": value}] * 1000)
    assert float(found["loss"].compute()) == pytest.approx(1.0078125, rel=1e-6)
