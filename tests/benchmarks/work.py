"""What `fit` costs on real work: the same training as a loop by hand, with the log and the metric that people turn on.

    python tests/benchmarks/work.py                    # the table
    python tests/benchmarks/work.py --cpu --blocks 10  # processor time, where others use the machine; a quicker look
    python tests/benchmarks/work.py --fashion FOLDER   # where Debian's dataset-fashion-mnist is unpacked, if it is not installed

Both sides read the same batches in the same order, measure accuracy and log every 50 steps: by hand into a list, with fnlight as exact means
into a JSONL file. They are timed in turns. At the end, all weights of both sides must be bitwise the same.
"""

import argparse
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

import fnlight as fl
from tests.benchmarks.compiled import GPT
from tests.benchmarks.tables import header, write_section

DOCS = Path(__file__).parents[2] / "docs"
EVERY = 50


def train_step(model: nn.Module, batch: Any) -> Any:
    """Cross entropy and accuracy, of a picture or of every character."""
    x, y = batch
    logits = model(x).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten()), {"acc": (logits.argmax(-1) == y.flatten()).float().mean()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """In its fused form on both sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def block(num_in: int, num_out: int, stride: int = 1) -> nn.Sequential:
    """A convolution, its norm and a nonlinearity."""
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            block(num_in, num_out, stride), nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        )
        self.outer = nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x) + self.outer(x))


def resnet() -> nn.Module:
    """A stem, four residual blocks and a head, for pictures of 32x32."""
    parts = [Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2), Residual(128, 128, 1)]
    return nn.Sequential(block(3, 32), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def convnet() -> nn.Module:
    """The model of examples/digits.py, without dropout."""
    parts = [block(1, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 10))


def mlp() -> nn.Module:
    """784-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def digits() -> TensorDataset:
    """1,797 real handwritten digits, 8x8."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return TensorDataset(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target))


def fashion(folder: str) -> TensorDataset | None:
    """60,000 pictures of clothes, 28x28; None where they are not there."""
    images, labels = (Path(folder, f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if not images.exists():
        return None
    x, y = (np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8) for path in (images, labels))
    x, y = x[16:].reshape(-1, 28, 28), y[8:]
    return TensorDataset(torch.from_numpy(x.copy()).float() / 255, torch.from_numpy(y.copy()).long())


def characters() -> TensorDataset:
    """The text of this documentation, in pieces of 64 characters and the character behind each."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    codes = torch.tensor([min(max(ord(c) - 32, 0), 95) for c in text])
    pieces = codes[: (len(codes) - 1) // 64 * 64 + 1]
    return TensorDataset(pieces[:-1].view(-1, 64), pieces[1:].view(-1, 64))


def noise() -> TensorDataset:
    """Random pictures of 32x32."""
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(1024, 3, 32, 32, generator=g), torch.randint(0, 10, (1024,), generator=g))


@attrs.frozen
class Work:
    """A row: its model, its data, and how many steps a block has."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], TensorDataset | None]
    batch: int
    block: int


def works(folder: str) -> list[Work]:
    """All rows."""
    return [
        Work("Fashion-MNIST, MLP 784-128-10, batch 32", mlp, lambda: fashion(folder), 32, 200),
        Work("handwritten digits, four convolutions, batch 64", convnet, digits, 64, 20),
        Work("characters, transformer of 4 layers, 128 wide, context 64, batch 16", GPT, characters, 16, 6),
        Work("random 32x32, ResNet of 9 convolutions, batch 32", resnet, noise, 32, 6),
    ]


def made(work: Work) -> nn.Module:
    """The model of both sides."""
    torch.manual_seed(0)
    return work.model()


def by_hand(model: nn.Module, loader: Any) -> Iterator[None]:
    """The loop by hand."""
    optimizer, log, kept, step = adamw(model), [], [], 0
    while True:
        for batch in loader:
            optimizer.zero_grad()
            loss, metrics = train_step(model, batch)
            loss.backward()
            optimizer.step()
            step += 1
            kept.append(torch.stack([loss.detach(), metrics["acc"]]))
            if step % EVERY == 0:
                log.append(torch.stack(kept).mean(0).tolist())
                kept.clear()
            yield


def with_fit(state: fl.TrainState, loader: Any, folder: str) -> Iterator[Any]:
    """The very steps that `fit` takes."""
    sink = fl.JSONL(tempfile.mktemp(".jsonl", dir=folder))
    config = fl.FitConfig(max_steps=10**9, progress=False, sinks=sink, log_every=fl.steps(EVERY))
    return fl.run(fl.compose(state.task, config, loader), state, loader, donate=True)


def timed(side: Iterator[Any], steps: int, clock: Callable[[], float]) -> float:
    """Milliseconds a step."""
    start = clock()
    for _ in range(steps):
        next(side)
    return (clock() - start) / steps * 1e3


def row(work: Work, blocks: int, folder: str, clock: Callable[[], float]) -> str:
    """Both sides of one row, in turns."""
    data = work.data()
    if data is None:
        return f"| {work.name} | its data is not installed | | |"
    loader = DataLoader(data, batch_size=work.batch, drop_last=True)
    model = made(work)
    state = fl.TrainState.create(fl.Task(made(work), train_step, configure_optimizers=adamw))
    sides = [by_hand(model, loader), with_fit(state, loader, folder)]
    found: list[list[float]] = [[], []]
    for i in range(blocks + 2):
        for k in (0, 1) if i % 2 else (1, 0):
            found[k].append(timed(sides[k], work.block, clock))
    for name, p in state.store.module.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), f"{work.name}: both sides must train the same, but {name} differs"
    hand, ours = (times[2:] for times in found)
    ratio = statistics.median(b / a for a, b in zip(hand, ours, strict=True))
    return f"| {work.name} | {statistics.median(hand):.2f} | {statistics.median(ours):.2f} | {ratio:.3f} |"


def main() -> None:
    """Print the table, and write it where asked."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--blocks", type=int, default=40, help="blocks that each side of a row takes")
    options.add_argument("--cpu", action="store_true", help="count processor time, where others use the machine")
    options.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = options.parse_args()
    torch.set_num_threads(1)
    what = "processor time, as others used the machine" if given.cpu else "wall time"
    lines = [
        f"{header()}; `python tests/benchmarks/work.py{' --cpu' if given.cpu else ''}`: {what}, {given.blocks} blocks a side, taken in turns.",
        "",
    ]
    lines += ["| | by hand, ms a step | `fit`, ms a step | ratio |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for work in works(given.fashion):
            lines.append(row(work, given.blocks, folder, time.process_time if given.cpu else time.perf_counter))
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if given.write:
        write_section("work", "\n".join(lines))


if __name__ == "__main__":
    main()
