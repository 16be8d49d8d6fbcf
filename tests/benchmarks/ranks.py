"""What a step on two ranks costs, beside torch's DistributedDataParallel in a loop by hand, interleaved.

python -m torch.distributed.run --standalone --nproc-per-node=2 tests/benchmarks/ranks.py
"""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fnlight as fl

BLOCKS, STEPS = 30, 40


def model(width, depth):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), *layers, nn.Linear(width, 10))


def train_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def by_torch(net, batches):
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optim = optimizer(wrapped)

    def block():
        for batch in batches:
            train_step(wrapped, batch).backward()
            optim.step()
            optim.zero_grad()

    return block


def by_fnlight(net, batches):
    held = [fl.TrainState.create(fl.Task(net, train_step, configure_optimizers=optimizer), place=fl.parallel.ddp())]
    step = fl.pipe(train_step, fl.grad(), fl.apply())
    items = [fl.data.Item((batch,), 0, 1, False, len(batch[1])) for batch in batches]

    def block():
        for item in items:
            held[0], _ = step(held[0], item)

    return block


def timed(block, world):
    torch.distributed.barrier()
    began = time.perf_counter()
    block()
    torch.distributed.barrier()
    return (time.perf_counter() - began) / STEPS * 1e6


def main():
    torch.set_num_threads(1)
    with fl.parallel.join() as world:
        for name, width, depth, size in (("small", 64, 1, 32), ("middle", 512, 4, 64), ("large", 1024, 8, 64)):
            batches = [(torch.randn(size, 32), torch.randint(10, (size,))) for _ in range(STEPS)]
            blocks = {"torch": by_torch(model(width, depth), batches), "fnlight": by_fnlight(model(width, depth), batches)}
            times = {key: [] for key in blocks}
            for block in blocks.values():
                block()
            for turn in range(BLOCKS if name != "large" else BLOCKS // 5):
                for key in list(blocks)[:: 1 if turn % 2 else -1]:
                    times[key].append(timed(blocks[key], world))
            if world.rank == 0:
                ratio = statistics.median(b / a for a, b in zip(times["torch"], times["fnlight"], strict=True))
                shown = {key: f"{statistics.median(each):.0f} us" for key, each in times.items()}
                print(
                    f"{name}: {shown}, least {min(times['torch']):.0f} and {min(times['fnlight']):.0f}, median ratio {ratio:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
