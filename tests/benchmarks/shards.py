"""What sharded training costs beside a loop around torch's ``fully_shard``, and sharded checkpoints beside ``torch.distributed.checkpoint``.

    torchrun --nproc-per-node=2 tests/benchmarks/shards.py steps
    torchrun --nproc-per-node=2 tests/benchmarks/shards.py memory plain 1536    # how wide; each in processes of its own
    torchrun --nproc-per-node=2 tests/benchmarks/shards.py memory fnlight 1536
    torchrun --nproc-per-node=2 tests/benchmarks/shards.py save runs/shards
    torchrun --nproc-per-node=1 tests/benchmarks/shards.py load runs/shards  # on another number of ranks

Both sides do the same work and are timed in turns; the medians of their ratios are what to read.
"""

import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import fnlight as fl

WORDS, WIDTH, LAYERS, LENGTH, BATCH = 512, 256, 4, 64, 8


class Model(nn.Module):
    """A small transformer."""

    def __init__(self, width: int = WIDTH) -> None:
        nn.Module.__init__(self)
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(LAYERS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scores of the next words."""
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The loss of the next word."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def adamw(model: nn.Module) -> Any:
    """What both sides train with."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def sharded(width: int = WIDTH) -> nn.Module:
    """The model as torch cuts it."""
    torch.manual_seed(0)
    return cut(Model(width))


def cut(model: nn.Module) -> nn.Module:
    """A model in parts, block by block."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def empty(width: int) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return Model(width)


def plain_loop(width: int = WIDTH) -> Callable[[torch.Tensor], Any]:
    """A step by hand."""
    model = sharded(width)
    optimizer = adamw(model)

    def step(batch: torch.Tensor) -> None:
        train_step(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fnlight_loop(width: int = WIDTH) -> Callable[[torch.Tensor], Any]:
    """The same by fnlight."""
    step = fl.pipe(train_step, fl.grad(), fl.clip_norm(1.0), fl.apply())
    held = [step.start(make(width))]

    def one(batch: torch.Tensor) -> None:
        held[0], _ = step(held[0], fl.data.Item.of(batch, state=held[0]))

    return one


def make(width: int = WIDTH) -> fl.TrainState:
    """A state in parts."""
    torch.manual_seed(0)
    task = fl.Task(Model(width), train_step, configure_optimizers=adamw)
    return fl.TrainState.create(task, place=fl.parallel.fsdp(), donate=True)


def batch_of(rank: int) -> torch.Tensor:
    """A rank's words."""
    return torch.randint(WORDS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(rank))


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of a call, from when all ranks begin until all have ended."""
    distributed.barrier()
    begun = time.perf_counter()
    fn()
    distributed.barrier()
    return time.perf_counter() - begun


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], count: int) -> tuple[float, float, float]:
    """Medians of both, and of their ratios; the first turn does not count."""
    pairs = []
    for turn in range(count + 1):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        found = {fn: timed(fn) for fn in order}
        pairs.append((found[ours], found[theirs]))
    a, b = zip(*pairs[1:], strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs[1:])


def say(rank: int, what: str, found: tuple[float, float, float]) -> None:
    """A row of the table."""
    if rank == 0:
        print(f"| {what} | {1e3 * found[0]:.1f} | {1e3 * found[1]:.1f} | {found[2]:.3f} |", flush=True)


def steps(rank: int, count: int = 30, each: int = 5) -> None:
    """Milliseconds of steps."""
    batch, ours, theirs = batch_of(rank), fnlight_loop(), plain_loop()
    many = lambda step: lambda: [step(batch) for _ in range(each)]  # too short for a name
    say(rank, f"{each} steps, clipped, ms", in_turns(many(ours), many(theirs), count))


def memory(rank: int, side: str, wide: str = "768") -> None:
    """The peak of this process after some steps."""
    width = int(wide)
    step, batch = {"plain": plain_loop, "fnlight": fnlight_loop}[side](width), batch_of(rank)
    for _ in range(4):
        step(batch)
    print(f"{side}, rank {rank}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)


def stepped(width: int) -> tuple[fl.TrainState, nn.Module, Any]:
    """The same state on both sides, with optimizer memory."""
    state = make(width)
    state, _ = fl.pipe(train_step, fl.grad(), fl.apply())(state, fl.data.Item.of(batch_of(0), state=state))
    model = sharded(width)
    optimizer = adamw(model)
    train_step(model, batch_of(0)).backward()
    optimizer.step()
    return state, model, optimizer


def saving(rank: int, folder: str, count: int = 7, width: int = 1024) -> None:
    """Milliseconds of a save."""
    state, model, optimizer = stepped(width)

    def theirs() -> None:
        weights, slots = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": slots}, checkpoint_id=f"{folder}/torch")

    def ours() -> None:
        fl.save(state, f"{folder}/fnlight")

    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    megabytes = 12 * sum(p.numel() for p in model.parameters()) / 2**20
    say(rank, f"save {megabytes:.0f} MiB, ms", in_turns(ours, theirs, count))


def loading(rank: int, folder: str, count: int = 7, width: int = 1024) -> None:
    """Milliseconds of a load, into a model and an optimizer that are made for it, as a process that resumes does; and over those that are there."""
    on = f"on {distributed.get_world_size()} rank(s), ms"

    def theirs(model: nn.Module, optimizer: Any) -> None:
        weights, slots = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": slots}, checkpoint_id=f"{folder}/torch")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=slots)

    def theirs_anew() -> None:
        model = cut(empty(width)).to_empty(device="cpu")
        theirs(model, adamw(model))

    task = fl.Task(empty(width), train_step, configure_optimizers=adamw)
    say(rank, f"load {on}", in_turns(lambda: fl.load(f"{folder}/fnlight", task, place=fl.parallel.fsdp()), theirs_anew, count))
    state, model, optimizer = stepped(width)
    say(rank, f"restore {on}", in_turns(lambda: fl.restore(f"{folder}/fnlight", like=state), lambda: theirs(model, optimizer), count))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    what, *more = sys.argv[1:]
    {"steps": steps, "memory": memory, "save": saving, "load": loading}[what](distributed.get_rank(), *more)
    distributed.barrier()
    distributed.destroy_process_group()
