"""Run under torchrun by test_microbatch.py: batches that do not fit into the memory of one rank; prints the resulting weights as JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl

torch.use_deterministic_algorithms(True)
SIZES = (8, 5)


def task(limits=()):
    """A net with dropout and BatchNorm, whose forward pass runs out of memory on ranks that have a limit; the loss is exact over tokens."""
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def step(model, batch):
        x, y = batch
        loss = F.cross_entropy(model(x), y, reduction="sum")
        if len(x) > dict(limits).get(fl.parallel.world().rank, 99):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return fl.Mean(loss, len(y))

    return fl.Task(model, step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=0.05))


def part(number, rank):
    draw = torch.Generator().manual_seed(number)
    x, y = torch.randn(sum(SIZES), 4, generator=draw), torch.randint(3, (sum(SIZES),), generator=draw)
    start = sum(SIZES[:rank])
    return x[start : start + SIZES[rank]], y[start : start + SIZES[rank]]


def trained(rank, size="auto", limits=(), begin=None, place=None):
    """Weights and buffers after four steps of two batches, what was agreed on, and what was warned of."""
    given = task(limits)
    step = fl.pipe(given.train_step, fl.grad(), fl.accumulate(2), fl.microbatch(size), fl.clip_norm(1.0), fl.apply())
    state = fl.TrainState.create(given, place=place or fl.parallel.ddp())
    step.adopt(state)
    if begin is not None:
        state.store.memory["microbatch"]["size"] = begin
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fl.errors.FaultWarning)
        for i in range(4):
            state, _ = step(state, fl.data.Item.of(part(2 * i, rank), part(2 * i + 1, rank), state=state))
    numbers = {name: t.detach().flatten().tolist() for name, t in state.store.module.state_dict().items()}
    return {
        "numbers": numbers,
        "size": state.memory.get("microbatch", {}).get("size"),
        "warned": [str(w.message) for w in caught if w.category is fl.errors.FaultWarning],
    }


def refused():
    """What is said where ranks hold parts of a model."""
    try:
        trained(fl.parallel.world().rank, place=fl.parallel.fsdp())
    except fl.errors.ParallelError as error:
        return str(error)


if __name__ == "__main__":
    with fl.parallel.join() as world:
        found = {
            "one of them": trained(world.rank, limits={1: 3}.items()),
            "from the start": trained(world.rank, begin=3),
            "both": trained(world.rank, limits={0: 4, 1: 3}.items()),
            "a number": trained(world.rank, size=3),
            "none": trained(world.rank),
            "fsdp": refused(),
        }
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))
