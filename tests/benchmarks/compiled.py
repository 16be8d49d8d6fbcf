"""What a compiled step is worth, against the best eager loop by hand and against a loop whose model is compiled.

    python tests/benchmarks/compiled.py                    # every row
    python tests/benchmarks/compiled.py mlp --blocks 60    # one of them: mlp, gpt, convnet
    python tests/benchmarks/compiled.py --write            # and the tables of docs/benchmarks.md are written anew

All sides of a row do the same work in one thread and are timed in turns; the table gives medians of a block, and the median of the
ratios of neighbouring blocks. What is measured is the processor time of the process, so that others on the machine disturb it little.
Compiling takes some minutes before the first figure.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import fnlight as fl


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(size, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(size, length, width)
        x = x + self.out(attended)
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Four layers, 128 wide, a context of 64 characters."""

    def __init__(self, symbols: int = 96, width: int = 128, context: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.symbols(x) + self.places(torch.arange(x.shape[1])))))


def mlp() -> nn.Module:
    """32-64-10."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def convnet() -> nn.Module:
    """Two convolutions with BatchNorm, on pictures of 32x32."""
    first = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64 * 64, 10))


def pictures(shape: tuple[int, ...]) -> Callable[[], Any]:
    """A batch of 32 with a class each."""
    return lambda: (torch.randn(32, *shape), torch.randint(0, 10, (32,)))


def characters() -> Any:
    """A batch of 16 texts of 64 characters."""
    return torch.randint(0, 96, (16, 64)), torch.randint(0, 96, (16, 64))


def train_step(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy, of a picture or of every character."""
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused on the eager sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


@attrs.frozen
class Work:
    """A row: its model, its batches, and how many steps a block has."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    block: int
    unrolls: tuple[int, ...] = ()


WORKS = {
    "mlp": Work("MLP 32-64-10, batch 32", mlp, pictures((32,)), 96, (4, 8, 16)),
    "convnet": Work("convnet 32x32, batch 32", convnet, pictures((3, 32, 32)), 4, (4,)),
    "gpt": Work("GPT, 4 layers, 128 wide, context 64, batch 16", GPT, characters, 2),
}


def plain(work: Work, data: list[Any], compiled: bool) -> Iterator[int]:
    """The loop by hand; says after how many updates it yields."""
    torch.manual_seed(0)
    model = work.model()
    optimizer = adamw(model)
    called = torch.compile(model) if compiled else model
    while True:
        for batch in data:
            optimizer.zero_grad()
            train_step(called, batch).backward()
            optimizer.step()
            yield 1


def ours(work: Work, data: list[Any], level: str | None, unroll: int = 1) -> Iterator[int]:
    """`run` with a compiled step."""
    torch.manual_seed(0)
    parts = [] if level is None else [fl.compile(level, unroll=unroll)]
    step = fl.pipe(train_step, fl.grad(), fl.apply(), *parts)
    state = fl.TrainState.create(fl.Task(work.model(), train_step, configure_optimizers=adamw))
    before = 0
    for state, _ in fl.run(step, state, data, donate=True):
        yield state.progress.step - before
        before = state.progress.step


def timed(side: Iterator[int], steps: int) -> float:
    """Microseconds of processor time an update."""
    done, start = 0, time.process_time()
    while done < steps:
        done += next(side)
    return (time.process_time() - start) / done * 1e6


def table(work: Work, blocks: int) -> str:
    """All sides of one row, in turns."""
    data = [work.batch() for _ in range(16 * 12)] if work.block > 50 else [work.batch() for _ in range(16)]
    sides: dict[str, Iterator[int]] = {
        "plain loop": plain(work, data, compiled=False),
        "plain loop, `torch.compile(model)`": plain(work, data, compiled=True),
        "`run`": ours(work, data, None),
        '`run`, `compile("trace")`': ours(work, data, "trace"),
        '`run`, `compile("step")`': ours(work, data, "step"),
    }
    sides |= {f'`run`, `compile("step", unroll={n})`': ours(work, data, "step", n) for n in work.unrolls}
    latency = {}
    for name, side in sides.items():
        start = time.perf_counter()
        next(side), next(side)  # the first makes the optimizer's memory, the second the graph
        latency[name] = time.perf_counter() - start
        timed(side, work.block)
        print(f"{work.name}: {name}: {latency[name]:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(blocks):
        for name in sides if i % 2 else reversed(sides):
            found[name].append(timed(sides[name], work.block))
    lines = [f"| {work.name} | us an update | times as fast as the plain loop | first two calls, s |", "|---|---|---|---|"]
    for name, values in found.items():
        ratio = statistics.median(base / value for base, value in zip(found["plain loop"], values, strict=True))
        lines.append(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} | {latency[name]:.1f} |")
    return "\n".join(lines)


PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def write(name: str, text: str) -> None:
    """Put a table between its marks in the page of benchmarks."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- compiled {name} -->\n")
    after = rest.partition(f"<!-- /compiled {name} -->")
    if not mark or not after[1]:
        raise SystemExit(f"{PAGE.name} has no place for {name}: it needs the marks <!-- compiled {name} --> and <!-- /compiled {name} -->")
    PAGE.write_text(before + mark + text + "\n" + "".join(after[1:]), encoding="utf-8")


def main() -> None:
    """Print the tables."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("works", nargs="*", choices=[*WORKS, []], help="rows; all if left out")
    args.add_argument("--blocks", type=int, default=40, help="blocks that each side of a row takes")
    args.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    given = args.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread; {given.blocks} blocks in turns"
    )
    for name in given.works or WORKS:
        text = table(WORKS[name], given.blocks)
        print("\n" + text, flush=True)
        if given.write:
            machine = f"torch {torch.__version__}, {platform.machine()}, one thread, {given.blocks} blocks of {WORKS[name].block} updates in turns:"
            write(name, f"{machine}\n\n{text}")


if __name__ == "__main__":
    main()
