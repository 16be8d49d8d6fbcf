"""A program: the peak memory of a step on a batch as a whole and in parts, each in a process of its own."""

import os
import resource

import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl


def peak(size):
    """Mebibytes that one step of a wide network on 4,096 samples takes beyond the process itself."""
    read, write = os.pipe()
    if os.fork() == 0:
        model = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(512, 512), nn.GELU())), nn.Linear(512, 10))
        task = fl.Task(
            model,
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            configure_optimizers=lambda m: torch.optim.AdamW(m.parameters()),
        )
        state, batch = fl.TrainState.create(task), (torch.randn(4096, 512), torch.randint(10, (4096,)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts = [] if size is None else [fl.microbatch(size)]
        fl.pipe(task.train_step, fl.grad(), *parts, fl.apply())(state, batch)
        os.write(write, f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f}".encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return int(os.read(read, 100))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| | MiB |\n|---|---|")
    for size in (None, 2048, 1024, 512, 256, 128):
        print(f"| {'the whole batch' if size is None else f'`microbatch({size})`'} | {peak(size)} |")
