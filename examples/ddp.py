"""One script for one process and for many: digits of scikit-learn, data parallel.

    python examples/ddp.py
    torchrun --nproc-per-node=2 examples/ddp.py

The batch size of 64 is the global batch size, so both commands train on the same samples in the same order, with the same result.
Expected last line: ``test accuracy 0.97``, or close to it, printed once.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import fnlight as fl


def loaders():
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, test = random_split(data, [1500, 297], generator=torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64)


def train_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def eval_step(model, batch):
    x, y = batch
    return {"acc": fl.Mean((model(x).argmax(-1) == y).sum(), len(y))}  # a sum and a count: exact, however many ranks evaluate


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    task = fl.Task(model, train_step, eval_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3))
    train, test = loaders()
    with fl.parallel.join() as world:  # does nothing where this process is alone
        state = fl.TrainState.create(task, seed=0, place=fl.parallel.ddp())
        state = fl.fit(state, train, fl.FitConfig(max_epochs=15, progress=False))
        scores = fl.evaluate(state, test)  # each batch on one of the ranks, the result on all of them
        if world.rank == 0:
            print(f"test accuracy {scores['acc']:.2f}")


if __name__ == "__main__":
    main()
