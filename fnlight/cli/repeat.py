"""``fnlight replay``: repeat a failed step from its debug bundle."""

import traceback
from typing import Any

import attrs
import torch

from fnlight.cli.checks import decisive
from fnlight.cli.given import Given, given
from fnlight.cli.page import Code, Place, line
from fnlight.data import Item, batches
from fnlight.errors import ConfigError
from fnlight.fit import FitConfig, compose, settings
from fnlight.nonfinite import Bundle, load_bundle


def replay(bundle: Place, task: Code = None, loaders: Code = None, config: Code = None, anomaly: bool = False) -> int:
    """Repeat a failed step from the bundle that debug_bundle=True has written.

    Args:
        bundle: The bundle's directory, such as runs/a/bundles/step-00000007.
        task: module:name of the task, or of a function that returns it, or a tuple of it with a FitConfig or a pipe.
        loaders: module:name of the loaders, if the bundle could not hold the batch.
        config: module:name of the FitConfig; the one in the bundle if left out.
        anomaly: Let autograd name the operation whose gradient was NaN.

    Returns:
        0 if the step fails as before, 1 if it does not.

    Raises:
        ConfigError: If the code, the configuration or the batch is missing.

    Example:
        >>> replay("no/such/bundle")
        Traceback (most recent call last):
        fnlight.errors.ConfigError: replay needs your code: give --task module:task
    """
    code = given(task, loaders, config)
    if code.task is None:
        raise ConfigError("replay needs your code: give --task module:task")
    found = load_bundle(bundle, code.task, code.names)
    line(f"{bundle}: step {found.state.progress.step + 1}, key {found.key:016x}, failed with {found.error[0]}: {found.error[1]}")
    chosen = _config(found, code)
    step = code.step if code.step is not None else compose(code.task, attrs.evolve(chosen, eval_every=None))
    item = found.item if found.item is not None else _read(found, code, step, chosen)
    with settings(attrs.evolve(chosen, detect_anomaly=anomaly)):
        error, after, metrics = found.replay(step, item)
    if error is None:
        line("the step does not fail now")
        return 1
    line("".join(traceback.format_exception(error)).rstrip())
    if after is not None:
        _explain(found, after, metrics)
    same = type(error).__name__ == found.error[0]
    line("the step fails as before" if same else f"the step fails with another error: {type(error).__name__}")
    return 0 if same else 1


def _config(found: Bundle, code: Given) -> FitConfig:
    if code.config is not None:
        return decisive(code.config, max_steps=found.state.progress.step + 2)
    if found.config is not None:
        return decisive(FitConfig.from_json(found.config), max_steps=found.state.progress.step + 2)
    if code.step is not None:
        return FitConfig(max_steps=1, progress=False)
    raise ConfigError(
        "the bundle has no configuration that can be read, or is from a manual loop: give --config, or let --task return the pipe, too"
    )


def _read(found: Bundle, code: Given, step: Any, config: FitConfig) -> Item:
    """The batches of the step, read again from their known position in the data."""
    if code.loaders is None or code.loaders.train is None:
        raise ConfigError(f"the bundle has no batch: {found.lacks}; give --loaders, from which it is read again")
    overfit = config.overfit_batches
    items = batches(
        code.loaders.train,
        found.state,
        step.batches_per_step,
        limit=overfit or config.limit_train,
        shuffle=not overfit,
        device=found.state.device,
    )
    return next(items)


def _explain(found: Bundle, after: Any, metrics: Any) -> None:
    """Which numbers were not finite before the step, and which are not afterwards."""
    line(
        "metrics: "
        + ", ".join(f"{name} {value.compute() if callable(getattr(value, 'compute', None)) else value}" for name, value in metrics.items())
    )
    for when, state in (("before", found.state), ("after", after)):
        bad = [name for name, value in state.params.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        line(f"parameters that are not finite {when} the step: {', '.join(bad) or 'none'}")
