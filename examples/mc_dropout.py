"""Estimate how certain a network is: predict many times with dropout on, and measure how much the predictions differ.

    python examples/mc_dropout.py

Prediction runs in eval mode; modes that `predict_step` changes are restored after its batch.

Expected last line: ``mean entropy 0.44 where right, 1.23 where wrong: True`` or so; true if it is higher where wrong.

References:
    Gal and Ghahramani, "Dropout as a Bayesian approximation" (2016).
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl

NUM_SAMPLES = 50
Batch = tuple[Tensor, Tensor]


def train_step(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def predict_step(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean of many predictions, and its entropy in nats: high if the predictions differ or are uncertain."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    probs = torch.stack([model(batch[0]).softmax(-1) for _ in range(NUM_SAMPLES)]).mean(0)
    return probs.argmax(-1), torch.special.entr(probs).sum(-1)


def main() -> None:
    """Train on few images, so that some of the many others are not recognised, and compare the entropies."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, test = (TensorDataset(images[i], labels[i]) for i in torch.randperm(len(images)).split([200, 1597]))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10))
    task = fl.Task(
        model, train_step, predict_step=predict_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)
    )
    state = fl.fit(fl.TrainState.create(task, seed=0), DataLoader(train, batch_size=20, shuffle=True), fl.FitConfig(max_epochs=20))

    outputs = fl.collect(fl.predict(state, DataLoader(test, batch_size=400)))
    answers, entropy = (torch.cat(part) for part in zip(*outputs, strict=True))
    right = answers == test.tensors[1]
    print(f"{int(right.sum())} of {len(right)} images are recognised")
    where_right, where_wrong = entropy[right].mean(), entropy[~right].mean()
    print(f"mean entropy {where_right:.2f} where right, {where_wrong:.2f} where wrong: {bool(where_wrong > where_right)}")


if __name__ == "__main__":
    main()
