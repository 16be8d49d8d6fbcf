"""Every optimizer there is, each with a model that it can train."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs
import torch
import torch_optimizer
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight.state import Task

LEFT_OUT = {
    "torch_optimizer.Lookahead": "wraps another optimizer, and its state_dict() raises",
    "torch_optimizer.Adahessian": "needs backward(create_graph=True), and draws from the global generator",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"lr": 0.1, "momentum": 0.9},
    "torch.optim.Adadelta": {"lr": 1.0},
    "torch.optim.LBFGS": {"lr": 0.5, "max_iter": 4, "history_size": 3},
    "torch_optimizer.QHM": {"lr": 0.1, "momentum": 0.9, "nu": 0.7},
    "torch_optimizer.SGDW": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "torch_optimizer.SGDP": {"lr": 0.1, "momentum": 0.9},
    "torch_optimizer.LARS": {"lr": 0.1, "momentum": 0.9},
}
FUSED = ("torch.optim.Adam", "torch.optim.AdamW", "torch.optim.Adagrad")  # SGD stands here with momentum, which is left unfused


@attrs.frozen
class Case:
    """An optimizer class with what it is made with."""

    name: str
    kind: Callable[..., Any]
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """A small model, the same each time, that this optimizer can train."""
        torch.manual_seed(1)
        if self.name == "torch.optim.SparseAdam":
            return nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum", sparse=True))
        bias = self.name != "torch.optim.Muon"  # Muon takes matrices only
        return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))

    def optimizer(self, model: nn.Module, **more: Any) -> Any:
        """The optimizer of a model."""
        return self.kind(model.parameters(), **self.options, **more)

    def task(self) -> Task:
        """The task that trains the model with this optimizer."""
        return Task(self.model(), train_step, configure_optimizers=self.optimizer)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches, the same each time."""
        draw = torch.Generator().manual_seed(2)
        targets = [torch.randint(3, (5,), generator=draw) for _ in range(count)]
        if self.name == "torch.optim.SparseAdam":
            return [(torch.randint(6, (5, 2), generator=draw), y) for y in targets]
        return [(torch.randn(5, 4, generator=draw), y) for y in targets]


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of a batch."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def _classes(module: ModuleType, prefix: str) -> dict[str, Any]:
    kinds = {n: k for n, k in vars(module).items() if inspect.isclass(k) and issubclass(k, torch.optim.Optimizer)}
    return {f"{prefix}.{n}": k for n, k in kinds.items() if k is not torch.optim.Optimizer}


FOUND = _classes(torch.optim, "torch.optim") | _classes(torch_optimizer, "torch_optimizer")
CASES = {name: Case(name, kind, OPTIONS.get(name, {})) for name, kind in FOUND.items() if name not in LEFT_OUT}
