"""fnlight trains PyTorch modules with pure functions.

A `Task` pairs a model with pure functions; a `TrainState` is an immutable value that holds everything a run needs to continue; a step
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

See `fnlight.state`, `fnlight.step.update`, `fnlight.loop.run` and `fnlight.fit.fit` next.
"""

import gc as _gc
import importlib
from typing import Any as _Any

_collected = _gc.isenabled()
_gc.disable()  # the objects created here are permanent: a full collection would scan all objects of torch for nothing
try:
    from fnlight import errors  # noqa: F401  # what fnlight raises and warns of
    from fnlight.checkpoint import best, best_checkpoint, checkpoints, every, last, load, load_weights, newest, restore, save, verify
    from fnlight.compile import compile  # noqa: A004  # what everybody in this field calls it
    from fnlight.data import LengthBuckets, Loaders, TensorLoader, batches, concat, per_epoch, prepare, sharded, zip_longest, zip_shortest
    from fnlight.fit import FitConfig, compose, fit, main, total_steps
    from fnlight.gradients import (
        accumulate,
        carry,
        clip_adaptive,
        clip_each,
        clip_norm,
        clip_quantile,
        clip_value,
        freeze,
        grad,
        grad_cache,
        grad_noise,
        microbatch,
        recompute,
        unfreeze_at,
        weighted,
    )
    from fnlight.loop import (
        checkpoint_every,
        collect,
        collect_garbage,
        epoch_means,
        evaluate,
        evaluate_every,
        log_to,
        predict,
        profile,
        run,
        stop_when,
    )
    from fnlight.metrics import Cat, Figure, Histogram, Image, Last, Max, Mean, Min, Sum, Text
    from fnlight.nonfinite import check_finite, debug_bundle, load_bundle, rollback, skip_nonfinite, skip_spikes
    from fnlight.optim import Lookahead, Optim, frozen, layer_decay, no_decay, optimizer, param_groups
    from fnlight.pipe import Combinator, Phase, Pipe, pipe
    from fnlight.precision import autocast, cast, loss_scale, to_dtype, to_fp8
    from fnlight.runtime import Signals
    from fnlight.schedules import (
        constant,
        cosine,
        cosine_restarts,
        cyclic,
        exponential,
        from_torch,
        join,
        linear,
        one_cycle,
        plateau,
        polynomial,
        step_decay,
        warmup,
        warmup_cosine,
        wsd,
    )
    from fnlight.sinks import CSV, JSONL, Console, TensorBoard, fan_out
    from fnlight.state import Task, TrainState
    from fnlight.step import (
        apply,
        apply_in_backward,
        average_checkpoints,
        averaged,
        ema,
        ema_warmup,
        manual,
        pure,
        refresh_batch_norm,
        swa,
        update,
    )
    from fnlight.triggers import (
        at_end,
        continuous,
        diverged,
        epochs,
        max_epochs,
        max_steps,
        max_time,
        min_epochs,
        min_steps,
        minutes,
        nonfinite,
        patience,
        reached,
        seconds,
        steps,
    )
finally:
    if _collected:
        if not _gc.get_freeze_count():
            _gc.freeze()
            _gc.unfreeze()  # moves all objects into the oldest generation without scanning them
        _gc.enable()

__all__ = [
    "CSV",
    "Cat",
    "Combinator",
    "Console",
    "Figure",
    "FitConfig",
    "Histogram",
    "Image",
    "JSONL",
    "Last",
    "LengthBuckets",
    "Loaders",
    "Lookahead",
    "Max",
    "Mean",
    "Min",
    "Optim",
    "Phase",
    "Pipe",
    "Signals",
    "Sum",
    "Task",
    "TensorBoard",
    "TensorLoader",
    "Text",
    "TrainState",
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
    "freeze",
    "from_torch",
    "frozen",
    "grad",
    "grad_cache",
    "grad_noise",
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

_LATER = ("report", "testing")  # packages of the top floor, imported on first use


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return importlib.import_module(f"fnlight.{name}")
    raise AttributeError(f"module 'fnlight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
