"""A linear model with mean and summed losses, and its data: what the tests of single steps share."""

import torch
from torch import nn
from torch.nn import functional as F

from fnlight.metrics import Mean
from fnlight.state import Task, TrainState


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def sum_fn(model, batch):
    """A loss as a sum and a weight."""
    return Mean(F.mse_loss(model(batch), batch, reduction="sum"), batch.numel())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def created(train_step=loss_fn, configure=sgd, model=None, seed=0):
    torch.manual_seed(0)
    return TrainState.create(Task(model or nn.Linear(3, 3), train_step, configure_optimizers=configure), seed=seed)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
