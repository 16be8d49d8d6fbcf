"""A configuration becomes one pipe, in the order of a tick, and torch's modes are its own affair."""

import pytest
import torch

from fnlight.errors import ConfigError
from fnlight.fit import compose, fit
from fnlight.sinks import JSONL
from fnlight.triggers import patience, steps
from tests.small_runs import both, config, created, loader, train_step


def test_compose_gives_the_pipe_that_fit_runs():
    """Its text shows what was asked for, in the order of a tick."""
    made = compose(
        created().task,
        config(max_steps=9, precision="bf16", accumulate=2, clip_norm=1.0, clip_value=0.5, ema=0.9, dir="runs/a",
               sinks=JSONL("a.jsonl"), eval_every=steps(3), stop=patience("val/loss", 3), min_steps=4),
        both(),
    )  # fmt: skip
    assert str(made) == (
        "train_step > autocast(bf16) > grad > accumulate(2) > clip_value(0.5) > clip_norm(1.0) > apply > ema(0.9) > "
        "check_finite(every=epochs(1) | steps(3) | steps(50)) > evaluate_every(val, every=steps(3), weights='ema') > epoch_means > "
        "log_to(JSONL('a.jsonl'), every=steps(50)) > checkpoint_every('runs/a', every=epochs(1), keep=last(1)) > "
        "stop_when(patience('val/loss', 3) & min_steps(4) | max_steps(9))"
    )


def test_an_eval_trigger_without_data_is_refused():
    """What was configured is not silently ignored."""
    with pytest.raises(ConfigError, match=r"eval_every=steps\(3\)\) needs validation data"):
        fit(created(), loader(), config(max_epochs=1, eval_every=steps(3)))


def test_modes_of_torch_are_put_back():
    """deterministic and detect_anomaly hold within fit only."""
    seen = []

    def watched(model, batch):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()))
        return train_step(model, batch)

    before = torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()
    fit(created(watched), both(), config(max_steps=1, deterministic=True, detect_anomaly=True))
    assert seen == [(True, True)]
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()) == before
