"""What the law of ranks is tried on: runs whose trajectory must not depend on the number of ranks; also run under torchrun by test_law.py."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fnlight as fl
from tests.laws.combinators import CHOICES, ENTRIES, EVERYTHING, pipe_with
from tests.laws.tasks import TASKS

LEFT_OUT = {
    "carry": "what is carried belongs to the samples of a rank",
    "grad_cache": "its loss is that of all samples at once",
    "compile": "hooks of ranks are in no graph, so it goes on without one",
    "debug_bundle": "it is about failures",
    "exact_ranks": "its two parts are fewer than the ranks; that it does not depend on them, bitwise, is a test of its own",
    "diloco": "it is for ranks that train by themselves",
    "profile": "it is about time",
    "apply_in_backward": "it updates before gradients of ranks are together, so it is refused",
    EVERYTHING: "holds some of these",
}
ROUGH = ("autocast", "autocast fp16", "loss_scale")
"""Computed in sixteen bits, whose sums over half a batch round differently."""


class Noisy(Dataset):
    """Samples with augmentation, drawn from the global generator."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(4), self.y[i]


class Counting:
    """An iterable of which nobody knows more than that it gives batches."""

    def __iter__(self):
        return iter(listed(5, 6))


def tensors(size):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def listed(number, size):
    x, y = tensors(number * size - 1)
    return list(zip(x.split(size), y.split(size), strict=True))


def plain(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"acc": (logits.argmax(-1) == y).float().mean(), "most": fl.Max(logits.detach().amax())}


def weighted(model, batch):
    x, y = batch
    return fl.Mean(F.cross_entropy(model(x), y, reduction="sum"), len(y)), {"seen": fl.Sum(len(y))}


def measured(model, batch):
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "right": fl.Mean((logits.argmax(-1) == y).sum(), len(y)), "cat": fl.Cat(logits, torch.std)}


def far(model, batch):
    return model(batch[0]).square().mean()


def normed(model, batch):
    return plain(model, batch)


def converted(model, batch):
    return plain(model, batch)


STEPS = {
    "plain": plain,
    "converted": converted,
    "weighted": weighted,
    "normed": normed,
    "phases": {"near": plain, "far": fl.Phase(far, fl.clip_norm(0.05), every=fl.steps(2))},
}


def layers(step):
    """A model; with a norm over the samples of all ranks where the step is to see one."""
    if step in (normed, converted):  # no bias before the norm: the loss does not depend on it, and Adam would make steps of the rounding
        return nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)


def task(step=plain):
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Sequential(*layers(step))
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if step is converted else model

    def optimizers(model):
        if isinstance(step, dict):
            return {"near": torch.optim.Adam(model[0].parameters(), lr=0.05), "far": torch.optim.SGD(model[2].parameters(), lr=0.05)}
        return fl.Optim(torch.optim.AdamW(model.parameters(), lr=0.05), schedule=fl.cosine(20))

    return fl.Task(model, step, measured, lambda model, batch: {"top": model(batch[0]).argmax(-1)}, optimizers)


LOADERS = {
    "keyed": lambda: DataLoader(Noisy(26), batch_size=8, shuffle=True),
    "workers": lambda: DataLoader(Noisy(26), batch_size=8, shuffle=True, num_workers=1),
    "uneven": lambda: DataLoader(TensorDataset(*tensors(25)), batch_size=7, shuffle=True),
    "held": lambda: fl.TensorLoader(tensors(25), 8, shuffle=True),
    "listed": lambda: listed(4, 8),
    "iterable": Counting,
    "concat": lambda: fl.concat(listed(2, 8), DataLoader(TensorDataset(*tensors(8)), batch_size=8)),
}
CONFIGS = {
    "accumulate": {"accumulate": 2},
    "clip": {"clip_norm": 0.5, "clip_value": 0.2},
    "ema": {"ema": 0.9},
    "skip": {"nonfinite": "skip"},
    "parts": {"microbatch": 2},
}
RUNS = {
    **{f"data: {name}": ("plain", name, {}) for name in LOADERS},
    **{f"weights: {name}": ("weighted", name, {"accumulate": 2}) for name in ("keyed", "uneven", "iterable")},
    "phases": ("phases", "uneven", {}),
    **{f"norms: {name}": ("normed", name, {"accumulate": 2}) for name in ("keyed", "uneven", "iterable")},
    "norms: of torch": ("converted", "uneven", {"accumulate": 2}),
    **{f"config: {name}": ("plain", "uneven", options) for name, options in CONFIGS.items()},
}


def numbers(named):
    return {name: p.detach().double().flatten().tolist() for name, p in named.items()}


def by_fit(step, loader, options):
    """What `fit`, `evaluate` and `predict` give; in the group that was joined, or alone."""
    sink, val = fl.testing.RecordingSink(), DataLoader(TensorDataset(*tensors(19)), batch_size=4)
    config = fl.FitConfig(max_epochs=2, progress=False, sinks=sink, log_every=fl.steps(3), **options)
    state = fl.TrainState.create(task(STEPS[step]), seed=3, place=fl.parallel.ddp(sync_batchnorm=step == "normed"))
    state = fl.fit(state, fl.Loaders(LOADERS[loader](), val), config)
    p = state.progress
    return {
        "weights": numbers(state.params | state.buffers),
        "counts": [p.step, p.epoch, p.batch, p.samples, p.epoch_samples, p.skipped],
        "history": [dict(r.metrics) for r in state.history],
        "logged": [r.metrics for r in sink.records] if state.store.place is None or state.store.place.writes else None,
        "evaluated": fl.evaluate(state, val),
        "predicted": [out["top"].tolist() for out in fl.collect(fl.predict(state, val))],
    }


def by_pipe(choice, kind, folder):
    """What a pipe with one combinator gives."""
    case = TASKS[kind]
    with fl.tensors.isolated():
        state = fl.TrainState.create(case.make(), seed=0, place=fl.parallel.ddp())
    loader = [tuple(t[:4] for t in batch) for batch in case.batches()]  # four samples: on four ranks one each
    step = fl.pipe(
        pipe_with(choice, state.task, folder, case.batches(2)), *([] if choice == "stop_when" else [fl.stop_when(fl.max_epochs(2))])
    )
    for state, _ in fl.run(step, state, loader):
        if state.progress.epoch >= 2:
            break
    p = state.progress
    return {"weights": numbers(state.params), "counts": [p.step, p.epoch, p.batch, p.samples, p.skipped]}


PIPES = {choice: (choice, "tied weights") for choice in CHOICES if choice not in LEFT_OUT}


def pipes_on(ranks):
    """The pipes that are tried on so many ranks: on more than two, those that work on losses and gradients.

    What wraps a whole step sees a state that is the same on all ranks, or asks all of them in one call; four ranks show nothing there that two
    do not. ``FNLIGHT_LAWS=all`` tries every pipe on every number of ranks.
    """
    if ranks <= 2 or os.environ.get("FNLIGHT_LAWS") == "all":
        return PIPES
    return {name: given for name, given in PIPES.items() if ENTRIES[name].build(Path(), None).takes != "step"}


def everything(folder, ranks=1):
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fl.errors.LoaderWarning)
        warnings.simplefilter("ignore", fl.errors.OptimizerWarning)
        for name, given in RUNS.items():
            found[name] = by_fit(*given)
        for name, given in pipes_on(ranks).items():
            found[name] = by_pipe(*given, Path(folder) / name.replace(" ", "-"))
    return found


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    with fl.parallel.join() as world:
        Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(everything(sys.argv[1], world.size)))
