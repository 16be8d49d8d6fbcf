"""What fnlight costs on top of a loop written by hand.

    python tests/benchmarks/overhead.py            # the table
    python tests/benchmarks/overhead.py --rounds 5 # a quick look

Each pair does the same work (same data, model, optimizer, number of steps) and is timed in turns, round by round, on one thread; the
table gives medians over rounds, differences a step and ratios. Ratios are what to read: absolute times are those of one machine.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl

BATCH, STEPS = 32, 3000


def mlp() -> nn.Module:
    """The model of the comparison: 32-64-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def train_step(model, batch):
    """A loss and nothing else."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def adamw(model):
    """The optimizer of the comparison; fnlight and the plain loop both use its fused form."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def with_metrics(n: int):
    """A train_step that also returns n metrics that cost nothing to compute."""

    def step(model, batch):
        loss = train_step(model, batch)
        value = loss.detach()
        return loss, {f"metric{i}": value for i in range(n)}

    return step


def plain(loader, epochs: int) -> None:
    """The loop by hand."""
    model = mlp()
    optimizer = adamw(model)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            train_step(model, batch).backward()
            optimizer.step()


def with_run(loader, epochs: int) -> None:
    """The generator, bare."""
    task = fl.Task(mlp(), train_step, configure_optimizers=adamw)
    step = fl.pipe(train_step, fl.grad(), fl.apply(), fl.stop_when(fl.max_epochs(epochs)))
    for _ in fl.run(step, fl.TrainState.create(task), loader, donate=True):
        pass


def with_fit(loader, epochs: int, fn=train_step, logged: bool = True) -> None:
    """The standard loop, logging every 50 steps to a file."""
    task = fl.Task(mlp(), fn, configure_optimizers=adamw)
    with tempfile.TemporaryDirectory() as folder:
        sinks = (fl.JSONL(f"{folder}/log.jsonl"),) if logged else ()
        fl.fit(fl.TrainState.create(task), loader, fl.FitConfig(max_epochs=epochs, progress=False, donate=True, sinks=sinks))


def interleaved(rounds: int, *sides: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> list[list[float]]:
    """Seconds of every side in every round, taken in turns; one round to warm up is thrown away."""
    found: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        for times, side in zip(found, sides, strict=True):
            start = clock()
            side()
            if i:
                times.append(clock() - start)
    return found


def against(name: str, rounds: int, base: Callable[[], None], other: Callable[[], None], steps: int) -> str:
    """A row: medians a step, their difference, and the median of the rounds' ratios."""
    a, b = interleaved(rounds, base, other)
    one, two = statistics.median(a) / steps * 1e6, statistics.median(b) / steps * 1e6
    extra = statistics.median(y - x for x, y in zip(a, b, strict=True)) / steps * 1e6
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    return f"| {name} | {one:.1f} | {two:.1f} | {extra:+.1f} | {ratio:.3f} |"


def tiny_epoch(rounds: int) -> str:
    """An epoch of one batch with evaluation, checkpoint and JSONL, beyond the work itself."""
    batch = (torch.randn(BATCH, 32), torch.randint(0, 10, (BATCH,)))
    epochs = 20

    def eval_step(model, batch):
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

    a, b = interleaved(rounds, work, full)
    extra = statistics.median(y - x for x, y in zip(a, b, strict=True)) / epochs * 1e3
    return f"An epoch of one batch with evaluation, checkpoint (flushed to disk) and JSONL: {extra:.2f} ms beyond the work itself."


def import_cost(rounds: int) -> str:
    """Seconds that ``import fnlight`` takes beyond ``import torch``, each in a process of its own."""

    def child(code: str) -> float:
        timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)

    extra = [child("import torch, fnlight") - child("import torch") for _ in range(rounds)]
    after = [float(x) for x in (child("import fnlight") for _ in range(1))]
    alone = subprocess.run(
        [sys.executable, "-c", "import torch, time; s = time.perf_counter(); import fnlight; print(time.perf_counter() - s)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return (
        f"`import fnlight` beyond `import torch`: {statistics.median(extra) * 1e3:.0f} ms (median of differences), "
        f"{float(alone.stdout) * 1e3:.0f} ms in one process after torch, {after[0] * 1e3:.0f} ms in all."
    )


def second_copies() -> str:
    """How many tensors of the state's size ``fit`` allocates with ``donate=True`` and without."""
    model = nn.Linear(2000, 2000)
    data = [torch.randn(2, 2000)]

    def fn(model, batch):
        return model(batch).square().mean()

    def grown(donate: bool) -> float:
        task = fl.Task(model, fn, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))
        state = fl.fit(fl.TrainState.create(task), data, fl.FitConfig(max_steps=1, progress=False))
        held = sum(t.numel() * t.element_size() for t in (*state.params.values(), *(v for s in state.opt_state.values() for v in s.values())))
        storages = {state.params["weight"].untyped_storage().data_ptr()}
        again = fl.fit(state, data, attrs.evolve(fl.FitConfig(max_steps=2, progress=False), donate=donate))
        new = again.params["weight"].untyped_storage().data_ptr() not in storages
        return held / 2**20 if new else 0.0

    return f"Second copy of parameters and optimizer state: {grown(True):.0f} MiB with `donate=True`, {grown(False):.0f} MiB without."


def main() -> None:
    """Print the table."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--cpu", action="store_true", help="count the process's CPU time rather than the wall's")
    given = args.parse_args()
    torch.set_num_threads(1)
    if given.cpu:
        interleaved.__kwdefaults__["clock"] = time.process_time
    data = TensorDataset(torch.randn(STEPS * BATCH, 32), torch.randint(0, 10, (STEPS * BATCH,)))
    listed = list(DataLoader(data, batch_size=BATCH))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}, one thread")
    print(f"`python {Path(__file__).relative_to(Path(__file__).parents[2])}`: {given.rounds} rounds of {STEPS} steps, taken in turns\n")
    print("| MLP 32-64-10, batch 32, fused AdamW | plain, us a step | fnlight, us a step | difference | ratio |\n|---|---|---|---|---|")
    for where, source in (("list", listed), ("DataLoader", loader)):
        base = lambda source=source: plain(source, 1)  # noqa: E731  # one line a side
        print(against(f"`run` over a {where}", given.rounds, base, lambda source=source: with_run(source, 1), STEPS), flush=True)
        print(against(f"`fit` over a {where}, JSONL every 50", given.rounds, base, lambda source=source: with_fit(source, 1), STEPS), flush=True)
    few, many = with_metrics(1), with_metrics(11)
    a, b = interleaved(given.rounds, lambda: with_fit(listed, 1, few), lambda: with_fit(listed, 1, many))
    each = statistics.median(y - x for x, y in zip(a, b, strict=True)) / STEPS / 10 * 1e6
    print(f"\nEach further metric, logged every 50 steps and averaged over the epoch: {each:.2f} us a step.")
    print(tiny_epoch(given.rounds))
    print(import_cost(max(3, given.rounds // 3)))
    print(second_copies())


if __name__ == "__main__":
    main()
