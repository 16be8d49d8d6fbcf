"""Small runs, for the tests of what `fit` is made of."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fnlight.data import Loaders
from fnlight.fit import FitConfig
from fnlight.metrics import Mean
from fnlight.state import Task, TrainState


def train_step(model, batch):
    return F.mse_loss(model(batch), batch)


def eval_step(model, batch):
    return {"loss": Mean(F.mse_loss(model(batch), batch, reduction="sum"), batch.numel())}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def created(train_step=train_step, eval_step=eval_step, configure=sgd, model=None):
    torch.manual_seed(0)
    return TrainState.create(Task(model or nn.Linear(3, 3), train_step, eval_step, configure_optimizers=configure))


def loader(n=8, batch_size=2, shuffle=True):
    rows = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


def config(**fields):
    return FitConfig(**{"progress": False, **fields})


def both():
    return Loaders(train=loader(), val=loader())


def counted():
    """A train_step that counts its calls."""
    calls = []

    def counting(model, batch):
        calls.append(batch)
        return train_step(model, batch)

    return counting, calls


class Slow(list):
    """Batches in memory, each of which takes some seconds to read, on a clock of their own."""

    def __init__(self, batches, seconds):
        list.__init__(self, batches)
        self.seconds, self.now = seconds, 0.0

    def __getitem__(self, place):
        self.now += self.seconds
        return list.__getitem__(self, place)

    def clock(self):
        return self.now
