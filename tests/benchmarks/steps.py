"""What a kind of step costs beside the same kind written by hand.

    python tests/benchmarks/steps.py              # the table
    python tests/benchmarks/steps.py --blocks 30  # a quick look

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

from overhead import adamw, row

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


def ours(data: list[Any], *parts: fl.Combinator) -> Iterator[Any]:
    """A pipe of these parts around `grad`, in the order of a step."""
    before = [c for c in parts if c.takes == "loss"]
    task = fl.Task(mlp(), train_step, configure_optimizers=adamw)
    step = fl.pipe(train_step, *before, fl.grad(), *(c for c in parts if c.takes == "grad"), fl.apply())
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
    blocks = parser.parse_args().blocks
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(BATCH, 32, generator=generator), torch.randint(10, (BATCH,), generator=generator)) for _ in range(1000)]
    print("| MLP 32-256-256-10, batch 64, fused AdamW | by hand, us a step | fnlight, us a step | difference, us | ratio |")
    print("|---|---|---|---|---|")
    print(row("fp32", blocks, plain(data), ours(data)))
    print(row("`autocast(torch.bfloat16)`", blocks, plain(data, torch.bfloat16), ours(data, fl.autocast(torch.bfloat16))))
    print(row("`clip_norm(1.0)`", blocks, plain(data, clip=clip_norm), ours(data, fl.clip_norm(1.0))))
    print(row("`clip_value(0.1)`", blocks, plain(data, clip=clip_value), ours(data, fl.clip_value(0.1))))
    fp16 = (fl.autocast(torch.float16), fl.loss_scale(), fl.clip_norm(1.0))
    print(row("`autocast(torch.float16)`, `loss_scale()`, `clip_norm(1.0)`", max(blocks // 4, 5), plain_scaled(data), ours(data, *fp16)))
    for part in (fl.skip_nonfinite(), fl.skip_spikes(), fl.clip_each(1.0), fl.clip_adaptive(), fl.clip_quantile(), fl.grad_noise()):
        print(row(f"`{part.name}()` beside a step without it", blocks // 2, ours(data), ours(data, part)))


if __name__ == "__main__":
    main()
