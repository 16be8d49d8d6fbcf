"""What a kind of step costs beside the same kind written by hand.

    python tests/benchmarks/steps.py              # the table
    python tests/benchmarks/steps.py --blocks 30  # a quick look
    python tests/benchmarks/steps.py --cpu        # CPU time, on a machine that others use

As in overhead.py, both sides do the same work and are timed in turns; ratios are what to read.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl

sys.path.insert(0, str(Path(__file__).parent))

from overhead import CLOCKS, adamw, row

BATCH, WIDE = 64, 256


def mlp() -> nn.Module:
    """The model of the comparison: 32-256-256-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 10))


def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss and nothing else."""
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def plain(data: list[Any], dtype: torch.dtype | None = None, clip: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """The loop by hand, in mixed precision or with clipping."""
    model = mlp()
    optimizer = adamw(model)
    while True:
        for batch in data:
            optimizer.zero_grad()
            if dtype is None:
                loss = train_step(model, batch)
            else:
                with torch.autocast("cpu", dtype):
                    loss = train_step(model, batch)
            loss.backward()
            if clip is not None:
                clip(model.parameters())
            optimizer.step()
            yield


def plain_scaled(data: list[Any]) -> Iterator[None]:
    """The loop by hand with a GradScaler, and clipping behind it."""
    model = mlp()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu")
    while True:
        for batch in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = train_step(model, batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            yield


def plain_averaged(data: list[Any], decay: float = 0.999) -> Iterator[None]:
    """The loop by hand with averaged weights, by one foreach kernel."""
    model = mlp()
    optimizer, params = adamw(model), list(model.parameters())
    averages = [p.detach().clone() for p in params]
    while True:
        for batch in data:
            optimizer.zero_grad()
            train_step(model, batch).backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - decay)
            yield


def plain_scheduled(data: list[Any], schedule: Callable[[int], float]) -> Iterator[None]:
    """The loop by hand with a learning rate that is set before every step."""
    model = mlp()
    optimizer, step = adamw(model), 0
    while True:
        for batch in data:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * schedule(step)
            optimizer.zero_grad()
            train_step(model, batch).backward()
            optimizer.step()
            step += 1
            yield


def ours(data: list[Any], *parts: fl.Combinator, schedule: Any = None) -> Iterator[Any]:
    """A pipe of these parts around `grad`, in the order of a step."""
    before = [c for c in parts if c.takes == "loss"]
    task = fl.Task(mlp(), train_step, configure_optimizers=lambda model: fl.Optim(adamw(model), schedule))
    inner, outer = [c for c in parts if c.takes == "grad"], [c for c in parts if c.takes == "step"]
    step = fl.pipe(train_step, *before, fl.grad(), *inner, fl.apply(), *outer)
    return fl.run(step, fl.TrainState.create(task), data, donate=True)


def clip_value(parameters: Any) -> None:
    """Torch's own."""
    nn.utils.clip_grad_value_(parameters, 0.1)


def clip_norm(parameters: Any) -> None:
    """Torch's own."""
    nn.utils.clip_grad_norm_(parameters, 1.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--cpu", action="store_true", help="count CPU time instead, for a machine that others use at the same time")
    blocks, clock = parser.parse_args().blocks, CLOCKS[parser.parse_args().cpu]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(BATCH, 32, generator=generator), torch.randint(10, (BATCH,), generator=generator)) for _ in range(1000)]
    fp16 = (fl.autocast(torch.float16), fl.loss_scale(), fl.clip_norm(1.0))
    course = fl.warmup_cosine(warmup=1000, total=10**6)
    print("| MLP 32-256-256-10, batch 64, fused AdamW | by hand, us a step | fnlight, us a step | difference, us | ratio |")
    print("|---|---|---|---|---|")
    for name, share, hand, made in (
        ("fp32", 1, plain(data), ours(data)),
        ("`autocast(torch.bfloat16)`", 1, plain(data, torch.bfloat16), ours(data, fl.autocast(torch.bfloat16))),
        ("`clip_norm(1.0)`", 1, plain(data, clip=clip_norm), ours(data, fl.clip_norm(1.0))),
        ("`clip_value(0.1)`", 1, plain(data, clip=clip_value), ours(data, fl.clip_value(0.1))),
        ("`ema(0.999)`", 1, plain_averaged(data), ours(data, fl.ema(0.999))),
        ("`Optim(..., warmup_cosine(...))`", 1, plain_scheduled(data, course), ours(data, schedule=course)),
        ("`autocast(torch.float16)`, `loss_scale()`, `clip_norm(1.0)`", 4, plain_scaled(data), ours(data, *fp16)),
    ):
        print(row(name, max(blocks // share, 5), hand, made, clock), flush=True)
    for part in (fl.skip_nonfinite(), fl.skip_spikes(), fl.clip_each(1.0), fl.clip_adaptive(), fl.clip_quantile(), fl.grad_noise()):
        print(row(f"`{part.name}()` beside a step without it", blocks // 2, ours(data), ours(data, part), clock), flush=True)


if __name__ == "__main__":
    main()
