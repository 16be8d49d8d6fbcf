"""Small tools for tests: tasks that train in milliseconds, their batches, and a sink that keeps its records."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight.errors import ConfigError
from fnlight.metrics import Mean
from fnlight.state import Record, Task
from fnlight.tensors import isolated, seed_generators


@attrs.define
class RecordingSink:
    """A sink that keeps its records.

    Args:
        records: The records so far.
        flushed: How often it was flushed.
        closed: How often it was closed.

    Example:
        >>> sink = RecordingSink()
        >>> sink(Record(1, 0, {"train/loss": 0.5}))
        >>> sink.steps("train/loss")
        {1: 0.5}
    """

    records: list[Record] = attrs.field(factory=list)
    flushed: int = 0
    closed: int = 0

    def __call__(self, record: Record) -> None:
        """Take one record."""
        self.records.append(record)

    def steps(self, name: str) -> dict[int, Any]:
        """The values of one metric by step."""
        return {r.step: r.metrics[name] for r in self.records if name in r.metrics}

    def flush(self) -> None:
        """Count."""
        self.flushed += 1

    def close(self) -> None:
        """Count."""
        self.closed += 1

    def __repr__(self) -> str:
        return "RecordingSink()"


def tiny_task(kind: str = "mlp", seed: int = 0) -> Task:
    """A small task that trains in milliseconds, for tests.

    Args:
        kind: ``"mlp"`` (with BatchNorm and dropout), ``"convnet"``, or ``"tokens"`` (recurrent, a loss by tokens with padding).
        seed: Another seed gives other initial weights.

    Returns:
        A task with all four functions, trained by AdamW.

    Raises:
        ConfigError: If there is no such kind.

    Example:
        >>> from fnlight.state import TrainState
        >>> TrainState.create(tiny_task())
        TrainState(step=0, epoch=0, batch=0, 83 parameters, AdamW)
    """
    with isolated():
        seed_generators(seed)
        model = _kind(kind)[0]()
    return Task(
        model=model,
        train_step=_train_step,
        eval_step=_eval_step,
        predict_step=lambda model, batch: model(batch[0]),
        configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    )


def tiny_batches(kind: str = "mlp", num_batches: int = 3, batch_size: int = 6, seed: int = 0) -> list[Any]:
    """Batches for `tiny_task`, the same ones for the same arguments.

    Args:
        kind: Of which task.
        num_batches: How many.
        batch_size: Samples in each.
        seed: Another seed gives other data.

    Returns:
        A list of ``(x, y)``: y holds classes, shape [N], and for ``"tokens"`` the next tokens, shape [N, T], with 0 as padding.

    Raises:
        ConfigError: If there is no such kind.

    Example:
        >>> [x.shape for x, y in tiny_batches(num_batches=2)]
        [torch.Size([6, 4]), torch.Size([6, 4])]
    """
    generator = torch.Generator().manual_seed(seed)
    make = _kind(kind)[1]
    return [make(batch_size, generator) for _ in range(num_batches)]


def _train_step(model: nn.Module, batch: Any) -> Any:
    x, y = batch
    logits = model(x)
    if y.dim() == 1:
        return F.cross_entropy(logits, y), {"acc": (logits.argmax(-1) == y).float().mean()}
    held = y != 0
    loss = F.cross_entropy(
        logits.flatten(0, 1), y.flatten(), ignore_index=0, reduction="sum"
    )  # picking tokens would make shapes depend on values
    return Mean(loss, held.sum()), {"acc": Mean(((logits.argmax(-1) == y) & held).sum(), held.sum())}


def _eval_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    loss, metrics = _train_step(model, batch)
    count = len(batch[0])
    return (
        {"loss": loss, **metrics}
        if isinstance(loss, Mean)
        else {"loss": Mean(loss * count, count), "acc": Mean(metrics["acc"] * count, count)}
    )


class _Tokens(nn.Module):
    """A recurrent net that gives logits of the next token."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Embedding(8, 6)
        self.cell = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0])


def _flat(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 4, generator=generator)
    return x, x[:, :3].argmax(-1)


def _pictures(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return x, x.mean((1, 2, 3)).gt(0).long()


def _sentences(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each token is the one before it plus one; lengths differ."""
    first = torch.randint(0, 7, (size, 1), generator=generator)
    tokens = (first + torch.arange(6)) % 7 + 1
    lengths = torch.randint(2, 6, (size, 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:] * (torch.arange(5) < lengths)


_KINDS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], tuple[Tensor, Tensor]]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3)), _flat),
    "convnet": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), _pictures),
    "tokens": (_Tokens, _sentences),
}


def _kind(name: str) -> Any:
    if name not in _KINDS:
        raise ConfigError(f"there is no tiny task called {name!r}; there are {', '.join(_KINDS)}")
    return _KINDS[name]
