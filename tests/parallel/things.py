"""Run under torchrun by test_ranks.py on two ranks: what they agree on, what they refuse, and other ways to train together."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.data import num_samples
from fnlight.tensors import is_sharded
from tests.parallel.trajectories import STEPS, measured, numbers, plain, task, tensors


def said(fn, kind=fl.errors.FnlightError):
    """The error of a function, as text."""
    try:
        return fn() and "nothing"
    except kind as error:
        return f"{type(error).__name__}: {error}"


def embed(model, batch):
    return model(batch[0])


def loader(size=24, batch=8):
    return DataLoader(TensorDataset(*tensors(size)), batch_size=batch, shuffle=True)


def fitted(data=None, step=plain, seed=3, place=None, **options):
    options = {"max_epochs": 2, "progress": False, **options}
    state = fl.TrainState.create(task(step), seed=seed, place=place)
    return fl.fit(state, loader() if data is None else data, fl.FitConfig(**options))


def uneven_names(rank):
    return lambda model, batch: (plain(model, batch)[0], {f"of {rank}": torch.ones(())})


def refused(world, folder):
    """What does not fit together, and what is said of it."""
    rank, model = world.rank, nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, device="meta"))
    state = fl.TrainState.create(task())
    yield "seeds", said(lambda: fitted(seed=3 + rank))
    yield "code", said(lambda: fitted(step=plain if rank else STEPS["weighted"]))
    yield "data", said(lambda: fitted(loader(24 - rank)))
    yield "config", said(lambda: fitted(clip_norm=1.0 + rank))
    yield "names", said(lambda: fitted(step=uneven_names(rank)))
    yield "more ranks than samples", said(lambda: fitted(loader(batch=1)))
    yield "placed later", said(lambda: fl.parallel.placed_on(state, fl.parallel.fsdp()))
    yield "devices", said(lambda: fl.TrainState.create(fl.Task(model, plain), place=fl.parallel.ddp()))
    together = fl.parallel.ddp(sync_batchnorm=True)
    yield "one value", said(lambda: fitted(loader(9), step=STEPS["normed"], place=together), ValueError)
    yield "norms", said(lambda: fitted(step=STEPS["normed"], microbatch="auto", place=together))
    bundles = {"dir": Path(folder, "never"), "debug_bundle": True, "save_every": fl.at_end}
    yield "bundle", said(lambda: fitted(**bundles))
    for name, step in (
        ("carry", (plain, fl.grad(), fl.carry(lambda model, batch: None))),
        ("cache", (embed, fl.grad_cache(lambda found: found.sum(), 2))),
    ):
        yield name, said(lambda step=step: list(fl.run(fl.pipe(*step, fl.apply()), placed(), loader())))
    with fl.Signals() as signals:
        yield "predict", said(lambda: fl.predict(placed(), loader(), predict_step=embed, signals=signals))
    yield "diloco", said(lambda: list(fl.run(fl.pipe(plain, fl.grad(), fl.apply(), fl.parallel.diloco(fl.steps(2))), placed(), loader())))
    yield "sides", said(lambda: fitted(fl.zip_shortest(loader(batch=7), loader(batch=8)), step=lambda model, batch: plain(model, batch[0])))
    local, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    yield "hosts", said(lambda: fl.parallel.check_same(fl.parallel.world(), state))
    os.environ["GROUP_RANK"] = str(rank)
    yield "launchers", said(lambda: fl.parallel.check_same(fl.parallel.world(), state))
    os.environ["LOCAL_RANK"] = local


def placed(place=None):
    return fl.TrainState.create(task(), seed=3, place=fl.parallel.ddp() if place is None else place)


class Ending(TensorDataset):
    """Samples, at one of which rank 1 is told to end."""

    def __getitem__(self, i):
        if i == 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return TensorDataset.__getitem__(self, i)


def agreed(world):
    """What happens at one step on all ranks."""
    ending = fitted(DataLoader(Ending(*tensors(24)), batch_size=8), max_epochs=100_000, signals=True)
    yield "signal", [ending.stopped, ending.progress.step]
    calls = []

    def measuring(model, batch):
        calls.append(model.training)
        if world.rank and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(model, batch)

    with fl.Signals() as signals:
        every = fl.evaluate_every(loader(48, 4), fl.steps(1), eval_step=measuring, signals=signals)
        step = fl.pipe(plain, fl.grad(), fl.apply(), every, fl.stop_when(fl.max_epochs(9)))
        state = [state for state, _ in fl.run(step, placed(), loader(), signals=signals)][-1]
    yield "evaluation", [state.stopped, state.progress.step, len(state.history), len(calls)]
    calls.clear()
    with fl.Signals() as signals:
        what = said(lambda: fl.evaluate(placed(fl.parallel.fsdp()), loader(48, 4), eval_step=measuring, signals=signals))
    yield "sharded evaluation", [what.split(":")[0], len(calls)]
    clock = iter(range(10**6)) if world.rank else iter(range(0, 10**7, 7))
    step = fl.pipe(plain, fl.grad(), fl.apply(), fl.stop_when(fl.max_time(60)))
    state = [state for state, _ in fl.run(step, placed(), loader(), clock=lambda: float(next(clock)))][-1]
    yield "time", [state.stopped, state.progress.step]
    own = fl.sharded([tuple(t[:4] for t in tensors(4 + i)) for i in range(3 + 2 * world.rank)])
    state = fitted(own)
    yield "lengths", [state.progress.step, state.progress.samples]
    seen = []
    state = fitted(step=lambda model, batch: (seen.append(num_samples(batch)), plain(model, batch))[1])
    yield "parts", seen


def kept(folder):
    """A checkpoint in the middle of an epoch holds the metrics of all ranks."""
    state = fitted(max_epochs=None, max_steps=4, dir=f"{folder}/run", save_every=fl.steps(2))
    again = fitted(dir=f"{folder}/run", resume=True, save_every=fl.steps(2))
    return [dict(r.metrics) for r in again.history] == [dict(r.metrics) for r in fitted().history], state.progress.step


def gone_back(folder, places=("ddp", "fsdp")):
    """A run back from a sample that is no number, which one of the ranks has, however the model lies on them."""
    x, y = tensors(24)
    x[7] = torch.nan
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    for name in places:
        place = fl.parallel.fsdp() if name == "fsdp" else None
        options = {"dir": f"{folder}/back {name}", "nonfinite": "rollback", "save_every": fl.steps(2), "max_epochs": 3, "ema": 0.9}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = fitted(data, place=place, **options)
        said = [str(w.message).split(" back to ")[0] for w in told if w.category is fl.errors.FaultWarning]
        whole = {name: p.full_tensor() if is_sharded(p) else p for name, p in state.params.items()}
        yield name, [numbers(whole), state.progress.step, state.progress.skipped, said]


def others():
    """Other ways for gradients to travel, or not to."""
    for name, place in (("bf16", fl.parallel.ddp(comm_hook="bf16")), ("buckets", fl.parallel.ddp(bucket_cap_mb=0.001, static_graph=True))):
        state = fitted(place=place)
        yield name, numbers(state.params)
    for name, given in (("diloco", {}), ("local sgd", {"lr": 1.0, "momentum": 0.0})):
        step = fl.pipe(plain, fl.grad(), fl.apply(), fl.parallel.diloco(fl.steps(3), **given), fl.stop_when(fl.max_steps(6)))
        state = [state for state, _ in fl.run(step, placed(fl.parallel.local_sgd()), loader())][-1]
        yield name, [numbers(state.params), fl.evaluate(state, loader(), eval_step=measured)["loss"]]


def one_pipe():
    """The samples that this rank evaluates when one pipe trains a state that is placed on all ranks, one that is not, and the first kind again."""
    seen = []

    def counted(model, batch):
        seen.append(num_samples(batch))
        return {"n": fl.Sum(num_samples(batch))}

    step = fl.pipe(plain, fl.grad(), fl.apply(), fl.evaluate_every(loader(), fl.at_end, eval_step=counted), fl.stop_when(fl.max_steps(1)))
    for place in (fl.parallel.ddp(), None, fl.parallel.ddp()):
        seen.clear()
        *_, (state, _) = fl.run(step, fl.TrainState.create(task(), place=place), loader())
        yield sum(seen), state.history[-1].metrics["val/n"]


def exact(step="plain"):
    """Weights that do not depend on the number of ranks, bitwise; with dropout, uneven batches and accumulation."""
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    mine = fl.Task(model, STEPS[step], configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=0.05))
    config = fl.FitConfig(max_epochs=2, accumulate=2, exact_ranks=True, clip_norm=0.5, progress=False)
    return numbers(fl.fit(fl.TrainState.create(mine, seed=1), loader(22, 7), config).params)


def main(what, folder):
    with fl.parallel.join() as world:
        found = {"exact": {step: exact(step) for step in ("plain", "weighted")}}
        if what == "all":
            found |= {
                "refused": dict(refused(world, folder)),
                "agreed": dict(agreed(world)),
                "kept": kept(folder),
                "gone back": dict(gone_back(folder)),
                "others": dict(others()),
                "one pipe": list(one_pipe()),
            }
    Path(folder, f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:])
