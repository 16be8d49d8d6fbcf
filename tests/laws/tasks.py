"""The tasks that every law is tried on; one more entry in `TASKS` joins all of them."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight import Mean, Task, isolated
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
    """

    make: Callable[[], Task]
    data: str
    trains: bool = True

    def batches(self, num_batches: int = 3) -> list[Any]:
        """Batches of which the last is smaller."""
        found = tiny_batches(self.data, num_batches, 6)
        x, y = found[-1]
        return [*found[:-1], (x[:4], y[:4])]


TASKS = {
    "mlp with BatchNorm and dropout": Case(lambda: tiny_task("mlp"), "mlp"),
    "convnet": Case(lambda: tiny_task("convnet"), "convnet"),
    "transformer": Case(by_hand(Transformer, "tokens"), "tokens"),
    "recurrent net": Case(lambda: tiny_task("tokens"), "tokens"),
    "tied weights": Case(by_hand(Tied, "tokens"), "tokens"),
    "frozen parts": Case(by_hand(Frozen, "mlp"), "mlp"),
    "buffers only": Case(lambda: Task(Statistics(), measure, measured, lambda model, batch: model(batch[0])), "mlp", trains=False),
}
