"""fnlight trains PyTorch modules with pure functions.

A `Task` pairs a model with pure functions; a `TrainState` is an immutable value that holds everything a run needs to go on; a step
maps ``(state, batch)`` to ``(state, metrics)``; and combinators wrap one function into another. `fit` is one composition of them.

Example:
    >>> import torch, fnlight as fl
    >>> def train_step(model, batch):
    ...     x, y = batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> def configure_optimizers(model):
    ...     return torch.optim.SGD(model.parameters(), lr=0.1)
    >>> task = fl.Task(torch.nn.Linear(2, 1), train_step, configure_optimizers=configure_optimizers)
    >>> batches = [(torch.ones(4, 2), torch.ones(4, 1))] * 8
    >>> fl.fit(fl.TrainState.create(task, seed=0), fl.Loaders(train=batches), fl.FitConfig(max_epochs=5, progress=False))
    TrainState(step=40, epoch=5, batch=0, 3 parameters, SGD, stopped: 5 epochs done)

Read on in `fnlight.state`, `fnlight.update`, `fnlight.loop` and `fnlight.fit`.
"""

import gc as _gc
import importlib
from typing import Any as _Any

_collected = _gc.isenabled()
_gc.disable()  # what is made here stays: a full collection in between would go over all that torch has made, for nothing
try:
    from fnlight.averages import average_checkpoints, averaged, ema, ema_warmup, refresh_batch_norm, swa
    from fnlight.bundle import debug_bundle, load_bundle
    from fnlight.checkpoint import (
        LoadReport,
        Retention,
        best,
        best_checkpoint,
        checkpoints,
        every,
        last,
        load,
        load_weights,
        newest,
        restore,
        save,
        verify,
    )
    from fnlight.clip import clip_adaptive, clip_each, clip_norm, clip_quantile, clip_value
    from fnlight.combinator import Combinator
    from fnlight.compile import compile  # noqa: A004  # what everybody in this field calls it
    from fnlight.compose import compose, total_steps
    from fnlight.config import FitConfig
    from fnlight.data import (
        Item,
        LengthBuckets,
        Loaders,
        Source,
        TensorLoader,
        batches,
        concat,
        per_epoch,
        prepare,
        sharded,
        zip_longest,
        zip_shortest,
    )
    from fnlight.errors import (
        BrokenCheckpointError,
        CheckpointError,
        CheckpointWarning,
        CompileWarning,
        ConfigError,
        DonatedStateError,
        FaultWarning,
        FnlightError,
        Interrupted,
        LoaderCheckError,
        LoaderError,
        LoaderWarning,
        LockedError,
        MemoryWarning,
        MismatchError,
        MonitorError,
        NonFiniteError,
        OptimizerError,
        OptimizerWarning,
        ParallelError,
        SeamError,
        StepError,
        TaskCheckError,
        TaskWarning,
    )
    from fnlight.evaluate import evaluate
    from fnlight.fit import fit
    from fnlight.fp8 import to_fp8
    from fnlight.freezing import freeze, unfreeze_at
    from fnlight.garbage import collect_garbage
    from fnlight.history import History, Record
    from fnlight.loop import evaluate_every, log_to, run, stop_when
    from fnlight.losses import carry, grad_cache, weighted
    from fnlight.main import main
    from fnlight.manual import manual
    from fnlight.metrics import Cat, Figure, Histogram, Image, Last, Max, Mean, Min, Sum, Tally, Text
    from fnlight.microbatch import microbatch
    from fnlight.noise import grad_noise
    from fnlight.optim import GroupRule, Lookahead, Optim, frozen, layer_decay, no_decay, optimizer, param_groups
    from fnlight.pipe import Phase, Pipe, pipe
    from fnlight.precision import autocast, cast, to_dtype
    from fnlight.predict import collect, predict
    from fnlight.profile import profile
    from fnlight.protocols import EvalFn, GradFn, Gradients, LossFn, PredictFn, Rule, Schedule, Sink, Step, When
    from fnlight.recompute import recompute
    from fnlight.release import apply_in_backward
    from fnlight.replay import from_torch, plateau
    from fnlight.rng import fold_in, isolated, seed_generators
    from fnlight.rollback import rollback
    from fnlight.rules import diverged, max_epochs, max_steps, max_time, min_epochs, min_steps, nonfinite, patience, reached
    from fnlight.saving import checkpoint_every
    from fnlight.scale import loss_scale
    from fnlight.schedules import (
        constant,
        cosine,
        cosine_restarts,
        cyclic,
        exponential,
        join,
        linear,
        one_cycle,
        polynomial,
        step_decay,
        warmup,
        warmup_cosine,
        wsd,
    )
    from fnlight.signals import Signals
    from fnlight.sinks import CSV, JSONL, Console, TensorBoard, fan_out
    from fnlight.skip import skip_nonfinite, skip_spikes
    from fnlight.state import Progress, Store, TrainState
    from fnlight.task import Task
    from fnlight.update import accumulate, apply, grad, pure, update
    from fnlight.watch import check_finite, epoch_means
    from fnlight.when import Tick, at_end, continuous, epochs, minutes, seconds, steps
finally:
    if _collected:
        if not _gc.get_freeze_count():
            _gc.freeze()
            _gc.unfreeze()  # into the oldest generation, without a look at it
        _gc.enable()

__all__ = [
    "BrokenCheckpointError",
    "CSV",
    "Cat",
    "CheckpointError",
    "CheckpointWarning",
    "Combinator",
    "CompileWarning",
    "ConfigError",
    "Console",
    "DonatedStateError",
    "EvalFn",
    "FaultWarning",
    "Figure",
    "FitConfig",
    "FnlightError",
    "GradFn",
    "Gradients",
    "GroupRule",
    "Histogram",
    "History",
    "Image",
    "Interrupted",
    "Item",
    "JSONL",
    "Last",
    "LengthBuckets",
    "LoadReport",
    "LoaderCheckError",
    "LoaderError",
    "LoaderWarning",
    "Loaders",
    "LockedError",
    "Lookahead",
    "LossFn",
    "Max",
    "Mean",
    "MemoryWarning",
    "Min",
    "MismatchError",
    "MonitorError",
    "NonFiniteError",
    "Optim",
    "OptimizerError",
    "OptimizerWarning",
    "ParallelError",
    "Phase",
    "Pipe",
    "PredictFn",
    "Progress",
    "Record",
    "Retention",
    "Rule",
    "Schedule",
    "SeamError",
    "Signals",
    "Sink",
    "Source",
    "Step",
    "StepError",
    "Store",
    "Sum",
    "Tally",
    "Task",
    "TaskCheckError",
    "TaskWarning",
    "TensorBoard",
    "TensorLoader",
    "Text",
    "Tick",
    "TrainState",
    "When",
    "accumulate",
    "apply",
    "apply_in_backward",
    "at_end",
    "autocast",
    "average_checkpoints",
    "averaged",
    "batches",
    "best",
    "best_checkpoint",
    "carry",
    "cast",
    "check_finite",
    "checkpoint_every",
    "checkpoints",
    "clip_adaptive",
    "clip_each",
    "clip_norm",
    "clip_quantile",
    "clip_value",
    "collect",
    "collect_garbage",
    "compile",
    "compose",
    "concat",
    "constant",
    "continuous",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "debug_bundle",
    "diverged",
    "ema",
    "ema_warmup",
    "epoch_means",
    "epochs",
    "evaluate",
    "evaluate_every",
    "every",
    "exponential",
    "fan_out",
    "fit",
    "fold_in",
    "freeze",
    "from_torch",
    "frozen",
    "grad",
    "grad_cache",
    "grad_noise",
    "isolated",
    "join",
    "last",
    "layer_decay",
    "linear",
    "load",
    "load_bundle",
    "load_weights",
    "log_to",
    "loss_scale",
    "main",
    "manual",
    "max_epochs",
    "max_steps",
    "max_time",
    "microbatch",
    "min_epochs",
    "min_steps",
    "minutes",
    "newest",
    "no_decay",
    "nonfinite",
    "one_cycle",
    "optimizer",
    "param_groups",
    "patience",
    "per_epoch",
    "pipe",
    "plateau",
    "polynomial",
    "predict",
    "prepare",
    "profile",
    "pure",
    "reached",
    "recompute",
    "refresh_batch_norm",
    "restore",
    "rollback",
    "run",
    "save",
    "seconds",
    "seed_generators",
    "sharded",
    "skip_nonfinite",
    "skip_spikes",
    "step_decay",
    "steps",
    "stop_when",
    "swa",
    "to_dtype",
    "to_fp8",
    "total_steps",
    "unfreeze_at",
    "update",
    "verify",
    "warmup",
    "warmup_cosine",
    "weighted",
    "wsd",
    "zip_longest",
    "zip_shortest",
]

__version__ = "0.1.0"

_LATER = ("report", "testing")  # modules of the top floor, imported when somebody asks for them


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return importlib.import_module(f"fnlight.{name}")
    raise AttributeError(f"module 'fnlight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
