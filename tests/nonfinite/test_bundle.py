"""A failed step is repeated from its bundle, bitwise and in another process; and the bundle is only data."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fnlight as fl
from fnlight import FitConfig, TrainState, compose, fit, load_bundle
from fnlight.cli import run as command
from fnlight.errors import BrokenCheckpointError, CheckpointError, ConfigError, NonFiniteError
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task

ROOT = Path(__file__).resolve().parents[2]
COUNT = 12


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of one's own; a constructor that is called would be noticed."""

    x: torch.Tensor
    rest: dict

    def __post_init__(self):
        CALLS.append(1)


CALLS = []


class Pair(NamedTuple):
    """A named tuple."""

    left: object
    right: object


@attrs.frozen
class Sample:
    """An attrs class."""

    y: object


def data():
    return tiny_batches(num_batches=COUNT, seed=3)


def failing(kind):
    """A task with dropout whose step number 8 fails, by the batch that it gets."""
    task, bad = tiny_task(), data()[7][0]

    def train_step(model, batch):
        loss, metrics = task.train_step(model, batch)
        if torch.equal(batch[0], bad):
            if kind == "raises":
                raise ZeroDivisionError(f"the loss is {loss.item()!r}")  # depends on weights and on dropout
            loss = loss * float("nan")
        return loss, metrics

    return attrs.evolve(task, train_step=train_step)


def config(folder, **more):
    return FitConfig(max_epochs=3, ema=0.5, clip_norm=1.0, dir=folder, debug_bundle=True, device="cpu", progress=False, **more)


@pytest.mark.parametrize(("kind", "error"), [("nan", NonFiniteError), ("raises", ZeroDivisionError)])
def test_the_state_before_the_failing_step_is_that_of_an_unwatched_run(kind, error, tmp_path):
    """However late a NaN is noticed: the bundle holds the very state, batch and key of the step that failed first."""
    with pytest.raises(error, match="the loss") as caught:
        fit(TrainState.create(failing(kind), seed=6), data(), config(tmp_path))
    assert f"the state before step 8 and its batch are in {tmp_path}/bundles/step-00000008" in caught.value.__notes__[0]
    found = load_bundle(tmp_path / "bundles" / "step-00000008", failing(kind))
    before = fit(
        TrainState.create(failing(kind), seed=6), data(), FitConfig(max_steps=7, ema=0.5, clip_norm=1.0, device="cpu", progress=False)
    )
    assert_trees_equal(dict(found.state.params), dict(before.params))
    assert_trees_equal({k: dict(v) for k, v in found.state.opt_state.items()}, {k: dict(v) for k, v in before.opt_state.items()})
    assert_trees_equal(found.state.memory["ema"], before.memory["ema"])
    assert_trees_equal(list(found.item.batches), [data()[7]])
    assert (found.item.epoch, found.item.batch, found.repeated) == (0, 8, True)
    assert found.key == fl.tensors.fold_in(fl.tensors.fold_in(6, 1), 7)
    again, _, _ = found.replay(compose(failing(kind), FitConfig.from_json(found.config)))
    assert type(again) is error
    assert kind != "raises" or str(again) == str(caught.value)


def test_the_key_of_a_bundle_is_the_one_that_the_step_was_given(tmp_path):
    """Where steps were skipped before, each attempt has a key of its own, and the bundle notes that of the attempt that failed."""
    keys = []

    def failing_grad(grad_fn):
        def fails(store, batches, key):
            keys.append(key)
            raise ZeroDivisionError("by hand")

        return fails

    task = tiny_task()
    step = fl.pipe(task.train_step, fl.grad(), fl.Combinator("fails", failing_grad, "grad", "grad"), fl.apply(), fl.debug_bundle(tmp_path))
    state = TrainState.create(task, seed=6)
    state = attrs.evolve(state, progress=attrs.evolve(state.progress, skipped=2))
    with pytest.raises(ZeroDivisionError, match="by hand"):
        step(state.copy(), data()[0])
    assert {load_bundle(tmp_path / "bundles" / "step-00000001", task).key, *keys} == {state.key}
    assert state.key != TrainState.create(task, seed=6).key


def test_a_new_process_repeats_the_failure(tmp_path):
    """`fnlight replay` needs the bundle and the task only, and meets the same number to the last bit."""
    for kind in ("nan", "raises"):
        with pytest.raises((NonFiniteError, ZeroDivisionError), match="loss") as caught:
            fit(TrainState.create(failing(kind), seed=6), data(), config(tmp_path / kind))
        (tmp_path / f"task_{kind}.py").write_text(f"from tests.nonfinite.test_bundle import failing\ntask = failing({kind!r})\n")
        done = subprocess.run(
            [sys.executable, "-m", "fnlight", "replay", f"{kind}/bundles/step-00000008", "--task", f"task_{kind}:task"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "the step fails as before"
        assert ("the loss of step 8 is nan" if kind == "nan" else f"ZeroDivisionError: {caught.value}") in done.stdout
        assert "parameters that are not finite before the step: none" in done.stdout or kind == "raises"


def test_accumulation_resume_and_a_failure_in_a_later_window(tmp_path):
    """Groups of batches are kept whole, a resumed run is watched from its first step, and windows begin anew."""
    task = failing("raises")
    part = FitConfig(max_steps=2, accumulate=2, dir=tmp_path, device="cpu", progress=False)
    fit(TrainState.create(task, seed=1), data(), part)
    with pytest.raises(ZeroDivisionError, match="the loss is") as caught:
        fit(TrainState.create(task, seed=1), data(), attrs.evolve(part, max_steps=9, resume=True, debug_bundle=True))
    found = load_bundle(tmp_path / "bundles" / "step-00000004", task)
    assert_trees_equal(list(found.item.batches), data()[6:8])
    again, _, _ = found.replay(compose(task, FitConfig(max_steps=9, accumulate=2, progress=False)))
    assert str(again) == str(caught.value)
    step = fl.pipe(task.train_step, fl.grad(), fl.apply(), fl.debug_bundle(tmp_path / "short", every=fl.steps(3)))
    with pytest.raises(ZeroDivisionError, match="the loss is"):
        list(fl.run(step, TrainState.create(task, seed=1), data()))
    assert load_bundle(tmp_path / "short" / "bundles" / "step-00000008", task).state.progress.step == 7


def test_watching_changes_nothing(tmp_path):
    """A run with a bundle ends bitwise where one without does."""
    plain = FitConfig(max_epochs=3, ema=0.5, device="cpu", progress=False)
    whole = fit(TrainState.create(tiny_task(), seed=2), data(), plain)
    step = fl.pipe(
        tiny_task().train_step,
        fl.grad(),
        fl.apply(),
        fl.ema(0.5),
        fl.debug_bundle(tmp_path / "never", every=fl.steps(5)),
        fl.stop_when(fl.max_epochs(3)),
    )
    *_, (state, _) = fl.run(step, TrainState.create(tiny_task(), seed=2), data())
    assert_trees_equal(dict(state.params), dict(whole.params))
    assert not (tmp_path / "never").exists()


BATCHES = {
    "dict": {"x": torch.ones(2, 4), 3: [torch.zeros(1), None, "text", b"bytes", (1, 2.5, True)]},
    "numpy": {"x": np.arange(4.0), "y": torch.ones(1)},
    "dataclass": Batch(torch.ones(2), {"y": (Sample(torch.ones(1)), Pair(1, Sample(torch.zeros(3))))}),
    "packed": pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]),
}


def of_anything(batch):
    """A task that fails on any batch."""

    def train_step(model, given):
        raise ValueError(f"cannot learn from {type(given).__name__}")

    return attrs.evolve(tiny_task(), train_step=train_step)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_every_kind_come_back(name, tmp_path):
    """Containers, arrays and records come back as they were, and no constructor is called."""
    task = of_anything(BATCHES[name])
    with pytest.raises(ValueError, match="cannot learn from"):
        fit(TrainState.create(task), [BATCHES[name]], config(tmp_path))
    path, before = tmp_path / "bundles" / "step-00000001", len(CALLS)
    (back,) = load_bundle(path, task, {"Batch": Batch, "Sample": Sample, "Pair": Pair}).item.batches
    assert len(CALLS) == before
    assert type(back) is type(BATCHES[name])
    if name == "dataclass":
        assert_trees_equal(back.x, BATCHES[name].x)
        sample, pair = back.rest["y"]
        assert (type(sample), type(pair), pair.left, pair.right.y.tolist()) == (Sample, Pair, 1, [0.0, 0.0, 0.0])
        with pytest.raises(ConfigError, match=r"contains Sample\(y\), but no such class is known"):
            load_bundle(path, task, {"Batch": Batch, "Pair": Pair})
    elif name == "packed":
        assert_trees_equal([back.data, back.batch_sizes], [BATCHES[name].data, BATCHES[name].batch_sizes])
    else:
        assert_trees_equal(back, BATCHES[name])


def test_what_cannot_be_written_is_read_anew_from_the_loaders(tmp_path, monkeypatch, capsys):
    """The bundle says what a batch lacked, and `--loaders` gives it from its place in the data."""
    text = """
import torch, fnlight as fl
from fnlight.testing import tiny_task
import attrs
task = tiny_task()
def train_step(model, batch):
    if batch[2] == {5}:
        raise ValueError("a set")
    return task.train_step(model, batch[:2])
task = attrs.evolve(task, train_step=train_step)
batches = [(torch.ones(2, 4) * i, torch.zeros(2, dtype=torch.long), {i}) for i in range(8)]
"""
    (tmp_path / "users_sets.py").write_text(
        text.replace("task = tiny_task()", "tiny = tiny_task()")
        .replace("return task.", "return tiny.")
        .replace("attrs.evolve(task", "attrs.evolve(tiny")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import users_sets

    with pytest.raises(ValueError, match="a set"):
        fit(TrainState.create(users_sets.task), users_sets.batches, config("run"))
    bundle = load_bundle("run/bundles/step-00000006", users_sets.task)
    assert bundle.item is None
    assert "has type set: {5}" in bundle.lacks
    with pytest.raises(ConfigError, match="the bundle holds no batches"):
        bundle.replay(max)
    assert command(["replay", "run/bundles/step-00000006", "--task", "users_sets:task"]) == 2
    assert "give --loaders, from which it is read again" in capsys.readouterr().err
    assert command(["replay", "run/bundles/step-00000006", "--task", "users_sets:task", "--loaders", "users_sets:batches"]) == 0
    assert "ValueError: a set" in capsys.readouterr().out
    sys.modules.pop("users_sets")


def test_a_failure_that_does_not_come_again_is_said_to_be_such(tmp_path, capsys, monkeypatch):
    """A step that is no function of state and batch cannot be repeated, and nobody is led to think so."""
    task, calls = tiny_task(), []

    def train_step(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the cable was loose")
        return task.train_step(model, batch)

    flaky = attrs.evolve(task, train_step=train_step)
    with pytest.raises(OSError, match="loose") as caught:
        fit(TrainState.create(flaky), data(), config(tmp_path))
    assert "the step did not fail when it was repeated" in caught.value.__notes__[0]
    found = load_bundle(tmp_path / "bundles" / "step-00000005", flaky)
    assert (found.repeated, found.replay(compose(flaky, FitConfig.from_json(found.config)))[0]) == (False, None)
    (tmp_path / "users_flaky.py").write_text("from fnlight.testing import tiny_task\ntask = tiny_task()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert command(["replay", "bundles/step-00000005", "--task", "users_flaky:task"]) == 1
    assert "the step does not fail now" in capsys.readouterr().out
    sys.modules.pop("users_flaky")


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    """Where no bundle can be written the error is as it was, with a note that says why."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bundles").write_text("a file")
    with pytest.raises(ZeroDivisionError, match="the loss is") as caught:
        fit(TrainState.create(failing("raises"), seed=6), data(), config(tmp_path / "run"))
    assert caught.value.__notes__[0].startswith("no debug bundle could be written: ")


def test_a_damaged_bundle_is_found(tmp_path):
    """Truncated, altered and missing parts are each a clear error."""
    with pytest.raises(ZeroDivisionError, match="the loss is"):
        fit(TrainState.create(failing("raises"), seed=6), data(), config(tmp_path))
    path = tmp_path / "bundles" / "step-00000008"
    body = json.loads((path / "bundle.json").read_text())
    for text in (
        "",
        "{",
        "[]",
        json.dumps({**body, "format": 2}),
        json.dumps({**body, "batches": {"$tensor": "nix"}}),
        json.dumps({**body, "item": {}}),
    ):
        (path / "bundle.json").write_text(text)
        with pytest.raises(BrokenCheckpointError, match="is broken"):
            load_bundle(path, failing("raises"))
    (path / "bundle.json").unlink()
    with pytest.raises(CheckpointError, match="no debug bundle at"):
        load_bundle(path, failing("raises"))


def test_what_cannot_be_asked_for_is_refused():
    """Without a directory there is nowhere to write to, and a number of steps is no trigger."""
    with pytest.raises(ConfigError, match=r"debug_bundle=True\) writes bundles to dir, but dir is None"):
        FitConfig(max_steps=1, debug_bundle=True)
    with pytest.raises(ConfigError, match="writes to this machine"):
        fl.debug_bundle("s3://bucket/run")
    with pytest.raises(
        TypeError, match=r"debug_bundle\(every=...\) must be a trigger such as fl.steps\(100\) .* but got int: 10; write fl.steps\(10\)"
    ):
        fl.debug_bundle("run", every=10)
