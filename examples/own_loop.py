"""Train without `fit`: a pipe composed by hand, a manual loop, and your own output.

    python examples/own_loop.py

Expected last line: ``test accuracy 0.9572`` or so, above 0.94 in any case.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl

Batch = tuple[Tensor, Tensor]


def train_step(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def eval_step(model: nn.Module, batch: Batch) -> dict[str, fl.Mean]:
    """How many images are recognised."""
    images, labels = batch
    return {"acc": fl.Mean((model(images).argmax(-1) == labels).sum(), len(labels))}


def main() -> None:
    """Train for ten epochs, keep the state that was best on the validation data, and test it."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, val, test = (TensorDataset(images[i], labels[i]) for i in torch.randperm(len(images)).split([1200, 200, 397]))
    loader, val_loader = DataLoader(train, batch_size=25, shuffle=True), DataLoader(val, batch_size=200)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    task = fl.Task(model, train_step, eval_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    step = fl.pipe(task.train_step, fl.grad(), fl.accumulate(2), fl.clip_norm(1.0), fl.apply())
    print(step)

    start = fl.TrainState.create(task, seed=0)
    best, best_acc, losses = start, 0.0, list[Tensor]()
    for state, metrics in fl.run(step, start, loader):
        losses.append(metrics["loss"].compute())  # a tensor: no step waits for its number
        if state.progress.batch:
            continue  # within an epoch
        acc = fl.evaluate(state, val_loader)["acc"]
        print(f"epoch {state.progress.epoch:2}  loss {torch.stack(losses).mean():.4f}  accuracy {acc:.4f}")
        losses.clear()
        if acc > best_acc:
            best, best_acc = state.copy(), acc  # the next step overwrites the tensors of `state`
        if state.progress.epoch == 10:
            break

    fl.save(best, "runs/own_loop")
    again = fl.load("runs/own_loop", task)
    print(f"the best state is that of epoch {again.progress.epoch}")
    print(f"test accuracy {fl.evaluate(again, DataLoader(test, batch_size=200))['acc']:.4f}")


if __name__ == "__main__":
    main()
