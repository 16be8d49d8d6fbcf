"""What the tests of checkpoints share: small tasks with every kind of state, and how to compare and to damage files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight.checkpoint import manifest
from fnlight.gradients import grad
from fnlight.metrics import Mean, Tally
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply, ema, pure, update
from fnlight.tensors import differences


class Net(nn.Module):
    """Tied weights, a frozen part, a scalar parameter, and buffers in and out of the state_dict."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(0), persistent=False)
        self.register_buffer("mask", torch.ones(1, 4, dtype=torch.bool).expand(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next token."""
        if self.training:
            self.seen = self.seen + len(x)
        return self.head(self.scale * self.norm(self.frozen(self.embed(x))))


def train_step(model: nn.Module, batch: Tensor) -> Any:
    """Cross entropy of predicting a token from the one before."""
    logits = model(batch[:-1])
    return F.cross_entropy(logits, batch[1:]), {"acc": (logits.argmax(-1) == batch[1:]).float().mean()}


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of most tests, in two groups."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trainable[:2]}, {"params": trainable[2:], "weight_decay": 0.0}], **{"lr": 0.05, **options})


def make_task(configure: Callable[[Any], Any] | None = adamw, module: nn.Module | None = None) -> Task:
    """A task whose model is the same each time."""
    torch.manual_seed(3)
    return Task(Net() if module is None else module, train_step, configure_optimizers=configure)


def tokens(seed: int) -> Tensor:
    """A batch of tokens."""
    return torch.randint(6, (9,), generator=torch.Generator().manual_seed(seed))


def trained(steps: int = 2, task: Task | None = None, seed: int = 5) -> TrainState:
    """A state with all that a run leaves in it: memory, history, counts."""
    state = TrainState.create(make_task() if task is None else task, seed=seed)
    for i in range(steps):
        state, _ = update(state, tokens(i))
        state = state.recorded({"val/loss": 1.0 / (i + 1), "val/odd": float("nan")})
    tally = Tally()
    tally.add(steps, {"loss": torch.tensor(0.1), "n": Mean(torch.tensor(6.0), 3)})
    state.store.memory |= {
        "ema": {name: p.detach().clone() for name, p in state.store.module.named_parameters()},
        "window": tally,
        "checkpoint_every": {"saved": [1, 2]},
        "odd": {0.5: (1, None, True), "x": [float("inf"), -0.0, {"$": "text"}], "b": b"\x00\xff"},
    }
    return state


def advance(state: TrainState, batch: Tensor) -> TrainState:
    """The state after one more step, with its average."""
    return pure(pipe(state.task.train_step, grad(), apply(), ema(0.9)))(state, batch)[0]


def content(state: TrainState) -> dict[str, Any]:
    """All that a state is, as a tree that can be compared."""
    store = state.copy().store
    optimizer = store.optim.optimizer
    groups = [] if optimizer is None else [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {
        "params": dict(state.params),
        "buffers": dict(state.buffers),
        "slots": {name: dict(slots) for name, slots in state.opt_state.items()},
        "groups": groups,
        "memory": store.memory,
        "progress": attrs.asdict(state.progress),
        "rest": (state.seed, state.stopped, tuple(state.history)),
    }


def unlike(a: TrainState, b: TrainState) -> list[str]:
    """Where two states differ, bit by bit."""
    return list(differences(content(a), content(b)))


def files(path: str | Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes, hidden ones too."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def forge(path: str | Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a checkpoint as a stranger could, its digest included."""
    file = Path(path) / "state.json"
    body = manifest.parse(file.read_bytes())
    for key in ("format", "digest"):
        del body[key]
    changed = copy.deepcopy(body)
    change(changed)
    file.write_bytes(manifest.render(changed))


def forge_bytes(path: str | Path, text: Callable[[str], str]) -> None:
    """Change the text of a manifest, its digest included."""
    file = Path(path) / "state.json"
    rest = text(file.read_text(encoding="ascii").partition("\n")[2]).encode()
    file.write_bytes(f'{{"format": {manifest.FORMAT}, "digest": {json.dumps(manifest.digest_of(rest))},\n'.encode() + rest)
