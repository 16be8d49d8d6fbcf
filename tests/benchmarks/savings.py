"""A program: the peak memory of a training step with and without what saves memory, to the byte.

    python tests/benchmarks/savings.py

What torch's allocator gives and takes back during one step is added up, so the figures do not depend on the machine. They count from what
is there before the step: weights, optimizer memory and the batch.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

import fnlight as fl

WIDTH, DEPTH, CLASSES = 512, 24, 10
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def net():
    """24 blocks of a wide layer, a nonlinearity and a norm, and a head."""
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(DEPTH)]
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(WIDTH, CLASSES))


def train_step(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def on_host(model):
    return fl.Optim(adamw(model), offload=True)


CASES = {
    "as it is": (adamw, fl.grad(), fl.apply()),
    '`recompute("0.*")`: every block': (adamw, fl.recompute("0.*"), fl.grad(), fl.apply()),
    "`microbatch(64)`": (adamw, fl.grad(), fl.microbatch(64), fl.apply()),
    "`apply_in_backward()`": (adamw, fl.grad(), fl.apply_in_backward()),
    "`recompute` and `apply_in_backward`": (adamw, fl.recompute("0.*"), fl.grad(), fl.apply_in_backward()),
    "`offload=True`": (on_host, fl.grad(), fl.apply()),
    "`offload=True` and `apply_in_backward()`": (on_host, fl.grad(), fl.apply_in_backward()),
}


def begun(samples, configure, *parts):
    """A step with the state and the batch that it is to be given; the optimizer has its memory by then."""
    torch.manual_seed(0)
    state = fl.TrainState.create(fl.Task(net(), train_step, configure_optimizers=configure), device=DEVICE)
    batch = (torch.randn(samples, WIDTH, device=DEVICE), torch.randint(CLASSES, (samples,), device=DEVICE))
    step = fl.pipe(train_step, *parts)
    for _ in range(2):
        state, _ = step(state, batch)
    return step, state, batch


def peak(samples, configure, *parts):
    """Mebibytes that a step takes at most."""
    step, state, batch = begun(samples, configure, *parts)
    with profile(profile_memory=True) as found:
        step(state, batch)
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name.lower() == DEVICE.type:
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def times(samples, rounds=5):
    """Seconds of a step by case, the least of some rounds in which all take turns: of the processor where it computes."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    cases, best = {name: begun(samples, *case) for name, case in CASES.items()}, dict.fromkeys(CASES, float("inf"))
    for _ in range(rounds):
        for name, (step, state, batch) in cases.items():
            began = clock()
            state, metrics = step(state, batch)
            float(metrics["loss"])
            best[name] = min(best[name], clock() - began)
            cases[name] = step, state, batch
    return best


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights = sum(p.numel() for p in net().parameters()) * 4 / 2**20
    print(f"weights: {weights:.0f} MiB, as much for all gradients, twice as much for AdamW\n")
    print("| step | 2,048 samples | 64 samples | time of 512 |\n|---|---|---|---|")
    seconds = times(512)
    for name, case in CASES.items():
        ratio = seconds[name] / seconds["as it is"]
        print(f"| {name} | {peak(2048, *case):.0f} MiB | {peak(64, *case):.0f} MiB | {ratio:.2f} |")
