"""What fnlight costs on top of a loop written by hand.

    python tests/benchmarks/overhead.py              # the table
    python tests/benchmarks/overhead.py --blocks 30  # a quick look
    python tests/benchmarks/overhead.py --cpu        # CPU time, on a machine that others use

Both sides of a row do the same work: same data, model, optimizer and thread. They are timed in turns, a block of 50 steps each, so that
whatever else the machine does falls on both, and a block holds one log; the table gives medians over blocks, and the median of the
ratios of neighbouring blocks. Ratios are what to read: absolute times are those of one machine.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl

BATCH, BLOCK, EPOCH = 32, 50, 1000


def mlp() -> nn.Module:
    """The model of the comparison: 32-64-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss and nothing else."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the comparison, in its fused form on both sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def with_metrics(n: int) -> Callable[[nn.Module, Any], Any]:
    """A train_step that also returns n metrics, which cost nothing to compute."""

    def step(model: nn.Module, batch: Any) -> Any:
        loss = train_step(model, batch)
        value = loss.detach()
        return loss, {f"metric{i}": value for i in range(n)}

    return step


def plain(loader: Any) -> Iterator[None]:
    """The loop by hand."""
    model = mlp()
    optimizer = adamw(model)
    while True:
        for batch in loader:
            optimizer.zero_grad()
            train_step(model, batch).backward()
            optimizer.step()
            yield


def with_run(loader: Any) -> Iterator[Any]:
    """The generator, bare."""
    task = fl.Task(mlp(), train_step, configure_optimizers=adamw)
    return fl.run(fl.pipe(train_step, fl.grad(), fl.apply()), fl.TrainState.create(task), loader, donate=True)


def with_fit(loader: Any, folder: str, fn: Any = train_step) -> Iterator[Any]:
    """The very steps that `fit` takes, logging every 50 of them to a file."""
    task = fl.Task(mlp(), fn, configure_optimizers=adamw)
    config = fl.FitConfig(max_steps=10**9, progress=False, sinks=fl.JSONL(tempfile.mktemp(".jsonl", dir=folder)))
    return fl.run(fl.compose(task, config, loader), fl.TrainState.create(task), loader, donate=True)


Clock = Callable[[], float]
CLOCKS: dict[bool, Clock] = {False: time.perf_counter, True: time.process_time}


def timed(side: Iterator[Any], clock: Clock = time.perf_counter) -> float:
    """Seconds that a block takes."""
    start = clock()
    for _ in range(BLOCK):
        next(side)
    return clock() - start


def in_turns(blocks: int, *sides: Iterator[Any], clock: Clock = time.perf_counter) -> list[list[float]]:
    """Microseconds a step of every block of every side; the first blocks warm up and are thrown away."""
    found: list[list[float]] = [[] for _ in sides]
    for i in range(blocks + 4):
        order = range(len(sides)) if i % 2 else reversed(range(len(sides)))
        for k in order:
            seconds = timed(sides[k], clock)
            if i >= 4:
                found[k].append(seconds / BLOCK * 1e6)
    return found


def row(name: str, blocks: int, base: Iterator[Any], other: Iterator[Any], clock: Clock = time.perf_counter) -> str:
    """A row of the table."""
    a, b = in_turns(blocks, base, other, clock=clock)
    extra = statistics.median(y - x for x, y in zip(a, b, strict=True))
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    return f"| {name} | {statistics.median(a):.0f} | {statistics.median(b):.0f} | {extra:+.1f} | {ratio:.3f} |"


def each_metric(blocks: int, listed: list[Any], folder: str, clock: Clock = time.perf_counter) -> str:
    """What ten further metrics cost, by ten."""
    few, many = in_turns(blocks, with_fit(listed, folder, with_metrics(1)), with_fit(listed, folder, with_metrics(11)), clock=clock)
    extra = statistics.median(y - x for x, y in zip(few, many, strict=True)) / 10
    return f"Each further metric, averaged over every 50 steps and over the epoch: {extra:.2f} us a step."


def tiny_epoch(rounds: int) -> str:
    """An epoch of one batch with evaluation, checkpoint and JSONL, beyond the work itself."""
    batch = (torch.randn(BATCH, 32), torch.randint(0, 10, (BATCH,)))
    epochs = 20

    def eval_step(model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": train_step(model, batch)}

    def work() -> None:
        model = mlp()
        optimizer = adamw(model)
        for _ in range(epochs):
            optimizer.zero_grad()
            train_step(model, batch).backward()
            optimizer.step()
            with torch.no_grad():
                float(eval_step(model, batch)["loss"])

    def full() -> None:
        task = fl.Task(mlp(), train_step, eval_step, configure_optimizers=adamw)
        with tempfile.TemporaryDirectory() as folder:
            config = fl.FitConfig(max_epochs=epochs, progress=False, donate=True, dir=folder, sinks=fl.JSONL(f"{folder}/log.jsonl"))
            fl.fit(fl.TrainState.create(task), fl.Loaders([batch], [batch]), config)

    def seconds(fn: Callable[[], None]) -> float:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    extra = statistics.median(-seconds(work) + seconds(full) for _ in range(rounds)) / epochs
    return f"An epoch of one batch with evaluation, checkpoint (flushed to disk) and JSONL: {extra * 1e3:.1f} ms beyond the work itself."


def in_child(code: str, rounds: int) -> float:
    """The median of the number that a program prints last, each time in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as installed: compiled once

    def child() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout)

    child()
    return statistics.median(child() for _ in range(rounds))


def import_cost(rounds: int, clock: Clock) -> str:
    """What ``import fnlight`` takes after ``import torch``, in processes of their own."""
    name = clock.__name__
    code = f"import torch, time; start = time.{name}(); import fnlight; print((time.{name}() - start) * 1e3)"
    return f"`import fnlight` after `import torch`: {in_child(code, rounds):.0f} ms, without collections of garbage {in_child('import gc; gc.disable(); ' + code, rounds):.0f} ms."


def first_step(rounds: int, clock: Clock) -> str:
    """What it takes until one step is taken, in processes of their own; all has been imported."""
    start = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch, fnlight as fl; from overhead import *; "
        f"torch.set_num_threads(1); data = [(torch.randn(32, 32), torch.zeros(32, dtype=torch.int64))]; start = time.{clock.__name__}(); "
    )
    end = f"; print((time.{clock.__name__}() - start) * 1e3)"
    config = "fl.FitConfig(max_steps=1, progress=False)"
    hand = in_child(f"{start}next(plain(data)){end}", rounds)
    made = in_child(
        f"{start}fl.fit(fl.TrainState.create(fl.Task(mlp(), train_step, configure_optimizers=adamw)), data, {config}){end}", rounds
    )
    return f"From a model to its first step: {hand:.1f} ms by hand, {made:.1f} ms with `create` and `fit`."


def second_copies() -> str:
    """Whether ``fit`` makes a second copy of the state."""
    data, batch = nn.Linear(2000, 2000), [torch.randn(2, 2000)]
    task = fl.Task(data, lambda m, b: m(b).square().mean(), configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))

    def moved(donate: bool) -> bool:
        state = fl.fit(fl.TrainState.create(task), batch, fl.FitConfig(max_steps=1, progress=False))

        def places(state: fl.TrainState) -> set[int]:
            slots = [v for slot in state.opt_state.values() for v in slot.values()]
            return {t.untyped_storage().data_ptr() for t in (*state.params.values(), *slots)}

        before = places(state)
        return places(fl.fit(state, batch, fl.FitConfig(max_steps=2, progress=False, donate=donate))) != before

    says = {True: "in new memory", False: "in the same memory"}
    return f"Parameters and optimizer state after `fit` with `donate=True` are {says[moved(True)]}, without {says[moved(False)]}."


def main() -> None:
    """Print the table."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--blocks", type=int, default=200, help="blocks of 50 steps that each side of a row takes")
    args.add_argument("--cpu", action="store_true", help="count CPU time instead, for a machine that others use at the same time")
    blocks, clock = args.parse_args().blocks, CLOCKS[args.parse_args().cpu]
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(EPOCH * BATCH, 32), torch.randint(0, 10, (EPOCH * BATCH,)))
    listed = list(DataLoader(data, batch_size=BATCH))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread;")
    print(f"`python tests/benchmarks/{Path(__file__).name}`, {blocks} blocks of {BLOCK} steps a side, taken in turns\n")
    print("| MLP 32-64-10, batch 32, fused AdamW | plain, us a step | fnlight, us a step | difference, us | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for where, source in (("a list", listed), ("a DataLoader", loader)):
            print(row(f"`run` over {where}", blocks, plain(source), with_run(source), clock), flush=True)
            print(row(f"`fit` over {where}, JSONL every 50", blocks, plain(source), with_fit(source, folder), clock), flush=True)
        print(f"\n{each_metric(blocks, listed, folder, clock)}")
    print(tiny_epoch(11))
    print(import_cost(11, clock))
    print(first_step(11, clock))
    print(second_copies())


if __name__ == "__main__":
    main()
