"""What can be known to be wrong before the first step of a run."""

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
from fnlight.pipe import Pipe
from fnlight.precision import casts
from fnlight.runtime import Signals
from fnlight.state import TrainState

_ALL_BUT_NOTHING = 1e-3  # a factor of the learning rate below which nobody means to train on


def preflight(state: TrainState, loaders: Loaders, config: FitConfig, step: Pipe, signals: Signals | None = None) -> None:
    """Refuse, or warn of, what can be known to be wrong before the first step.

    Args:
        state: Where the run is to go on from.
        loaders: What it is to read.
        config: How.
        step: The pipe that it is to run.
        signals: What listens; when a signal comes, the evaluation that is tried is given up.

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
    _check_precision(state, config, step)
    for name, optim in state.store.optims.items():
        if (
            getattr(state.task.train_step[name] if name in step.phases else None, "every", None) is None
        ):  # else nobody knows how often it is due
            _check_ends(optim, loaders, config)
    if config.dir is not None:
        writable(config.dir)
        if state.store.place is None:  # of several ranks, each has its own part
            check_savable(state)
        _check_resumes(loaders.train)
    if state.store.params and not state.store.module.training:
        warn(
            "the model is in eval mode: dropout is off and BatchNorm does not learn its statistics; if that is not meant, call model.train() "
            "before fl.Task(model, ...)",
            TaskWarning,
        )
    asked = [name for c in step.combinators for name in c.requires if name.startswith("val/")]
    monitors = [optim.monitor for optim in state.store.optims.values()]
    watched = [name for name in monitors if name is not None and name.startswith("val/")]
    wanted = list(dict.fromkeys((*asked, *watched)))
    unseen = [name for name in wanted if not any(name in record.metrics for record in state.history)]
    evaluates = loaders.val is not None and config.eval_every is not None
    if asked and evaluates:  # a schedule that has nothing to watch yet holds its factor: a part of a run may end before
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
        step.adopt(state)  # which casts the state, for the evaluation before the first step
    elif held := casts(state.store.memory):
        dtype = held[0]["dtype"]
        wrong = f"the state was trained with weights in {dtype}, but FitConfig(precision={config.precision!r}) computes otherwise"
        raise ConfigError(f"{wrong}; give the precision that it had, or convert it with fl.to_dtype(state, torch.float32)")


def _check_again(loader: Any) -> None:
    """Refuse, before a batch is tried, what would lack it in the evaluation."""
    for name, each in loader.items() if isinstance(loader, Mapping) else (("val", loader),):
        if isinstance(each, Iterator):
            raise LoaderError(
                f"the loader {name!r} is an iterator ({type(each).__name__}), which can be gone over only once, but an evaluation is tried before the "
                "first step; pass an iterable that begins anew each time, such as a DataLoader or a list"
            )


def _check_reachable(config: FitConfig, wanted: list[str]) -> None:
    earliest = getattr(config.eval_every, "earliest", (0, 0))
    for unit, first, most in (("steps", earliest[0], config.max_steps), ("epochs", earliest[1], config.max_epochs)):
        if most is not None and 0 < most < first:
            raise ConfigError(
                f"{wanted[0]!r} is monitored, but the first evaluation would be after {first} {unit} (eval_every={config.eval_every!r}) "
                f"and the run ends after {most}: it could never fire; evaluate earlier"
            )


def _check_ends(optim: Optim, loaders: Loaders, config: FitConfig) -> None:
    """A schedule that ends before the run does would train on with a learning rate of nothing, or fail in the middle."""
    known = {"step": known_steps(loaders, config), "epoch": config.max_epochs}.get(optim.interval)
    if known is None or config.fast_dev_run:
        return
    last = (known - 1) // optim.frequency  # what the last update is given
    for key, schedule, total, holds in ends(optim):
        what = f"the schedule of {key!r}, {schedule}, ends at {optim.interval} {total * optim.frequency}, but the run goes on to {known}"
        if last > total and not holds:
            raise ConfigError(
                f"{what}, and there it would fail; make it longer, as in total_steps=fl.total_steps(config, loaders), or the run shorter"
            )
        if last > total and holds and key == "lr" and schedule(total) < _ALL_BUT_NOTHING:
            warn(
                f"{what}: it holds its last factor, {schedule(total):g}, and next to nothing is learned from there on; make it longer, as in total=fl.total_steps(config, loaders)",
                OptimizerWarning,
            )
