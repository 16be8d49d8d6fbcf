"""Run under torchrun by test_ddp.py: a manual loop, each rank on its part of a batch; prints the resulting weights as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fnlight as fl

torch.use_deterministic_algorithms(True)


def task(step, model=None):
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) if model is None else model
    return fl.Task(model, step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=0.05))


def plain(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"acc": (logits.argmax(-1) == y).float().mean()}


def weighted(model, batch):
    x, y = batch
    return fl.Mean(F.cross_entropy(model(x), y, reduction="sum"), len(y))


def data(number, size=8):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def cut(batch, sizes, rank):
    """The part of a batch that a rank sees, where each has so many samples."""
    start = sum(sizes[:rank])
    return tuple(t[start : start + sizes[rank]] for t in batch)


def numbers(named):
    return {name: p.detach().flatten().tolist() for name, p in named.items()}


def by_hand(loss_fn, sizes, world, group=1, model=None, place=None, *, given=()):
    """Weights after four steps of a group of batches."""
    step = fl.pipe(loss_fn, fl.grad(), *given, fl.apply())
    place = place if place is not None else fl.parallel.ddp()
    state = fl.TrainState.create(task(loss_fn, model), place=place if world.size > 1 else None)
    for i in range(4):
        whole = [data(4 * i + j, sum(sizes)) for j in range(group)]
        batches = [cut(batch, sizes, world.rank) for batch in whole] if world.size > 1 else whole
        state, _ = step(state, fl.data.Item.of(*batches, state=state))
    return numbers(state.params)


def torch_by_hand(sizes, world, group=1):
    """The same with torch alone."""
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for i in range(4):
        for j in range(group):
            batch = cut(data(4 * i + j, sum(sizes)), sizes, world.rank)
            model.require_backward_grad_sync = j == group - 1
            (plain(model, batch)[0] / group).backward()
        optimizer.step()
        optimizer.zero_grad()
    return numbers({name.removeprefix("module."): p for name, p in model.named_parameters()})


def unused():
    """What is said where the loss does not depend on a parameter."""
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)})
    step = fl.pipe(lambda model, batch: F.cross_entropy(model["used"](batch[0]), batch[1]), fl.grad(), fl.apply())
    said = []
    for place in (fl.parallel.ddp(), fl.parallel.ddp(find_unused_parameters=True)):
        state = fl.TrainState.create(task(step, model), place=place)
        try:
            state, _ = step(state, data(0))
            state, _ = step(state, data(1))
            said.append(str(state.progress.step))
        except fl.errors.StepError as error:
            said.append(str(error))
    return said


def main(folder):
    with fl.parallel.join() as world:
        half = [8 // world.size] * world.size
        uneven = [5, *[1] * (world.size - 2), 3] if world.size > 1 else [8 + 0]
        found = {
            "rank": world.rank,
            "plain": by_hand(plain, half, world),
            "torch": torch_by_hand(half, world),
            "accumulated": by_hand(plain, half, world, group=2),
            "torch accumulated": torch_by_hand(half, world, group=2),
            "weighted": by_hand(weighted, uneven, world, group=2),
            "unused": unused(),
            "left": distributed.is_initialized(),
        }
    found["joined afterwards"] = distributed.is_initialized()
    Path(folder, f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
