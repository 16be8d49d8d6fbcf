"""`compose`: the pipe for a configuration, with the order of all combinators in one place."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fnlight.compile import compile  # noqa: A004  # what everybody in this field calls it
from fnlight.data import Loaders, Source
from fnlight.errors import ConfigError, LoaderError, check_type
from fnlight.fit.config import FitConfig
from fnlight.gradients import accumulate, clip_norm, clip_value, grad, microbatch, recompute
from fnlight.loop import checkpoint_every, collect_garbage, epoch_means, evaluate_every, log_to, profile, stop_when
from fnlight.nonfinite import EVERY, check_finite, debug_bundle, rollback, skip_nonfinite
from fnlight.parallel import exact_ranks
from fnlight.pipe import Combinator, Pipe, batches_at, pipe
from fnlight.precision import autocast, cast, loss_scale
from fnlight.runtime import A_SIGNALS, Signals
from fnlight.sinks import Console
from fnlight.state import Task
from fnlight.step import apply, apply_in_backward, ema
from fnlight.triggers import epochs, seconds

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8 replaces layers, see fnlight.precision.fp8
TRUE = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16, "fp64": torch.float64}
_EVERY_TICK = seconds(0.1)  # how often the console gets numbers; it decides itself when to draw


def compose(task: Task, config: FitConfig, loaders: Any = None, signals: Signals | None = None) -> Pipe:
    """The pipe that `fit` runs; ``print`` shows it.

    Args:
        task: Gives the `train_step`.
        config: The configuration.
        loaders: `Loaders`, or a training loader; without ``loaders.val`` nothing is evaluated.
        signals: The signal handlers, or None; pass the same ones to `run`.

    Returns:
        A pipe. Give it to `run`, or wrap more combinators around it.

    Raises:
        ConfigError: If the configuration needs a loader that is missing.

    Example:
        >>> task = Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean())
        >>> print(compose(task, FitConfig(max_steps=10, clip_norm=1.0, progress=False)))
        <lambda> > grad > clip_norm(1.0) > apply > check_finite(every=epochs(1)) > epoch_means > stop_when(max_steps(10))
    """
    _check(task, config, signals)
    given = loaders_of(loaders) if loaders is not None else Loaders()
    whole = compile(config.compile, unroll=config.unroll) if config.compile is not None else None  # pyright: ignore[reportArgumentType]  # a validated text
    parts: list[Combinator | None] = [
        whole if config.compile == "model" else None,
        recompute(*config.recompute) if config.recompute else None,
        _precision(config),
        grad(),
        exact_ranks(config.accumulate) if config.exact_ranks else accumulate(config.accumulate) if config.accumulate != 1 else None,
        microbatch(config.microbatch) if config.microbatch is not None else None,
        *_skipping(config),
        clip_value(config.clip_value) if config.clip_value else None,
        clip_norm(config.clip_norm) if config.clip_norm else None,
        apply_in_backward() if config.apply_in_backward else apply(),
        *_averaged(task, ema(config.ema) if config.ema is not None else None, whole if config.compile != "model" else None),
        _finite(config),
        debug_bundle(config.dir, config=text_of(config)) if config.debug_bundle and config.dir else None,
        _evaluation(task, config, given, signals),
        epoch_means(),
        log_to(*config.sinks, every=config.log_every, wall_time=config.log_times) if config.sinks else None,
        log_to(Console(total_steps=known_steps(given, config)), every=_EVERY_TICK, name="progress", wall_time=True)
        if config.progress
        else None,
        checkpoint_every(
            config.dir,
            config.save_every,
            config.keep,
            permanent=config.permanent,
            background=config.save_in_background,
            initial=config.nonfinite == "rollback",
            finite=config.nonfinite != "ignore",
        )
        if config.dir
        else None,
        _traces(config),
        collect_garbage() if config.gc == "managed" else None,
        stop_when(config.bounds),
    ]
    return pipe(task.train_step, *_fitting(task, [part for part in parts if part is not None]))


def _check(task: Any, config: Any, signals: Any) -> None:
    check_type("compose(task, ...)", task, Task, "a Task")
    check_type("compose(..., config)", config, FitConfig, "a FitConfig")
    check_type("compose(signals=...)", signals, Signals | None, A_SIGNALS)


def _averaged(task: Task, average: Combinator | None, whole: Combinator | None) -> list[Combinator | None]:
    """Averaged weights and `compile`: where a step is one update, the average comes first and so is part of the graph."""
    one = not isinstance(task.train_step, Mapping) and not (isinstance(task.train_step, Pipe) and task.train_step.kind == "step")
    return [average, whole] if one else [whole, average]


def _fitting(task: Task, parts: list[Combinator]) -> list[Combinator]:
    """The combinators; where the task's `train_step` is a whole step already, only those that wrap a step."""
    if not isinstance(task.train_step, Pipe) or task.train_step.kind != "step":
        return parts
    foreign = [str(part) for part in parts if part.takes != "step" and part.name not in ("grad", "apply")]
    if foreign:
        raise ConfigError(
            f"the task's train_step is a whole step already, {task.train_step}, so FitConfig cannot add {', '.join(foreign)} inside of it; "
            "leave that option out of FitConfig, or add the combinator to the step"
        )
    return [part for part in parts if part.takes == "step"]


def _evaluation(task: Task, config: FitConfig, loaders: Loaders, signals: Signals | None) -> Combinator | None:
    if loaders.val is None or config.eval_every is None:
        if config.eval_every not in (None, epochs(1)):
            raise ConfigError(f"FitConfig(eval_every={config.eval_every!r}) needs validation data; give fl.Loaders(train=..., val=...)")
        return None
    weights, eval_step = "ema" if config.ema is not None else None, eval_step_of(task, config)
    return evaluate_every(loaders.val, config.eval_every, eval_step=eval_step, weights=weights, limit=config.limit_eval, signals=signals)


def _skipping(config: FitConfig) -> list[Combinator]:
    """The combinators that skip non-finite steps; the loss scale of fp16 always does."""
    skips = config.nonfinite == "skip"
    if config.precision == "fp16":
        return [loss_scale(max_consecutive=config.max_nonfinite) if skips and config.max_nonfinite else loss_scale()]
    return [skip_nonfinite(config.max_nonfinite or 10)] if skips else []


def _finite(config: FitConfig) -> Combinator | None:
    if config.nonfinite == "rollback" and config.dir:
        return rollback(config.dir, _looked_at(config), config.max_nonfinite or 3)
    return check_finite(every=_looked_at(config)) if config.nonfinite == "raise" else None


def _traces(config: FitConfig) -> Combinator | None:
    if config.dir is None or config.profile_steps is None:
        return None
    first, last = config.profile_steps
    return profile(os.path.join(config.dir, "traces"), range(first, last + 1))


def _precision(config: FitConfig) -> Combinator | None:
    wanted = _AUTOCAST.get(config.precision)
    return autocast(wanted) if wanted else cast(TRUE[config.precision]) if config.precision in TRUE else None


def eval_step_of(task: Task, config: FitConfig) -> Callable[[Any, Any], Any] | None:
    """The task's `eval_step` in the precision of a run; None where it is used unchanged.

    Args:
        task: Has the `eval_step`.
        config: Its ``precision`` is used.

    Returns:
        ``(model, batch) -> metrics``, or None.

    Example:
        >>> eval_step_of(Task(torch.nn.Identity(), max), FitConfig(max_steps=1)) is None
        True
    """
    precision = _precision(config)
    return None if precision is None or task.eval_step is None else precision(task.eval_step)


def _looked_at(config: FitConfig) -> Callable[[Any], bool]:
    """When losses are checked to be finite: before every evaluation, checkpoint and log, so that none of them holds non-finite values."""
    whole: Any = epochs(1)
    if config.debug_bundle:
        whole = whole | EVERY
    others = (config.eval_every, *((config.save_every, config.permanent) if config.dir else ()), config.log_every if config.sinks else None)
    for when in others:
        if when is not None and when != epochs(1):
            whole = whole | when
    return whole


def total_steps(config: FitConfig, loaders: Any) -> int:
    """The total number of optimizer steps of a run, counted from step 0, for schedules that need it.

    No data is loaded, and neither argument is changed. ``fast_dev_run`` is ignored: it tries a run with its real schedule.

    Args:
        config: Its ``max_epochs``, ``max_steps``, ``accumulate`` and ``limit_train`` are used.
        loaders: `Loaders`, or just a training loader; its length is used.

    Returns:
        The number of steps.

    Raises:
        ConfigError: If it cannot be computed: only a time or a stop rule ends the run, or the loader has no length.

    Example:
        >>> config = FitConfig(max_epochs=3, accumulate=4)
        >>> total_steps(config, [torch.ones(2, 1)] * 10)
        9
    """
    check_type("total_steps(config, ...)", config, FitConfig, "a FitConfig")
    found = known_steps(loaders_of(loaders), config)
    if found is None:
        why = "its training loader has no length" if config.max_epochs is not None else "it has neither max_epochs nor max_steps"
        raise ConfigError(f"the total number of steps of this run is unknown: {why}; give FitConfig(max_steps=...)")
    return found


def known_steps(loaders: Loaders, config: FitConfig) -> int | None:
    """The total number of steps of a run, if it is known before the run starts.

    Args:
        loaders: As for `total_steps`.
        config: As for `total_steps`.

    Returns:
        The number of steps, or None.

    Example:
        >>> known_steps(Loaders(train=[1, 2]), FitConfig(max_time=1.0)) is None
        True
    """
    bounds = [config.max_steps] if config.max_steps is not None else []
    if config.max_epochs is not None and loaders.train is not None:
        num_batches = train_source(loaders, config).num_batches
        if num_batches is not None:
            bounds.append(sum(-(-num_batches // batches_at(config.accumulate, epoch)) for epoch in range(config.max_epochs)))
    return min(bounds, default=None)


def loaders_of(given: Any) -> Loaders:
    """Loaders as they are; anything else becomes the training loader of new ones.

    Args:
        given: `Loaders`, or a loader.

    Returns:
        `Loaders`.

    Example:
        >>> loaders_of([1, 2]).train
        [1, 2]
    """
    return given if isinstance(given, Loaders) else Loaders(train=given)


def train_source(loaders: Loaders, config: FitConfig) -> Source:
    """The training data as a run reads it.

    Args:
        loaders: Hold the training loader.
        config: Its ``limit_train`` and ``overfit_batches`` are used.

    Returns:
        A `Source`.

    Raises:
        LoaderError: If there is no training loader.

    Example:
        >>> train_source(Loaders(train=[1, 2, 3]), FitConfig(max_epochs=1, limit_train=2)).num_batches
        2
    """
    if loaders.train is None:
        raise LoaderError("fit needs training data, but there is none; give fl.Loaders(train=...)")
    overfit, most = config.overfit_batches, config.max_epochs
    ahead = False if not config.workers_ahead else True if most is None else most
    return Source.of(loaders.train, limit=overfit or config.limit_train, shuffle=not overfit, ahead=ahead)


def text_of(config: FitConfig) -> str | None:
    """A configuration as JSON; None if it holds a user's function, which cannot be written as text.

    Args:
        config: Any configuration.

    Returns:
        The text, or None.

    Example:
        >>> text_of(FitConfig(stop=lambda state: None)) is None
        True
    """
    try:
        return config.to_json()
    except ConfigError:
        return None


@contextmanager
def settings(config: FitConfig) -> Iterator[None]:
    """Set torch's modes as in a configuration, and restore them afterwards.

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
