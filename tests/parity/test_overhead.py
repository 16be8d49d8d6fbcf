"""What a step costs beyond a plain loop: frames on the stack, and waiting for the device; counted, not timed."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fnlight
from fnlight import (
    CSV,
    JSONL,
    FitConfig,
    Loaders,
    Task,
    TensorBoard,
    TrainState,
    apply,
    compose,
    fit,
    grad,
    max_steps,
    pipe,
    run,
    steps,
    stop_when,
)
from fnlight.testing import RecordingSink, tiny_batches, tiny_task

PACKAGE = str(Path(fnlight.__file__).parent)
SYNCS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__", "is_nonzero")


def watched(train_step, seen):
    """The same train_step, which notes something each time that it is called."""

    def train_step_of_the_user(model, batch):
        seen()
        return train_step(model, batch)

    return train_step_of_the_user


CONFIGS = {
    "bare": {"max_steps": 2},
    "full": {
        "max_steps": 2,
        "accumulate": 2,
        "precision": "bf16",
        "clip_norm": 1.0,
        "clip_value": 1.0,
        "ema": 0.9,
        "sinks": RecordingSink(),
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_from_run_to_the_user_there_is_one_frame_a_combinator_and_three_more_at_most(name):
    """Whoever reads a traceback of his own train_step reads little of fnlight."""
    depths = []

    def seen():
        files = [(frame.filename, frame.function) for frame in inspect.stack(0)[2:]]
        ours = files[: files.index((str(Path(PACKAGE, "loop", "run.py")), "_run"))]
        assert all(file.startswith(PACKAGE) for file, _ in ours)
        depths.append(len(ours))

    base = tiny_task()
    task = Task(base.model, watched(base.train_step, seen), base.eval_step, None, base.configure_optimizers)
    step = compose(task, FitConfig(**CONFIGS[name], progress=False), Loaders(val=tiny_batches()))
    list(run(step, TrainState.create(task), tiny_batches()))
    assert len(depths) >= 2
    assert max(depths) <= len(step.combinators) + 3


def test_the_shortest_loop_has_the_shortest_stack():
    """Three combinators and three frames more."""
    depths, base = [], tiny_task()
    task = Task(
        base.model, watched(base.train_step, lambda: depths.append(len(inspect.stack(0)))), configure_optimizers=base.configure_optimizers
    )
    here = len(inspect.stack(0))
    list(run(pipe(task.train_step, grad(), apply(), stop_when(max_steps(1))), TrainState.create(task), tiny_batches()))
    ours = depths[0] - here - 2 - 1  # the two functions of this test, and `run` itself
    assert ours <= 3 + 3


class Waiting(TorchFunctionMode):
    """Note every call that would wait for the device."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in SYNCS and isinstance(args[0], torch.Tensor):
            self.note(name)
        return func(*args, **(kwargs or {}))


class Reading(TorchDispatchMode):
    """The same one floor below: a scalar that is read from a tensor, however it was asked for."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.note(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watchers_see_what_they_watch_for():
    """Each way of bringing a number to the host is noticed."""
    found = []
    with Waiting(found.append), Reading(found.append):
        x = torch.ones(2)
        x.sum().item(), x.tolist(), x.numpy(), x.cpu(), float(x[0]), bool(x[0]), int(x[0])
    assert {"item", "tolist", "numpy", "cpu"} <= set(found)
    assert sum("_local_scalar_dense" in name or name.startswith("__") for name in found) >= 4


@pytest.mark.parametrize("given", [{}, {"accumulate": 2, "clip_norm": 1.0, "clip_value": 1.0, "ema": 0.9, "precision": "bf16"}])
def test_no_step_waits_for_the_device_between_ticks(given, tmp_path):
    """With four sinks, `check_finite` and means over the epoch, numbers are brought to the host at ticks only, and there they are."""
    base, at, waits = tiny_task(), [0], {}
    group = given.get("accumulate", 1)
    task = Task(base.model, watched(base.train_step, lambda: at.append(at[-1] + 1)), configure_optimizers=base.configure_optimizers)
    sinks = (RecordingSink(), JSONL(tmp_path / "log.jsonl"), CSV(tmp_path / "log.csv"), TensorBoard(tmp_path / "events"))
    config = FitConfig(max_epochs=1, log_every=steps(4), sinks=sinks, device="cpu", progress=False, **given)

    def note(name):
        waits.setdefault(at[-1] // group, set()).add(name)

    with Waiting(note), Reading(note):
        fit(TrainState.create(task), tiny_batches(num_batches=24), config)
    assert set(waits) - {0} == set(range(4, 24 // group + 1, 4)), f"syncs by step: {waits}"
    assert set(sinks[0].steps("train/loss")) == set(range(4, 24 // group + 1, 4))
