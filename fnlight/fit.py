"""`fit`: one standard composition of the parts; `compose` returns the very pipe that it runs."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import attrs
import torch

from fnlight.averages import ema
from fnlight.bundle import EVERY, debug_bundle
from fnlight.checkpoint import checkpoints, newest, restore, writable
from fnlight.checkpoint.lock import held
from fnlight.clip import clip_norm, clip_value
from fnlight.compile import compile  # noqa: A004  # what everybody in this field calls it
from fnlight.config import FitConfig
from fnlight.data import Loaders, Source, group_at, placed
from fnlight.errors import BrokenCheckpointError, CheckpointWarning, ConfigError, Interrupted, LoaderError, OptimizerWarning, TaskWarning
from fnlight.evaluate import evaluate
from fnlight.loop import evaluate_every, log_to, run, stop_when
from fnlight.microbatch import microbatch
from fnlight.optim import Optim, ends, monitored
from fnlight.pipe import Combinator, Pipe, pipe
from fnlight.precision import autocast, cast, casts
from fnlight.saving import checkpoint_every
from fnlight.scale import loss_scale
from fnlight.signals import Signals
from fnlight.sinks import Console
from fnlight.skip import skip_nonfinite
from fnlight.state import Task, TrainState
from fnlight.update import accumulate, apply, grad
from fnlight.watch import check_finite, epoch_means
from fnlight.when import epochs, seconds, steps

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16, "fp64": torch.float64}
_ALL_BUT_NOTHING = 1e-3  # a factor of the learning rate below which nobody means to train on
_EVERY_TICK = seconds(0.1)  # how often the console is given numbers; it draws when it likes


def fit(state: TrainState, loaders: Any, config: FitConfig) -> TrainState:
    """Train a state on loaders as a configuration says, and return the state where it ended.

    Args:
        state: Where training stands; it is left as it was, unless ``config.donate``.
        loaders: `Loaders`, or just a training loader.
        config: How.

    Returns:
        A state whose `stopped` says why the run ended and whose `history` prints as a table.

    Raises:
        ConfigError: If state, loaders and configuration do not fit, before any work.
        LoaderError: If a loader is missing or empty.
        StepError: If a step function returns what it must not.

    Example:
        >>> from torch import nn
        >>> task = Task(nn.Linear(1, 1), lambda model, batch: (model(batch) - batch).square().mean(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = [torch.ones(2, 1), torch.zeros(2, 1)]
        >>> state = fit(TrainState.create(task, seed=0), data, FitConfig(max_epochs=3, progress=False))
        >>> state
        TrainState(step=6, epoch=3, batch=0, 2 parameters, SGD, stopped: 3 epochs done)
    """
    given = _loaders(loaders)
    config = _dev_run(state, config) if config.fast_dev_run else config
    train = _train_source(given, config)
    with Signals(deadline=config.signals_deadline) if config.signals else nullcontext() as signals, held(config.dir) as locks:
        state = _placed(_counted(_resumed(state, config), train, config), config)
        with settings(config):
            step = compose(state.task, config, given, signals)
            _preflight(state, given, config, step, signals)
            _write_config(config)
            state.store.resources.update(locks)
            return _drain(run(step, state, train, donate=True, signals=signals))


def compose(task: Task, config: FitConfig, loaders: Any = None, signals: Signals | None = None) -> Pipe:
    """The very pipe that `fit` runs; ``print`` shows it.

    Args:
        task: Gives the `train_step`.
        config: How.
        loaders: `Loaders`, or a training loader; without ``loaders.val`` nothing is evaluated.
        signals: What listens for signals, if anything does; for `run` as well.

    Returns:
        A pipe, for `run`, or to be wrapped further.

    Raises:
        ConfigError: If the configuration needs what the loaders do not have.

    Example:
        >>> task = Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean())
        >>> print(compose(task, FitConfig(max_steps=10, clip_norm=1.0, progress=False)))
        <lambda> > grad > clip_norm(1.0) > apply > check_finite(every=epochs(1)) > epoch_means > stop_when(max_steps(10))
    """
    given = _loaders(loaders) if loaders is not None else Loaders()
    whole = compile(config.compile, unroll=config.unroll) if config.compile is not None else None  # pyright: ignore[reportArgumentType]  # a validated text
    parts: list[Combinator | None] = [
        whole if config.compile == "model" else None,
        _precision(config),
        grad(),
        accumulate(config.accumulate) if config.accumulate != 1 else None,
        microbatch(config.microbatch) if config.microbatch is not None else None,
        loss_scale() if config.precision == "fp16" else None,
        skip_nonfinite() if config.nonfinite == "skip" and config.precision != "fp16" else None,
        clip_value(config.clip_value) if config.clip_value else None,
        clip_norm(config.clip_norm) if config.clip_norm else None,
        apply(),
        ema(config.ema) if config.ema is not None else None,
        whole if config.compile != "model" else None,
        check_finite(every=_looked_at(config)) if config.nonfinite == "raise" else None,
        debug_bundle(config.dir, config=_text(config)) if config.debug_bundle and config.dir else None,
        _evaluation(task, config, given, signals),
        epoch_means(),
        log_to(*config.sinks, every=config.log_every) if config.sinks else None,
        log_to(Console(total_steps=_total_steps(given, config)), every=_EVERY_TICK, name="progress") if config.progress else None,
        checkpoint_every(config.dir, config.save_every, config.keep, permanent=config.permanent, background=config.save_in_background)
        if config.dir
        else None,
        stop_when(config.bounds),
    ]
    return pipe(task.train_step, *_fitting(task, [part for part in parts if part is not None]))


def _fitting(task: Task, parts: list[Combinator]) -> list[Combinator]:
    """The combinators; where the task has a whole step already, those behind it."""
    if not isinstance(task.train_step, Pipe) or task.train_step.kind != "step":
        return parts
    foreign = [str(part) for part in parts if part.takes != "step" and part.name not in ("grad", "apply")]
    if foreign:
        raise ConfigError(
            f"the task's train_step is a whole step, {task.train_step}, so there is no place for {', '.join(foreign)} in it; leave that out of FitConfig"
        )
    return [part for part in parts if part.takes == "step"]


def _evaluation(task: Task, config: FitConfig, loaders: Loaders, signals: Signals | None) -> Combinator | None:
    if loaders.val is None or config.eval_every is None:
        if config.eval_every not in (None, epochs(1)):
            raise ConfigError(f"FitConfig(eval_every={config.eval_every!r}) needs data to evaluate on; give fl.Loaders(train=..., val=...)")
        return None
    weights, eval_step = "ema" if config.ema is not None else None, _eval_step(task, config)
    return evaluate_every(loaders.val, config.eval_every, eval_step=eval_step, weights=weights, limit=config.limit_eval, signals=signals)


def _precision(config: FitConfig) -> Combinator | None:
    wanted = _AUTOCAST.get(config.precision)
    return autocast(wanted) if wanted else cast(_TRUE[config.precision]) if config.precision in _TRUE else None


def _eval_step(task: Task, config: FitConfig) -> Callable[[Any, Any], Any] | None:
    precision = _precision(config)
    return None if precision is None or task.eval_step is None else precision(task.eval_step)


def _looked_at(config: FitConfig) -> Callable[[Any], bool]:
    """Where a loss must be known to be finite: wherever something is kept or shown that would hide that it is not."""
    whole: Any = epochs(1)
    if config.debug_bundle:
        whole = whole | steps(EVERY)
    others = (config.eval_every, *((config.save_every, config.permanent) if config.dir else ()), config.log_every if config.sinks else None)
    for when in others:
        if when is not None and when != epochs(1):
            whole = whole | when
    return whole


def total_steps(config: FitConfig, loaders: Any) -> int:
    """The optimizer steps at which a run ends at the latest, counted from step 0: what schedules want to know.

    Nothing is loaded, and neither argument is changed. ``fast_dev_run`` does not count: it tries a run, schedule and all.

    Args:
        config: Its ``max_epochs``, ``max_steps``, ``accumulate`` and ``limit_train`` count.
        loaders: `Loaders`, or just a training loader; its length counts.

    Returns:
        The number of steps.

    Raises:
        ConfigError: If it cannot be known: only a time or a rule bounds the run, or the loader has no length.

    Example:
        >>> config = FitConfig(max_epochs=3, accumulate=4)
        >>> total_steps(config, [torch.ones(2, 1)] * 10)
        9
    """
    found = _total_steps(_loaders(loaders), config)
    if found is None:
        why = "its training loader has no length" if config.max_epochs is not None else "neither max_epochs nor max_steps bounds it"
        raise ConfigError(f"the steps of this run cannot be counted beforehand: {why}; give FitConfig(max_steps=...)")
    return found


def _total_steps(loaders: Loaders, config: FitConfig) -> int | None:
    """Steps at which the run ends at the latest, if that is known before it starts."""
    bounds = [config.max_steps] if config.max_steps is not None else []
    if config.max_epochs is not None and loaders.train is not None:
        num_batches = _train_source(loaders, config).num_batches
        if num_batches is not None:
            bounds.append(sum(-(-num_batches // group_at(config.accumulate, epoch)) for epoch in range(config.max_epochs)))
    return min(bounds, default=None)


def _check_ends(optim: Optim, loaders: Loaders, config: FitConfig) -> None:
    """A schedule that ends before the run does would train on with a learning rate of nothing, or fail in the middle."""
    known = {"step": _total_steps(loaders, config), "epoch": config.max_epochs}.get(optim.interval)
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
            warnings.warn(
                f"{what}: it holds its last factor, {schedule(total):g}, and next to nothing is learned from there on; make it longer, as in total=fl.total_steps(config, loaders)",
                OptimizerWarning,
                stacklevel=4,
            )


def _loaders(given: Any) -> Loaders:
    return given if isinstance(given, Loaders) else Loaders(train=given)


def _train_source(loaders: Loaders, config: FitConfig) -> Source:
    if loaders.train is None:
        raise LoaderError("fit needs training data, but there is none; give fl.Loaders(train=...)")
    overfit = config.overfit_batches
    return Source(loaders.train, limit=overfit or config.limit_train, shuffle=not overfit)


def _dev_run(state: TrainState, config: FitConfig) -> FitConfig:
    n = int(config.fast_dev_run)
    return attrs.evolve(
        config, max_epochs=state.progress.epoch + 1, max_steps=None, max_time=None, stop=None, min_epochs=0, min_steps=0,
        limit_train=n, overfit_batches=0, limit_eval=n, eval_every=epochs(1), sanity_batches=0,
        dir=None, debug_bundle=False, save_every=epochs(1), permanent=None, save_in_background=True, keep=attrs.fields(FitConfig).keep.default, sinks=(), log_every=attrs.fields(FitConfig).log_every.default,
    )  # fmt: skip


def _resumed(state: TrainState, config: FitConfig) -> TrainState:
    """The state to go on from; whatever it is, it may be donated."""
    found = newest(config.dir) if config.dir is not None else None
    if found is not None and not config.resume:
        raise ConfigError(
            f"{config.dir} holds a run already, up to {os.path.basename(found)}; go on from it with FitConfig(resume=True), or give another dir"
        )
    if found is not None:
        resumed = restore(found, state, allow=[each for each in config.allow if each != "batch_size"], rename=config.rename)
        if resumed.seed != state.seed:
            warnings.warn(
                f"the run in {config.dir} has seed {resumed.seed}, which decides its data order, but the state has {state.seed}; {resumed.seed} is used",
                CheckpointWarning,
                stacklevel=3,
            )
        return resumed
    broken = checkpoints(config.dir) if config.dir is not None else []
    if broken:
        raise BrokenCheckpointError(
            f"none of the {len(broken)} checkpoints of {config.dir} is sound, so there is nothing to go on from, and starting afresh there would "
            "overwrite them; look at fl.verify(path), restore them from a copy, or give another dir"
        )
    return state if config.donate else state.copy()


def _counted(state: TrainState, train: Source, config: FitConfig) -> TrainState:
    """The state, its place in the epoch counted in batches of today's size."""
    before = state.progress
    after = placed(train, before, earlier="batch_size" in config.allow)
    if after.samples != before.samples:
        warnings.warn(
            f"the batches have another size than when the state was saved: the run goes back from sample {before.epoch_samples} of epoch "
            f"{before.epoch} to {after.epoch_samples}, where one ends, and sees those between twice",
            CheckpointWarning,
            stacklevel=3,
        )
    return state if after is before else attrs.evolve(state, progress=after)


def _placed(state: TrainState, config: FitConfig) -> TrainState:
    device = torch.device(_auto_device() if config.device == "auto" else config.device)
    if device.type == state.device.type and device.index in (None, state.device.index):
        return state
    return state.moved(device)


def _auto_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


@contextmanager
def settings(config: FitConfig) -> Iterator[None]:
    """Torch's modes as a configuration asks for them, put back afterwards.

    Args:
        config: Its ``deterministic``, ``detect_anomaly`` and ``matmul_precision``.

    Example:
        >>> with settings(FitConfig(max_steps=1, detect_anomaly=True)):
        ...     torch.is_anomaly_enabled()
        True
        >>> torch.is_anomaly_enabled()
        False
    """
    with ExitStack() as stack:
        if config.deterministic:
            before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, before, warn_only=warn)
            torch.use_deterministic_algorithms(True)
        if config.detect_anomaly:
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
        if config.matmul_precision is not None:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(config.matmul_precision)
        yield


def _preflight(state: TrainState, loaders: Loaders, config: FitConfig, step: Pipe, signals: Signals | None) -> None:
    """What can be known to be wrong before the first step."""
    _check_alone(config)
    _check_precision(state, config, step)
    for name, optim in state.store.optims.items():
        if (
            getattr(state.task.train_step[name] if name in step.phases else None, "every", None) is None
        ):  # else nobody knows how often it is due
            _check_ends(optim, loaders, config)
    if config.dir is not None:
        writable(config.dir)
    if state.store.params and not state.store.module.training:
        warnings.warn(
            "the model is in eval mode: dropout is off and BatchNorm does not learn its statistics; if that is not meant, call model.train() "
            "before fl.Task(model, ...)",
            TaskWarning,
            stacklevel=3,
        )
    asked = [name for c in step.combinators for name in c.monitors if name.startswith("val/")]
    monitors = [optim.monitor for optim in state.store.optims.values()]
    watched = [name for name in monitors if name is not None and name.startswith("val/")]
    wanted = list(dict.fromkeys((*asked, *watched)))
    unseen = [name for name in wanted if not any(name in record.metrics for record in state.history)]
    evaluates = loaders.val is not None and config.eval_every is not None
    if asked and evaluates:  # a schedule that has nothing to watch yet holds its factor: a part of a run may end before
        _check_reachable(config, asked)
    if evaluates and (config.sanity_batches or unseen):
        batches = config.sanity_batches or 1
        try:
            found = evaluate(state, loaders.val, eval_step=_eval_step(state.task, config), limit=batches, signals=signals)
        except Interrupted:
            return  # the run ends before its first step
        trial = attrs.evolve(state, history=type(state.history)()).recorded({f"val/{k}": v for k, v in found.items()})
        for name in unseen:
            monitored(trial.history, name)


def _check_precision(state: TrainState, config: FitConfig, step: Pipe) -> None:
    if config.precision in _TRUE:
        step.adopt(state)  # which casts the state, for the evaluation before the first step
    elif held := casts(state.store.memory):
        dtype = held[0]["dtype"]
        wrong = f"the state was trained with weights in {dtype}, but FitConfig(precision={config.precision!r}) computes otherwise"
        raise ConfigError(f"{wrong}; give the precision that it had, or convert it with fl.to_dtype(state, torch.float32)")


def _check_alone(config: FitConfig) -> None:
    """Several processes would each train a model of their own, and nobody would notice."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel == "auto" and world > 1:
        raise ConfigError(
            f"this process is one of {world}, but this version of fnlight trains in one; start one process, "
            "or let each train for itself with FitConfig(parallel=None)"
        )


def _check_reachable(config: FitConfig, wanted: list[str]) -> None:
    earliest = getattr(config.eval_every, "earliest", (0, 0))
    for unit, first, most in (("steps", earliest[0], config.max_steps), ("epochs", earliest[1], config.max_epochs)):
        if most is not None and 0 < most < first:
            raise ConfigError(
                f"{wanted[0]!r} is monitored, but the first evaluation would be after {first} {unit} (eval_every={config.eval_every!r}) "
                f"and the run ends after {most}: it could never fire; evaluate earlier"
            )


def _write_config(config: FitConfig) -> None:
    if config.dir is None or "://" in config.dir:
        return
    text = _text(config)
    if text is None:
        return
    os.makedirs(config.dir, exist_ok=True)
    with open(os.path.join(config.dir, "config.json"), "w", encoding="utf-8") as file:
        file.write(text + "\n")


def _text(config: FitConfig) -> str | None:
    """The configuration as JSON; None if it holds a function of the user's own, which has no text."""
    try:
        return config.to_json()
    except ConfigError:
        return None


def _drain(steps: Iterator[Any]) -> TrainState:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
