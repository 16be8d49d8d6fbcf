"""How the cost of fnlight grows: with parameters, tensors, metrics, the length of an epoch, the history, and the place where a run begins.

    python tests/benchmarks/size.py          # the tables
    python tests/benchmarks/size.py --cpu    # CPU time, on a machine that others use
    python tests/benchmarks/size.py --small  # without the rows that take gigabytes

As in overhead.py, both sides do the same work and are timed in turns; a figure is a median. The largest models are trained in processes of
their own, of which the fastest of three counts.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.data import Source

sys.path.insert(0, str(Path(__file__).parent))

from overhead import BATCH, CLOCKS, Clock, adamw, mlp, train_step, with_metrics


class Bag(nn.Module):
    """So many tensors of so many parameters, with a loss that costs next to nothing."""

    def __init__(self, tensors: int, each: int) -> None:
        nn.Module.__init__(self)
        self.held = nn.ParameterList([torch.zeros(each) for _ in range(tensors)])


def total(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss whose gradient is one everywhere."""
    held: Any = model.get_submodule("held")
    return torch.stack([p.sum() for p in held]).sum()


def plain(model: nn.Module, fn: Any, data: list[Any]) -> Iterator[None]:
    """The loop by hand."""
    optimizer = adamw(model)
    while True:
        for batch in data:
            optimizer.zero_grad()
            fn(model, batch).backward()
            optimizer.step()
            yield


def ours(model: nn.Module, fn: Any, data: list[Any], folder: str) -> Iterator[Any]:
    """The steps of `fit`, with a log every 50 of them."""
    task = fl.Task(model, fn, configure_optimizers=adamw)
    config = fl.FitConfig(max_steps=10**9, progress=False, sinks=fl.JSONL(tempfile.mktemp(".jsonl", dir=folder)))
    return fl.run(fl.compose(task, config, data), fl.TrainState.create(task), data, donate=True)


def in_turns(sides: list[Iterator[Any]], steps: int, rounds: int, clock: Clock) -> list[float]:
    """Microseconds a step of each side."""
    found: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        for k in range(len(sides)) if i % 2 else reversed(range(len(sides))):
            start = clock()
            for _ in islice(sides[k], steps):
                pass
            if i:
                found[k].append((clock() - start) / steps * 1e6)
    return [statistics.median(each) for each in found]


def models(small: bool, folder: str, clock: Clock) -> Iterator[str]:
    """Rows of parameters, then of tensors."""
    yield "| parameters | tensors | by hand, us a step | fnlight, us a step | difference, us | ratio |\n|---|---|---|---|---|---|"
    for tensors, each in ((10, 10**2), (10, 10**4), (10, 10**6), (10, 10**7), (100, 100), (1000, 100), (3000, 100)):
        if small and tensors * each > 10**7:
            continue
        data = [torch.zeros(1)] * 1000
        if each >= 10**6:
            hand, made = apart(tensors, each, clock)
        else:
            sides = [plain(Bag(tensors, each), total, data), ours(Bag(tensors, each), total, data, folder)]
            hand, made = in_turns(sides, 3 if tensors > 500 else 100, 10, clock)
        yield f"| {tensors * each:,} | {tensors:,} | {hand:,.0f} | {made:,.0f} | {made - hand:+,.0f} | {made / hand:.3f} |"


def apart(tensors: int, each: int, clock: Clock) -> list[float]:
    """The same with each side in processes of its own: large blocks of memory of one would come in the way of the other's."""
    found: list[list[float]] = [[], []]
    for _ in range(3):
        for k, side in enumerate(("plain", "ours")):
            command = [sys.executable, __file__, "--child", side, str(tensors), str(each), *(["--cpu"] if clock is CLOCKS[True] else [])]
            found[k].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return [min(each) for each in found]


def child(side: str, tensors: int, each: int, folder: str, clock: Clock) -> None:
    """Print what a step of one side takes."""
    model, data = Bag(tensors, each), [torch.zeros(1)] * 1000
    print(in_turns([plain(model, total, data) if side == "plain" else ours(model, total, data, folder)], 3, 10, clock)[0])


def metrics(folder: str, clock: Clock) -> Iterator[str]:
    """Rows of metrics."""
    yield "\n| metrics of a step | us a step | us a metric |\n|---|---|---|"
    data = [(torch.randn(BATCH, 32), torch.randint(0, 10, (BATCH,)))] * 1000
    numbers = (0, 1, 10, 20, 50)
    found = in_turns([ours(mlp(), with_metrics(n), data, folder) for n in numbers], 100, 15, clock)
    for n, us in zip(numbers, found, strict=True):
        yield f"| {n} | {us:.0f} | {f'{(us - found[0]) / n:.2f}' if n else ''} |"


def lengths(folder: str, clock: Clock) -> Iterator[str]:
    """Rows of epochs of so many batches."""
    yield "\n| batches an epoch | us a step |\n|---|---|"
    batch = (torch.randn(BATCH, 32), torch.randint(0, 10, (BATCH,)))
    numbers = (1, 10, 100, 1000, 10**5)
    for n, us in zip(numbers, in_turns([ours(mlp(), train_step, [batch] * n, folder) for n in numbers], 500, 7, clock), strict=True):
        yield f"| {n:,} | {us:.0f} |"


def histories(clock: Clock) -> Iterator[str]:
    """Rows of records that a history holds already."""
    yield "\n| records | us a step | ms a further record, with a rule that reads them all |\n|---|---|---|"
    batch = (torch.randn(BATCH, 32), torch.randint(0, 10, (BATCH,)))
    task = fl.Task(mlp(), train_step, configure_optimizers=adamw)
    numbers, states, sides = (0, 10**3, 10**4, 10**5), list[Any](), list[Iterator[Any]]()
    for n in numbers:
        state = fl.TrainState.create(task)
        history = type(state.history)(fl.state.Record(i + 1, i + 1, {"val/loss": 1.0, "val/acc": 0.5}) for i in range(n))
        states.append(attrs.evolve(state, history=history, progress=attrs.evolve(state.progress, step=n, epoch=n)))
        evaluation = fl.evaluate_every([batch], fl.steps(10**9), eval_step=lambda model, batch: {"loss": train_step(model, batch)})
        rule = fl.stop_when(fl.patience("val/loss", 10**9) | fl.max_steps(10**9))  # one for each: it remembers the last history
        step = fl.pipe(train_step, fl.grad(), fl.apply(), fl.check_finite(), evaluation, fl.epoch_means(), rule)
        sides.append(fl.run(step, states[-1], [batch] * 10**6))
    for n, us, state in zip(numbers, in_turns(sides, 100, 15, clock), states, strict=True):
        spent, patience = list[float](), fl.patience("val/loss", 10**9)
        for _ in range(5):
            start = clock()
            patience(state.recorded({"val/loss": 1.0, "val/acc": 0.5}))
            spent.append(clock() - start)
        yield f"| {n:,} | {us:.0f} | {statistics.median(spent) * 1e3:.2f} |"


def places() -> Iterator[str]:
    """Rows of places at which a run begins."""
    n = 10**7 + 10
    rows = torch.zeros(n, 1, dtype=torch.int8)
    loaders = {
        "a list": [rows[:1]] * n,
        "`TensorLoader`": fl.TensorLoader(rows, batch_size=1),
        "`TensorLoader(shuffle=True)`": fl.TensorLoader(rows, batch_size=1, shuffle=True),
        "`DataLoader`": DataLoader(TensorDataset(rows), batch_size=1),
        "`DataLoader(shuffle=True)`": DataLoader(TensorDataset(rows), batch_size=1, shuffle=True),
    }
    yield "\n| ms to the first batch, of 10,000,010 | at batch 0 | at batch 1,000 | at batch 10,000,000 |\n|---|---|---|---|"
    for name, loader in loaders.items():
        source, found = Source(loader), list[str]()
        for start in (0, 1000, 10**7):
            spent = []
            for _ in range(5):
                begin = time.perf_counter()
                next(iter(source.epoch(0, 0, start)))
                spent.append(time.perf_counter() - begin)
            found.append(f"{statistics.median(spent) * 1e3:.1f}")
        yield f"| {name} | {' | '.join(found)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="count CPU time instead, for a machine that others use at the same time")
    parser.add_argument("--small", action="store_true", help="leave out what takes gigabytes of memory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clock = CLOCKS[given.cpu]
        if given.child is not None:
            child(given.child[0], int(given.child[1]), int(given.child[2]), folder, clock)
            return
        for rows in (models(given.small, folder, clock), metrics(folder, clock), lengths(folder, clock), histories(clock), places()):
            for line in rows:
                print(line, flush=True)


if __name__ == "__main__":
    main()
