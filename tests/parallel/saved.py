"""Run under torchrun by test_saved.py: states that are saved by some ranks and read by others; prints their content as JSON."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.checkpoint import Folder
from fnlight.checkpoint.bucket import Bucket
from fnlight.tensors import is_sharded
from tests.parallel.sharded import PLAN, Net, adamw, batches, evaluated, here, make, numbers, said, trained
from tests.parallel.steps import data, plain

torch.use_deterministic_algorithms(True)
warnings.simplefilter("error", fl.errors.CheckpointWarning)

PLACES = {
    "fsdp": fl.parallel.fsdp(),
    "ddp": fl.parallel.ddp(),
    "hsdp": fl.parallel.hsdp({"replicate": 2, "shard": 2}),
    "tensor parallel": fl.parallel.fsdp({"data": 2, "tensor": 2}, tensor_parallel=PLAN),
}


def stepped():
    return fl.pipe(plain, fl.grad(), fl.clip_norm(0.1), fl.apply(), fl.ema(0.9))


def on(state, steps):
    step = stepped()
    return trained(step.start(state), step, batches(here(state), steps=steps))[0]


def content(state):
    """Everything that a state holds, whole."""
    slots = {f"{name}/{slot}": value for name, held in state.opt_state.items() for slot, value in held.items()}
    return numbers(dict(state.params)) | numbers(slots) | numbers({f"ema/{name}": value for name, value in state.memory["ema"].items()})


def saves(folder, names):
    """Save after two steps, once for each placement."""
    for name in names:
        state = on(fl.TrainState.create(make(), seed=3, place=PLACES[name]), 2)
        yield name, content(state)
        fl.save(state, f"{folder}/{name}")
        yield f"{name}, later", numbers(on(state, 2).params)


def loads(folder, names, place):
    """Load what was saved, whichever way."""
    for name in names:
        state = fl.load(f"{folder}/{name}", make(), place=place)
        yield name, content(state)
        yield f"{name}, cut", [is_sharded(state.store.params[0]), is_sharded(state.memory["ema"]["first.weight"])]
        like = on(fl.TrainState.create(make(), seed=9, place=place), 1)
        before = content(like)
        other = fl.restore(f"{folder}/{name}", like=like)
        same = content(other) == content(state)
        on(other, 1)
        yield f"{name}, restored", same and content(like) == before
        yield f"{name}, later", numbers(on(state, 2).params)


def bytes_read(folder, world):
    """Bytes that this rank reads of a store, where it holds what it held, and all bytes that there are."""
    url = f"local://{folder}/store"
    os.makedirs(f"{folder}/store", exist_ok=True)
    task = fl.Task(Net(64), plain, configure_optimizers=adamw)
    state = on(fl.TrainState.create(task, place=fl.parallel.fsdp()), 1)
    fl.save(state, url)
    real, asked = Bucket.part, list[int]()
    Bucket.part = lambda self, name, start, end: (asked.append(end - start), real(self, name, start, end))[1]
    with torch.device("meta"):
        hollow = fl.Task(Net(64), plain, configure_optimizers=adamw)
    back = fl.load(url, hollow, place=fl.parallel.fsdp())
    Bucket.part = real
    return {
        "read": sum(asked),
        "there": sum(p.stat().st_size for p in Path(folder, "store").iterdir()),
        "same": content(back) == content(state),
    }


def fails(folder, world):
    """A rank whose disk is full: what all ranks are told, and what stands afterwards."""
    state = fl.TrainState.create(make(), seed=3, place=fl.parallel.fsdp())
    fl.save(state, f"{folder}/full")
    real = Folder.write
    if world.rank == 1:
        Folder.write = full
    told = said(lambda: fl.save(on(state.copy(), 1), f"{folder}/full"))
    Folder.write = real
    return {
        "told": told,
        "stands": fl.load(f"{folder}/full", make()).progress.step,
        "beside": sorted(n for n in os.listdir(folder) if n.startswith(".")),
    }


def full(self, name, chunks):
    raise OSError(28, "No space left on device")


def loaders():
    (x, y), (xv, yv) = data(0, 40), data(1, 10)
    train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    return fl.Loaders(train=train, val=DataLoader(TensorDataset(xv, yv), batch_size=2))


def fitted(folder, steps, place, **options):
    """`fit` with saving in the background, and an evaluation of five batches."""
    task = fl.Task(Net(), plain, evaluated, lambda model, batch: model(batch[0]), configure_optimizers=adamw)
    with fl.tensors.isolated():
        torch.manual_seed(0)
        task = make()
    config = fl.FitConfig(
        max_steps=steps, accumulate=2, clip_norm=0.1, ema=0.9, dir=f"{folder}", resume=True, save_every=fl.steps(2), keep=fl.last(9),
        eval_every=fl.steps(2), progress=False, **options,
    )  # fmt: skip
    state = fl.fit(fl.TrainState.create(task, seed=3, place=place), loaders(), config)
    history = [[r.step, {name: value for name, value in r.metrics.items() if "/time" not in name}] for r in state.history]
    predicted = torch.cat(fl.collect(fl.predict(state, loaders().val)))
    return {"params": numbers(state.params), "history": history, "predicted": predicted.tolist(), "step": state.progress.step}


def whenever(folder, place):
    """The steps that a run has saved as fast as it could, as this rank knows them, and whether the newest checkpoint holds its end."""
    step = fl.pipe(plain, fl.grad(), fl.apply(), fl.checkpoint_every(folder, fl.continuous, fl.last(99)), fl.stop_when(fl.max_steps(60)))
    state = fl.TrainState.create(make(), seed=3, place=place)
    for state, _ in fl.run(step, state, loaders().train):  # noqa: B007  # the last one is looked at
        pass
    return state.memory["checkpoint_every"]["saved"], numbers(fl.load(folder, make()).params) == numbers(state.params)


def killed(world):
    """A process that ends in the middle of its second file of the save of step 4."""
    real = Folder.write

    def write(self, name, chunks):
        if "step-00000004" in self.path and name.startswith("optimizer-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, name, chunks)

    if world.rank == world.size - 1:
        Folder.write = write


def main(what, folder):
    with fl.parallel.join() as world:
        found = {}
        if what == "four":
            found = dict(saves(folder, ["fsdp", "hsdp", "tensor parallel"]))
            found["loaded"] = dict(loads(folder, ["fsdp"], PLACES["fsdp"]))
        elif what == "two":
            found["fsdp"] = dict(loads(folder, ["fsdp", "hsdp", "tensor parallel"], PLACES["fsdp"]))
            found["ddp"] = dict(loads(folder, ["fsdp"], PLACES["ddp"]))
            found["saved by ddp"] = dict(saves(folder, ["ddp"]))
            found["ddp as fsdp"] = dict(loads(folder, ["ddp"], PLACES["fsdp"]))
            found["bytes"], found["full"] = bytes_read(folder, world), fails(folder, world)
            found["whole run"] = fitted(f"{folder}/whole", 6, PLACES["fsdp"])
            fitted(f"{folder}/parts", 4, PLACES["fsdp"])
            found["whenever"] = [whenever(f"{folder}/whenever {name}", PLACES[name]) for name in ("fsdp", "ddp")]
        elif what == "go on":
            found["whole run"] = fitted(f"{folder}/parts", 6, PLACES["fsdp"])
            found["after a kill"] = fitted(f"{folder}/killed", 6, PLACES["fsdp"])
        elif what == "kill":
            killed(world)
            fitted(f"{folder}/killed", 6, PLACES["fsdp"])
    Path(folder, f"{what} {world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
