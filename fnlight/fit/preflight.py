"""The checks before the first step of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from fnlight.checkpoint import check_savable, writable
from fnlight.data import Loaders, Sharded, Source, inexact
from fnlight.errors import ConfigError, Interrupted, LoaderError, LoaderWarning, OptimizerWarning, TaskWarning, warn
from fnlight.fit.compose import TRUE, eval_step_of, known_steps
from fnlight.fit.config import FitConfig
from fnlight.loop import evaluate
from fnlight.optim import Optim, ends, monitored
from fnlight.pipe import Pipe, check_monitors
from fnlight.precision import casts
from fnlight.runtime import Signals
from fnlight.state import TrainState

_ALL_BUT_NOTHING = 1e-3  # below this factor of the learning rate, training on is almost surely a mistake
_RECORDED = "for 'val/...', give fl.Loaders(train=..., val=...) and leave FitConfig(eval_every=...) set; 'train/...' is always recorded"


def preflight(state: TrainState, loaders: Loaders, config: FitConfig, step: Pipe, signals: Signals | None = None) -> None:
    """Check everything that can be checked before the first step: raise an error, or warn.

    Args:
        state: The state that the run starts from.
        loaders: The loaders of the run.
        config: The configuration of the run.
        step: The pipe of the run.
        signals: The signal handlers, or None; a signal ends the trial evaluation.

    Raises:
        CheckpointError: If the state holds what cannot be saved, and is to be.
        ConfigError: If state, loaders and configuration do not fit.
        LoaderError: If a loader can be gone over only once, but would be twice.

    Example:
        >>> import torch
        >>> from fnlight.fit.fit import compose
        >>> from fnlight.state import Task
        >>> task = Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> config = FitConfig(max_steps=1, progress=False)
        >>> preflight(TrainState.create(task), Loaders(train=[1]), config, compose(task, config))
    """
    check_monitors(state, step.combinators, advice=_RECORDED)
    _check_precision(state, config, step)
    for name, optim in state.store.optims.items():
        if (
            getattr(state.task.train_step[name] if name in step.phases else None, "every", None) is None
        ):  # with a trigger, the number of its updates is unknown
            _check_ends(optim, loaders, config)
    if config.dir is not None:
        writable(config.dir)
        if state.store.place is None:  # of several ranks, each has its own part
            check_savable(state)
        _check_resumes(loaders.train)
    if state.store.params and not state.store.module.training:
        warn(
            "the model is in eval mode: dropout is off, and BatchNorm does not update its statistics; if this is not intended, call "
            "model.train() before fl.Task(model, ...)",
            TaskWarning,
        )
    asked = [name for c in step.combinators for name in c.requires if name.startswith("val/")]
    monitors = [optim.monitor for optim in state.store.optims.values()]
    watched = [name for name in monitors if name is not None and name.startswith("val/")]
    wanted = list(dict.fromkeys((*asked, *watched)))
    unseen = [name for name in wanted if not any(name in record.metrics for record in state.history)]
    evaluates = loaders.val is not None and config.eval_every is not None
    if asked and evaluates:  # not for schedules: one that has no value yet keeps its factor, and a short run may end before the first
        _check_reachable(config, asked)
    if evaluates and (config.sanity_batches or unseen):
        batches = config.sanity_batches or 1
        _check_again(loaders.val)
        try:
            found = evaluate(state, loaders.val, eval_step=eval_step_of(state.task, config), limit=batches, signals=signals)
        except Interrupted:
            return  # the run ends before its first step
        trial = attrs.evolve(state, history=type(state.history)()).recorded({f"val/{k}": v for k, v in found.items()})
        for name in unseen:
            monitored(trial.history, name)


def _check_resumes(loader: Any) -> None:
    """Warn, as a run that saves begins, of data on which it could not be resumed exactly."""
    why = inexact(loader.loader if isinstance(loader, Source | Sharded) else loader)
    if why is not None:
        warn(f"a run on this loader can be saved, but not resumed exactly in the middle of an epoch: {why}", LoaderWarning)


def _check_precision(state: TrainState, config: FitConfig, step: Pipe) -> None:
    if config.precision in TRUE:
        step.adopt(state)  # this casts the state, for the evaluation before the first step
    elif held := casts(state.store.memory):
        dtype = held[0]["dtype"]
        wrong = f"the state was trained with weights in {dtype}, but FitConfig(precision={config.precision!r}) needs float32 weights"
        raise ConfigError(f"{wrong}; give the precision of the earlier run, or convert the state with fl.to_dtype(state, torch.float32)")


def _check_again(loader: Any) -> None:
    """Refuse an iterator: the batches of the trial evaluation would be missing in the first real one."""
    for name, each in loader.items() if isinstance(loader, Mapping) else (("val", loader),):
        if isinstance(each, Iterator):
            raise LoaderError(
                f"the loader {name!r} is an iterator ({type(each).__name__}), which can be iterated only once, but fit also tries an evaluation "
                "before the first step; pass an iterable that can be iterated again, such as a DataLoader or a list"
            )


def _check_reachable(config: FitConfig, wanted: list[str]) -> None:
    earliest = getattr(config.eval_every, "earliest", (0, 0))
    for unit, first, most in (("steps", earliest[0], config.max_steps), ("epochs", earliest[1], config.max_epochs)):
        if most is not None and 0 < most < first:
            raise ConfigError(
                f"{wanted[0]!r} is monitored, but the first evaluation would be after {first} {unit} (eval_every={config.eval_every!r}) "
                f"and the run ends after {most}, so it would never have a value; give an earlier eval_every"
            )


def _check_ends(optim: Optim, loaders: Loaders, config: FitConfig) -> None:
    """A schedule that is shorter than the run would continue with a learning rate near zero, or fail during the run."""
    known = {"step": known_steps(loaders, config), "epoch": config.max_epochs}.get(optim.interval)
    if known is None or config.fast_dev_run:
        return
    last = (known - 1) // optim.frequency  # the argument of the schedule at the last update
    for key, schedule, total, holds in ends(optim):
        what = f"the schedule of {key!r}, {schedule}, ends at {optim.interval} {total * optim.frequency}, but the run has {known}"
        if last > total and not holds:
            raise ConfigError(
                f"{what}, so it would raise an error during the run; make it longer, as in total_steps=fl.total_steps(config, loaders), or the run shorter"
            )
        if last > total and holds and key == "lr" and schedule(total) < _ALL_BUT_NOTHING:
            warn(
                f"{what}: it keeps its last factor, {schedule(total):g}, so almost nothing is learned after that; make it longer, as in total=fl.total_steps(config, loaders)",
                OptimizerWarning,
            )
