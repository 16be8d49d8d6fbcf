"""The tasks that every law is tried on; one more entry in `TASKS` joins all of them."""

from collections.abc import Callable
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight import Mean, Optim, Phase, Task, clip_norm, cosine, manual, pipe, steps
from fnlight.state import Store
from fnlight.tensors import isolated
from fnlight.testing import tiny_batches, tiny_task


class Transformer(nn.Module):
    """One block of attention over tokens, with dropout; padding is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x), mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True))


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


class Frozen(nn.Module):
    """A frozen trunk, with a frozen norm whose statistics still move, below a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Statistics(nn.Module):
    """Nothing to train: running statistics of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def measure(model: Any, batch: Any) -> Any:
    """A loss that no gradient flows from, and a buffer that counts."""
    model.seen += len(batch[0])
    return model(batch[0] + 0.1 * torch.rand_like(batch[0])).square().mean(), {"seen": model.seen.float()}


def measured(model: Any, batch: Any) -> Any:
    return {"loss": Mean(model(batch[0]).square().sum(), batch[0].numel())}


class Adversaries(nn.Module):
    """A generator with BatchNorm and a discriminator with dropout; predictions are the discriminator's."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.disc = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.disc(x)


def tell_apart(model: Any, batch: Any) -> Any:
    """The loss of the discriminator."""
    real, fake = model(batch[0]), model(model.gen(torch.randn(len(batch[0]), 3, device=batch[0].device)))
    return (F.softplus(-real) + F.softplus(fake)).mean(), {"real": real.mean(), "fake": fake.mean()}


def deceive(model: Any, batch: Any) -> Any:
    """The loss of the generator."""
    return F.softplus(-model(model.gen(torch.randn(len(batch[0]), 3, device=batch[0].device)))).mean()


def deceived(model: Any, batch: Any) -> Any:
    return {"loss": Mean(F.softplus(-model(batch[0])).sum(), len(batch[0]))}


def two_optimizers(model: Any) -> dict[str, Any]:
    return {
        "disc": torch.optim.AdamW(model.disc.parameters(), lr=1e-2),
        "gen": Optim(torch.optim.SGD(model.gen.parameters(), lr=0.1, momentum=0.9), schedule=cosine(total=5)),
    }


class Centres(nn.Module):
    """Nothing that a gradient could move: three centres."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.at)


@torch.no_grad()
def draw_near(store: Store, batches: Any, key: int) -> Any:
    """One step of k-means on a batch, by hand: each centre goes to the running mean of what is nearest to it, give or take; empty ones jump."""
    counts, losses = store.memory["k-means"]["counts"], list[Tensor]()
    for x, _ in batches:
        x = x + 0.01 * torch.randn_like(x)
        distances, nearest = torch.cdist(x, store.module.at).min(1)
        for i in range(3):
            own = x[nearest == i]
            counts[i] += len(own)
            store.module.at[i] += (own - store.module.at[i]).sum(0) / counts[i] if len(own) else 0.1 * torch.randn(4, device=x.device)
        losses.append(distances.square().mean())
    return {"loss": torch.stack(losses).mean()}


def distance(model: Any, batch: Any) -> Any:
    return {"loss": Mean(model(batch[0]).max(1).values.square().sum(), len(batch[0]))}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def by_hand(model: Callable[[], nn.Module], like: str) -> Callable[[], Task]:
    """A task with a model of its own and the functions of a tiny one."""

    def make() -> Task:
        with isolated():
            torch.manual_seed(0)
            return attrs.evolve(tiny_task(like), model=model(), configure_optimizers=adam)

    return make


@attrs.frozen
class Case:
    """A task with its data.

    Args:
        make: Makes the task, the same one each time.
        data: The tiny batches that it takes.
        trains: Whether anything is trainable.
        kind: What its `train_step` is: one ``"loss"``, several ``"phases"``, or a ``"whole"`` step.
    """

    make: Callable[[], Task]
    data: str
    trains: bool = True
    kind: Literal["loss", "phases", "whole"] = "loss"

    def batches(self, num_batches: int = 3) -> list[Any]:
        """Batches of which the last is smaller."""
        found = tiny_batches(self.data, num_batches, 6)
        x, y = found[-1]
        return [*found[:-1], (x[:4], y[:4])]


def of(model: Callable[[], nn.Module], *functions: Any) -> Callable[[], Task]:
    """A task of its own: a model and the four functions of a task."""

    def make() -> Task:
        with isolated():
            torch.manual_seed(0)
            return Task(model(), *functions)

    return make


PHASES = {"disc": tell_apart, "gen": Phase(deceive, clip_norm(0.05), every=steps(2))}
WHOLE = pipe(draw_near, manual(lambda store: {"counts": torch.zeros(3, device=store.device)}, name="k-means"))

TASKS = {
    "mlp with BatchNorm and dropout": Case(lambda: tiny_task("mlp"), "mlp"),
    "convnet": Case(lambda: tiny_task("convnet"), "convnet"),
    "transformer": Case(by_hand(Transformer, "tokens"), "tokens"),
    "recurrent net": Case(lambda: tiny_task("tokens"), "tokens"),
    "tied weights": Case(by_hand(Tied, "tokens"), "tokens"),
    "frozen parts": Case(by_hand(Frozen, "mlp"), "mlp"),
    "two optimizers": Case(of(Adversaries, PHASES, deceived, lambda model, batch: model(batch[0]), two_optimizers), "mlp", kind="phases"),
    "a step by hand": Case(of(Centres, WHOLE, distance, lambda model, batch: model(batch[0])), "mlp", trains=False, kind="whole"),
    "buffers only": Case(lambda: Task(Statistics(), measure, measured, lambda model, batch: model(batch[0])), "mlp", trains=False),
}
