"""Peak memory of a training beside that of a loop by hand, each in a process of its own.

    python tests/benchmarks/memory.py            # the table
    python tests/benchmarks/memory.py --mib 64   # smaller

A figure is the highest resident memory of the process less what it had before the model was made; weights, gradients and AdamW's two
moments come to four times the parameters. Batches are small, so that activations do not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fnlight as fl

STEPS, WIDE = 6, 1024
BATCH = [torch.ones(2, WIDE)]


def model(mib: int) -> nn.Module:
    """Layers of 4 MiB each."""
    return nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(mib // 4)))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss."""
    return model(batch).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def plain(mib: int, folder: str, averaged: bool = False) -> None:
    """The loop by hand."""
    net = model(mib)
    optimizer, params = adamw(net), list(net.parameters())
    averages = [p.detach().clone() for p in params] if averaged else []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, BATCH[0]).backward()
        optimizer.step()
        if averaged:
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 0.001)


def fitted(mib: int, folder: str, create: bool = True, **options: Any) -> None:
    """The same with `fit`."""
    state = fl.TrainState.create(fl.Task(model(mib), loss_of, configure_optimizers=adamw), donate=create)
    fl.fit(state, BATCH, fl.FitConfig(max_steps=STEPS, progress=False, **options))


SIDES: dict[str, Callable[[int, str], None]] = {
    "by hand": plain,
    "by hand, averaged weights": lambda mib, folder: plain(mib, folder, averaged=True),
    "`create(donate=True)`, `fit(donate=True)`": lambda mib, folder: fitted(mib, folder, donate=True),
    "the same, `ema`": lambda mib, folder: fitted(mib, folder, donate=True, ema=0.999),
    "the same, saved in the background every two steps": lambda mib, folder: fitted(
        mib, folder, donate=True, dir=folder, save_every=fl.steps(2)
    ),
    "the same, saved in the foreground": lambda mib, folder: fitted(
        mib, folder, donate=True, dir=folder, save_every=fl.steps(2), save_in_background=False
    ),
    "`create()`, `fit(donate=True)`": lambda mib, folder: fitted(mib, folder, create=False, donate=True),
    "`create()`, `fit()`": lambda mib, folder: fitted(mib, folder, create=False),
}


def kib(field: str) -> int:
    """A figure of this process: ``VmHWM`` is the peak of its resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def child(name: str, mib: int) -> None:
    """Print what a side takes at its peak, in MiB."""
    torch.set_num_threads(1)
    small = nn.Linear(2, 2)  # what torch loads when it first trains does not count
    adamw(small).step(lambda: small(torch.ones(1, 2)).sum())
    before = kib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        SIDES[name](mib, folder)
    print((kib("VmHWM") - before) / 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="mebibytes of parameters")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side, of which the median is taken")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.child, given.mib)
        return
    print(f"| {given.mib} MiB of parameters, fused AdamW | peak, MiB | of the loop by hand |\n|---|---|---|")
    hand = 0.0
    for name in SIDES:
        command = [sys.executable, __file__, "--mib", str(given.mib), "--child", name]
        found = statistics.median(
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(given.rounds)
        )
        hand = hand or found
        print(f"| {name} | {found:,.0f} | {found / hand:.3f} |", flush=True)


if __name__ == "__main__":
    main()
