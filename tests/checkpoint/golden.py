"""Checkpoints that older versions wrote, kept as text in ``tests/assets/format-N``, and what became of them.

As a program it writes those of the present format: ``python -m tests.checkpoint.golden``. What is there of a released format is never
written again.
"""

import base64
import hashlib
import json
import platform
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.checkpoint.migrations import FORMAT
from fnlight.tensors import leaves
from tests.checkpoint.parted import save_in_parts

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def data() -> tuple[Tensor, Tensor]:
    """Numbers that no generator is needed for."""
    x = torch.arange(26 * 3).remainder(11).reshape(26, 3) / 7 - 0.7
    return x, (x.sum(1) > 0).long()


class Counting:
    """A loader that keeps its own place."""

    def __init__(self) -> None:
        self.begin = self.place = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        x, y = data()
        self.place, self.begin = self.begin, 0
        while self.place < len(self):
            self.place += 1
            yield x[self.place :: 5], y[self.place :: 5]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.begin = self.place = saved["place"]


def shuffled(batch_size: int = 4) -> DataLoader:
    """Batches in keyed order."""
    return DataLoader(TensorDataset(*data()), batch_size=batch_size, shuffle=True)


def train_step(model: nn.Module, batch: Any) -> Any:
    """Cross entropy, and how many were right."""
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"acc": (logits.argmax(-1) == y).float().mean()}


def eval_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The same as metrics."""
    loss, metrics = train_step(model, batch)
    return {"loss": loss, **metrics}


def model(*middle: nn.Module) -> nn.Module:
    """A small network whose weights no generator is needed for."""
    net = nn.Sequential(nn.Linear(3, 6), *middle, nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-0.5, 0.6, p.numel()).sin().reshape(p.shape))
    return net


def adamw(net: nn.Module) -> fl.Optim:
    """Two groups and a schedule."""
    groups = [{"params": net[0].parameters()}, {"params": net[1:].parameters(), "weight_decay": 0.0}]  # pyright: ignore[reportIndexIssue]
    return fl.Optim(torch.optim.AdamW(groups, lr=0.05), schedule=fl.warmup_cosine(warmup=4, total=40))


def body_and_head(net: nn.Module) -> dict[str, Any]:
    """Two optimizers: AdamW with two groups and a schedule, and SGD with momentum for the last layer."""
    parts: Any = net
    groups = [{"params": parts[0].parameters()}, {"params": parts[1:-1].parameters(), "weight_decay": 0.0, "lr": 0.02}]
    return {
        "body": fl.Optim(torch.optim.AdamW(groups, lr=0.05), schedule=fl.warmup_cosine(warmup=4, total=40)),
        "head": torch.optim.SGD(parts[-1].parameters(), lr=0.1, momentum=0.9),
    }


def momentum(net: nn.Module) -> Any:
    """One slot a parameter."""
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def lbfgs(net: nn.Module) -> Any:
    """Numbers, lists and tensors under one parameter."""
    return torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, history_size=4)


@attrs.frozen
class Case:
    """A run, and where it was saved.

    Args:
        model: Makes the model.
        configure: Its `configure_optimizers`.
        loader: Makes the training data.
        saved: Steps after which it was saved.
        total: Steps after which it ended.
        draws: Whether what it computes depends on the generator of the machine.
        unsure: Parameters whose gradients are rounding errors alone, which AdamW makes as large as any other.
        train_step: Its `train_step`: one loss, or a loss for each optimizer.
        since: The first format that there is a checkpoint of.
    """

    model: Callable[[], nn.Module]
    configure: Callable[[Any], Any]
    loader: Callable[[], Any]
    saved: int
    total: int
    draws: bool = False
    unsure: frozenset[str] = frozenset()
    train_step: Any = train_step
    since: int = 1

    def task(self) -> fl.Task:
        """The task."""
        return fl.Task(self.model(), self.train_step, eval_step, configure_optimizers=self.configure)

    def on(self, state: fl.TrainState, steps: int) -> fl.TrainState:
        """The state after so many steps more."""
        pipe = fl.pipe(
            self.train_step, fl.grad(), fl.apply(), fl.ema(0.9), fl.evaluate_every([data()], every=fl.steps(3)), fl.log_to(ignore, every=fl.steps(50))
        )  # fmt: skip
        return list(islice(fl.run(pipe, state, self.loader()), steps))[-1][0]


def ignore(_: Any) -> None:
    """A sink: what is logged lies in the memory until it is due."""


CASES = {
    "norm, dropout, schedule": Case(
        lambda: model(nn.BatchNorm1d(6), nn.Dropout(0.25)), adamw, shuffled, 9, 20, draws=True, unsure=frozenset({"0.bias"})
    ),
    "momentum": Case(model, momentum, shuffled, 5, 12),
    "nested memory": Case(model, lbfgs, shuffled, 4, 8),
    "own position": Case(model, momentum, Counting, 3, 8),
    "two optimizers": Case(
        lambda: model(nn.BatchNorm1d(6), nn.Dropout(0.25)), body_and_head, shuffled, 10, 20, draws=True, unsure=frozenset({"0.bias"}),
        train_step={"body": train_step, "head": fl.Phase(train_step, fl.clip_norm(0.5), every=fl.steps(2))}, since=3,
    ),
}  # fmt: skip


def held(state: fl.TrainState) -> dict[str, Any]:
    """Every value of a state with its name; of tensors the digest."""
    parts = ("params", "buffers", "opt_state", "memory")
    tree = {part: dict(getattr(state.copy(), part)) for part in parts} | {"progress": attrs.asdict(state.progress), "seed": state.seed}
    tree["history"] = {f"{r.step} {r.epoch}": dict(r.metrics) for r in state.history}
    return {path: said(leaf) for path, leaf in leaves(tree) if "/_" not in path}


def said(leaf: Any) -> Any:
    """A value as JSON keeps it."""
    if isinstance(leaf, Tensor):
        array: Any = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{leaf.dtype} {list(leaf.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return repr(leaf)


def values(state: fl.TrainState) -> dict[str, list[float]]:
    """The parameters as numbers that JSON keeps exactly."""
    return {name: p.double().reshape(-1).tolist() for name, p in state.params.items()}


def machine() -> dict[str, str]:
    """What results may depend on in their last bits."""
    return {"torch": torch.__version__, "kernels": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}


def plain() -> dict[str, list[float]]:
    """Where "own position" ends in a loop of torch alone, which tells whether this machine rounds as that of a record did."""
    net, case = model(), CASES["own position"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in islice(chain(Counting(), Counting()), case.total):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return {name: p.detach().double().reshape(-1).tolist() for name, p in net.named_parameters()}


def draw() -> str:
    """What the generator of this machine makes of a seed, as dropout sees it."""
    with fl.tensors.isolated():
        torch.manual_seed(11)
        return said(F.dropout(torch.ones(64), 0.25))


IN_PARTS = "norm, dropout, schedule, in parts"
"""The name of a checkpoint that several ranks have written, of the case that it begins with."""


def case_of(name: str) -> Case:
    """The case of a kept checkpoint."""
    return CASES[name.removesuffix(", in parts")]


def written(case: Case, save: Callable[[fl.TrainState, str], Any] = fl.save) -> dict[str, Any]:
    """A checkpoint of a case, and what becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        half = case.on(fl.TrainState.create(case.task(), seed=7), case.saved)
        path = Path(save(half, f"{folder}/a"))
        files = {p.name: base64.b85encode(zlib.compress(p.read_bytes(), 9)).decode("ascii") for p in sorted(path.iterdir())}
    end = case.on(half.copy(), case.total - case.saved)
    return {
        "files": files,
        "saved": held(half),
        "end": values(end),
        "ended": held(end),
        "machine": machine(),
        "plain": plain(),
        "draw": draw(),
    }


def unpacked(golden: Mapping[str, Any], folder: Path) -> Path:
    """The files of a kept checkpoint, in a folder."""
    folder.mkdir()
    for name, text in golden["files"].items():
        (folder / name).write_bytes(zlib.decompress(base64.b85decode(text)))
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    home = ASSETS / f"format-{FORMAT}"
    home.mkdir(parents=True, exist_ok=True)
    for name in (*CASES, IN_PARTS):
        target = home / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        target.write_text(
            json.dumps({"case": name, **written(case_of(name), save_in_parts if name == IN_PARTS else fl.save)}, indent=1) + "\n",
            encoding="ascii",
        )
        print(f"{target.name}: {target.stat().st_size:,} bytes")
