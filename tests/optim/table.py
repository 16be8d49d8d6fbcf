"""Every optimizer with a model that it can train, and a check that it trains, is saved, and resumes bit-identically."""

from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight.checkpoint import load, save
from fnlight.gradients import grad
from fnlight.optim import UNFIT, optimizer, optimizer_classes, param_groups
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.tensors import tree

SOURCES = {"torch.optim": 15, "torch_optimizer": 30, "schedulefree": 9, "pytorch_optimizer": 100}
"""The packages of optimizers, and their smallest expected number of classes."""

OPTIONS: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"lr": 0.1, "momentum": 0.9},
    "torch.optim.Adadelta": {"lr": 1.0},
    "torch.optim.LBFGS": {"lr": 0.5, "max_iter": 4, "history_size": 3},
    "torch_optimizer.QHM": {"lr": 0.1, "momentum": 0.9, "nu": 0.7},
    "torch_optimizer.SGDW": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "torch_optimizer.SGDP": {"lr": 0.1, "momentum": 0.9},
    "torch_optimizer.LARS": {"lr": 0.1, "momentum": 0.9},
    "torch_optimizer.Lookahead": {"base": "adamw", "k": 2, "lr": 0.01},
    "pytorch_optimizer.SaRA": {"threshold": 0.5, "lr": 0.01},
}
FUSED = ("torch.optim.Adam", "torch.optim.AdamW", "torch.optim.Adagrad")  # SGD is tested with momentum, so it is not fused
MATRICES = ("torch.optim.Muon", "pytorch_optimizer.SpectralSphere")  # these take matrices only
MUONS = tuple(
    f"pytorch_optimizer.{name}" for name in ("Muon", "AdaMuon", "AdaGO", "MuonClip", "NorMuon")
)  # these need to know which parameters are matrices
ROUNDED = {
    "pytorch_optimizer.SOAP": "its matrices come back in another memory order",
    "pytorch_optimizer.LoRARite": "its matrices come back in another memory order",
}
"""Optimizers that resume to the precision of float32 and not bit-identically, each with the reason."""
APPROXIMATE = {"pytorch_optimizer.SPlus": "its matrices come back in another memory order, and it steps by the signs of rounded numbers"}
"""Optimizers whose resumed weights may differ by some steps, each with the reason."""


@attrs.frozen
class Case:
    """An optimizer with its options."""

    name: str

    @property
    def first(self) -> int:
        """Number of steps after which the weights have changed; RAdam needs several."""
        return 8 if "RAdam" in self.name else 3

    def model(self) -> nn.Module:
        """A small model, the same each time, that this optimizer can train."""
        torch.manual_seed(1)
        if self.name == "torch.optim.SparseAdam":
            return nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum", sparse=True))
        bias = self.name not in MATRICES
        return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))

    def optimizer(self, model: nn.Module, **more: Any) -> Any:
        """The optimizer of a model, by its name."""
        groups: Any = model
        if self.name in MUONS:
            groups = param_groups(model, {"*.weight": {"use_muon": True}, "*.bias": {"use_muon": False}})
        return optimizer(self.name, groups, **OPTIONS.get(self.name, {}), **more)

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


@attrs.frozen
class Row:
    """The results for an optimizer.

    Args:
        name: With its package.
        memory: The slots that it keeps for a parameter.
        groups: What it remembers in its groups.
        needs: What it needs of a step.
        resumes: How it goes on from a file.
    """

    name: str
    memory: str
    groups: str
    needs: str
    resumes: str


def prove(case: Case, folder: Path) -> Row:
    """Train some steps, save, load, and continue with both: parameters, state and groups must be bit-identical."""
    task, batches, step = case.task(), case.batches(case.first + 2), pipe(train_step, grad(), apply())
    state = TrainState.create(task, seed=4)
    for batch in batches[: case.first]:
        state, _ = step(state, batch)
    row = described(case, state)
    loaded = load(save(state, str(folder / case.name)), task)
    assert loaded.progress == state.progress
    for batch in batches[case.first :]:
        state, _ = step(state, batch)
        loaded, _ = step(loaded, batch)
    if case.name in ROUNDED or case.name in APPROXIMATE:
        least = 1e-4 if case.name in ROUNDED else 0.05
        for name, p in state.params.items():
            torch.testing.assert_close(loaded.params[name], p, rtol=1e-3, atol=least)
        return row
    assert list(tree.differences(dict(loaded.params), dict(state.params))) == []
    assert list(tree.differences(memory(loaded), memory(state))) == []
    return row


def found(case: Case) -> Row:
    """The results for an optimizer after a few steps, without a file."""
    state, step = TrainState.create(case.task(), seed=4), pipe(train_step, grad(), apply())
    for batch in case.batches(case.first + 2)[: case.first]:
        state, _ = step(state, batch)
    return described(case, state)


def described(case: Case, state: TrainState) -> Row:
    """The row of an optimizer after a few steps that have changed the weights."""
    assert not tree.equal(dict(state.params), dict(case.model().named_parameters())), f"{case.name} does not train"
    name, optim = case.name, state.live.optim
    slots = {slot for parameter, held in state.opt_state.items() if parameter != "*" for slot in held}
    pairs = list(zip(optim.configured, optim.optimizer.param_groups, strict=True))
    changed = {key for was, now in pairs for key in now if key != "params" and not tree.equal(now[key], was.get(key))}
    modes = callable(getattr(optim.optimizer, "eval", None))
    needs = {"a closure": optim.closure, "gradients of gradients": optim.create_graph, "averaged weights": modes}
    return Row(
        name,
        ", ".join(sorted(map(str, slots))),
        ", ".join(sorted(changed)),
        ", ".join(what for what, yes in needs.items() if yes),
        "rounded" if name in ROUNDED else "approximate" if name in APPROXIMATE else "bitwise",
    )


def memory(state: TrainState) -> Any:
    """The optimizer state per parameter and per group."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state.live.optim.optimizer.param_groups]
    return {name: dict(slots) for name, slots in state.opt_state.items()}, groups


FOUND = [f"{source}.{name}" for source in SOURCES for name in optimizer_classes(source)]
LEFT_OUT = {name: reason for name, reason in UNFIT.items() if not name.endswith(".Lookahead")}  # that name is fl.Lookahead
CASES = {name: Case(name) for name in FOUND if name not in LEFT_OUT}
OF_TORCH = [name for name in CASES if name.startswith("torch")]
