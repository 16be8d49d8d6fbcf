"""The training that is killed: everything that a resume could get wrong, in less than a second."""

import os

import attrs
import torch
from torch.utils.data import DataLoader, Dataset

from fnlight import JSONL, FitConfig, Loaders, Optim, TrainState, fit, last, plateau, steps
from fnlight.testing import tiny_batches, tiny_task

STEPS = 15


class Noisy(Dataset):
    """Samples that are augmented where they are read."""

    def __init__(self, count):
        self.x, self.y = tiny_batches(num_batches=1, batch_size=count)[0]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.3 * torch.randn(4), self.y[index]


def make_task():
    """BatchNorm, dropout, and a learning rate that falls each time the validation loss is not much better."""
    schedule = plateau(factor=0.5, patience=0, threshold=0.05)
    configure = lambda model: Optim(torch.optim.AdamW(model.parameters(), lr=0.05), schedule, monitor="val/loss")
    return attrs.evolve(tiny_task(), configure_optimizers=configure)


def make_loaders(workers=0):
    """Shuffled and augmented, the last batch smaller."""
    options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    return Loaders(train=DataLoader(Noisy(18), batch_size=4, shuffle=True, **options), val=tiny_batches(seed=1))


def make_config(folder, **changes):
    """A checkpoint at every step."""
    base = FitConfig(
        max_epochs=3, ema=0.8, clip_norm=1.0, eval_every=steps(2), dir=folder, save_every=steps(1), keep=last(2), resume=True,
        sinks=JSONL(os.path.join(folder, "log.jsonl")), log_every=steps(3), device="cpu", progress=False,
    )  # fmt: skip
    return attrs.evolve(base, **changes)


def train(folder, task=None, loaders=None, **changes):
    """Begin a run in a folder, or go on with it."""
    return fit(TrainState.create(task or make_task(), seed=11), loaders or make_loaders(), make_config(folder, **changes))
