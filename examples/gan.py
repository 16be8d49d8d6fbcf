"""Learn to draw handwritten digits: a generator and a discriminator, each with its own optimizer, and a picture grid in TensorBoard.

    python examples/gan.py
    tensorboard --logdir runs/gan

The losses of a GAN do not show whether it works. Here a classifier of real digits classifies 500 drawings: the digit score is e to the mean
divergence between its prediction for one drawing and its mean prediction. It is 1 if all drawings look the same, or like no digit; it would be
10 if each were certainly one digit and all digits occurred equally often.

Expected last line: ``digit score of the drawings 7.27, of real images 8.82`` or so; of drawings above 6 in any case.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

import fnlight as fl

NOISE = 32


class GAN(nn.Module):
    """Both networks: pictures are vectors of 64 numbers in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(
            *(nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()),
        )
        self.disc = nn.Sequential(
            *(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
            *(nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)),
        )

    def forward(self, count: int) -> Tensor:
        """Draw."""
        return self.gen(torch.randn(count, NOISE))


def tell_apart(model: GAN, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the discriminator, and its accuracy; no detach is needed, because the generator's parameters are frozen in this phase."""
    on_real, on_fake = model.disc(real), model.disc(model(len(real)))
    right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
    return (F.softplus(-on_real) + F.softplus(on_fake)).mean(), {"right": right}


def deceive(model: GAN, real: Tensor) -> Tensor:
    """The loss of the generator."""
    return F.softplus(-model.disc(model(len(real)))).mean()


def eval_step(model: GAN, real: Tensor) -> dict[str, fl.Image]:
    """A grid of drawings."""
    return {"drawings": fl.Image((model(32).reshape(-1, 1, 8, 8) + 1) / 2)}


def configure_optimizers(model: GAN) -> dict[str, torch.optim.Optimizer]:
    """One for each phase, by its name."""
    return {
        "disc": torch.optim.Adam(model.disc.parameters(), lr=1e-3, betas=(0.5, 0.99)),
        "gen": torch.optim.Adam(model.gen.parameters(), lr=1e-3, betas=(0.5, 0.99)),
    }


def digit_score(classifier: LogisticRegression, pictures: Tensor) -> float:
    """The digit score of the drawings, from 1 to 10."""
    each = torch.tensor(classifier.predict_proba(pictures.numpy()))
    divergence = (each * ((each + 1e-9).log() - (each.mean(0) + 1e-9).log())).sum(-1)
    return float(divergence.mean().exp())


def main() -> None:
    """Train for 60 epochs, and judge the averaged generator."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 8 - 1
    classifier = LogisticRegression(C=10, max_iter=2000).fit(images[:1297], data.target[:1297])

    task = fl.Task(
        GAN(), {"disc": tell_apart, "gen": deceive}, eval_step, lambda model, count: model(count), configure_optimizers=configure_optimizers
    )
    train = fl.TensorLoader(images, batch_size=64, shuffle=True)
    config = fl.FitConfig(max_epochs=60, ema=0.99, eval_every=fl.epochs(10), sinks=fl.TensorBoard("runs/gan"), progress=False)
    state = fl.fit(fl.TrainState.create(task, seed=0), fl.Loaders(train=train, val=[images[:1]]), config)
    print(state)
    print(state.history[-1].metrics)

    (drawings,) = fl.predict(state, [500], weights="ema")
    scores = digit_score(classifier, drawings), digit_score(classifier, images[1297:])
    print(f"digit score of the drawings {scores[0]:.2f}, of real images {scores[1]:.2f}")


if __name__ == "__main__":
    main()
