"""What a checkpoint costs: the stall of a step, the whole save beside the disk's own rate, and loading beside ``torch.load(mmap=True)``.

    python tests/benchmarks/checkpoint.py               # the table
    python tests/benchmarks/checkpoint.py --mib 64 -n 3 # a quick look

Both sides of a row move the same bytes and are timed in turns; the table gives medians, and the median of the ratios of neighbours.
"""

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fnlight as fl
from fnlight.checkpoint import describe_state
from fnlight.loop import Saver


def make_state(mib: int) -> fl.TrainState:
    """A state of some MiB: parameters, and twice as much memory of AdamW."""
    width = int((mib * 2**20 / 3 / 4 / 8) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    task = fl.Task(model, lambda m, b: m(b).square().mean(), configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), fused=True))
    return fl.update(fl.TrainState.create(task), torch.randn(2, width))[0]


def bytes_of(state: fl.TrainState) -> list[tuple[torch.Tensor, memoryview]]:
    """The tensors that a checkpoint holds, and their bytes."""
    tensors = [t for named in describe_state(state)[1].values() for t in named.values()]
    return [(t, memoryview(t.reshape(-1).view(torch.uint8).numpy())) for t in tensors]


def timed(fn: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call; what it gives is let go afterwards."""
    start = clock()
    found = fn()
    seconds = clock() - start
    del found
    return seconds


def turns(
    a: Callable[[], Any],
    b: Callable[[], Any],
    count: int,
    between: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float]:
    """Medians of both, timed in turns, and the median of their ratios, a to b; the first turn of each does not count."""
    pairs: list[tuple[float, float]] = []
    for turn in range(count + 1):
        order = (a, b) if turn % 2 else (b, a)
        found = {}
        for fn in order:
            found[fn] = timed(fn, clock)
            between()
        pairs.append((found[a], found[b]))
    pairs = pairs[1:]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), statistics.median(x / y for x, y in pairs)


def raw_write(pieces: list[tuple[torch.Tensor, memoryview]], folder: Path) -> None:
    """What the disk can do: the same bytes in one file, flushed."""
    path = folder / "raw"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _, piece in pieces:
        view = piece
        while view:
            view = view[os.write(file, view[: 1 << 24]) :]
    os.fsync(file)
    os.close(file)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser()
    options.add_argument("--mib", type=int, default=384)
    options.add_argument("-n", type=int, default=9)
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("FNLIGHT_BENCH_DIR")))
    try:
        measure(given.mib, given.n, folder)
    finally:
        shutil.rmtree(folder)


def measure(mib: int, count: int, folder: Path) -> None:
    """The rows of the table."""
    state = make_state(mib)
    pieces = bytes_of(state)
    size = sum(len(piece) for _, piece in pieces) / 2**20
    print(f"| {size:.0f} MiB of state in {len(pieces)} tensors, {count} turns | fnlight | beside it | ratio |\n|---|---|---|---|")

    whole = turns(lambda: fl.save(state, folder / "a"), lambda: raw_write(pieces, folder), count)
    print(f"| save, MiB/s; write and fsync of the same bytes | {size / whole[0]:.0f} | {size / whole[1]:.0f} | {1 / whole[2]:.2f} |")

    state.store.memory["checkpoint_every"] = {"saved": [], "permanent": [], "skipped": 0}
    saver = Saver(str(folder / "run"), "checkpoint_every", fl.last(1), background=True, on_exception=False)
    copies = [torch.empty_like(t) for t, _ in pieces]
    sources = [t for t, _ in pieces]
    stall = turns(lambda: saver.save(state), lambda: torch._foreach_copy_(copies, sources), count, saver.settle)
    saver.close(None)
    print(f"| stall of a step, ms; a copy into memory on the host | {stall[0] * 1e3:.1f} | {stall[1] * 1e3:.1f} | {stall[2]:.2f} |")

    loading(state, count, folder)


def touched(module: nn.Module, optimizer: Any) -> Any:
    """Write to every tensor once, as the first step does: what is only mapped is read now."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *(t for slots in optimizer.state.values() for t in slots.values())):
            tensor.mul_(1)
    return module, optimizer


def loading(state: fl.TrainState, count: int, folder: Path) -> None:
    """The rows of reading, by the clock of the processor as well, for it counts no other work of the machine."""
    torch.save({"model": state.store.module.state_dict(), "optimizer": state.store.optim.optimizer.state_dict()}, folder / "torch.pt")
    model = state.copy().store

    def torch_new() -> Any:
        module = copy.deepcopy(state.task.model)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        found = torch.load(folder / "torch.pt", mmap=True, weights_only=True)
        module.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        return touched(module, optimizer)

    def new() -> Any:
        store = fl.load(folder / "a", state.task).store
        return touched(store.module, store.optim.optimizer)

    def torch_load() -> None:
        found = torch.load(folder / "torch.pt", mmap=True, weights_only=True)
        model.module.load_state_dict(found["model"])
        with torch.no_grad():
            for slots, own in zip(found["optimizer"]["state"].values(), model.optim.optimizer.state.values(), strict=True):
                for name, value in slots.items():
                    own[name].copy_(value)

    rows = (
        ("`load`, and every tensor written to; `torch.load(mmap=True)` into a new model and optimizer, likewise", new, torch_new),
        ("`restore`; `torch.load(mmap=True)`, copied over a state that is there", lambda: fl.restore(folder / "a", like=state), torch_load),
    )
    for name, ours, theirs in rows:
        for kind, clock in (("ms", time.perf_counter), ("ms of the processor", time.process_time)):
            load = turns(ours, theirs, count, clock=clock)
            print(f"| {name}, {kind} | {load[0] * 1e3:.0f} | {load[1] * 1e3:.0f} | {load[2]:.2f} |")


if __name__ == "__main__":
    main()
