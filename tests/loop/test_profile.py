"""`profile`: traces of the steps that were chosen, files only there, nothing of the training changed."""

import json
from itertools import islice

import pytest
import torch

from fnlight.errors import ConfigError
from fnlight.fit import fit
from fnlight.gradients import grad
from fnlight.loop import profile, run, stop_when
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.testing import assert_trees_equal
from fnlight.triggers import epochs, max_steps, steps
from tests.small_runs import config, created, loader, train_step


def stepping(*combinators):
    return pipe(train_step, grad(), apply(), *combinators, stop_when(max_steps(9)))


def traced(folder):
    """The traces of a folder: by the step in their names, how often the optimizer of a step is in them."""
    found = {}
    for file in folder.glob("*.pt.trace.json"):
        events = json.loads(file.read_text())["traceEvents"]
        found[int(file.name.split(".")[-4])] = sum(event.get("name") == "Optimizer.step#SGD.step" for event in events)
    return found


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (range(1, 2), {1: 1}),
        (range(3, 6), {5: 3}),
        (range(8, 100), {9: 2}),
        (range(2, 8, 3), {2: 1, 5: 1}),
        (range(20, 30), {}),
        (epochs(1), {4: 1, 8: 1}),
        (steps(3), {3: 1, 6: 1, 9: 1}),
        (lambda tick: tick.after.step == 2, {2: 1}),
    ],
)
def test_the_chosen_steps_are_traced_and_no_others(chosen, expected, tmp_path):
    """Neighbours are one trace, named by the last of them; where nothing is chosen, no folder is made."""
    folder = tmp_path / "traces"
    list(run(stepping(profile(folder, chosen)), created(), loader()))
    assert traced(folder) == expected
    assert folder.exists() == bool(expected)


def test_a_trace_shows_what_stands_in_front(tmp_path):
    """The forward pass, the backward pass and the update are in it, with shapes where asked."""
    list(run(stepping(profile(tmp_path, range(2, 3), shapes=True)), created(), loader()))
    events = json.loads(next(tmp_path.iterdir()).read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::linear", "aten::mse_loss", "Optimizer.step#SGD.step"} <= names
    assert any(name is not None and "evaluate_function: AddmmBackward0" in name for name in names)
    assert any("Input Dims" in event.get("args", {}) for event in events if event.get("name") == "aten::linear")


def test_the_training_is_the_same(tmp_path):
    """With traces and without, a run ends bitwise in the same state."""
    *_, (state, _) = run(stepping(profile(tmp_path, range(3, 6))), created(), loader())
    *_, (plain, _) = run(stepping(), created(), loader())
    assert_trees_equal(state, plain)


def test_a_run_that_is_left_or_fails_writes_the_steps_that_it_made(tmp_path):
    """The profiler never outlives a run, and what was recorded is not lost."""
    states = run(stepping(profile(tmp_path / "left", range(2, 9))), created(), loader())
    list(islice(states, 3))
    states.close()
    calls = iter([train_step] * 3)
    failing = pipe(lambda *given: next(calls, None)(*given), grad(), apply(), profile(tmp_path / "failed", range(2, 9)))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        list(run(failing, created(), loader()))
    assert list(traced(tmp_path / "left")) == list(traced(tmp_path / "failed")) == [3]
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_step_by_hand_is_a_trace_of_its_own(tmp_path):
    """Where there is no run that would end it, a trace ends with its step."""
    step, state = stepping(profile(tmp_path, range(1, 3))), created()
    for batch in islice(loader(), 3):
        state, _ = step(state, batch)
        assert not torch.autograd.profiler._is_profiler_enabled
    assert traced(tmp_path) == {1: 1, 2: 1}
    with pytest.raises(TypeError, match="cannot unpack|not supported|must be Tensor"):
        step(created(), "no batch")
    assert not torch.autograd.profiler._is_profiler_enabled


def test_fit_traces_what_its_configuration_says(tmp_path):
    """Both ends of the range are in it, and nothing is beside it where nothing was said."""
    fit(created(), loader(), config(max_steps=6, dir=tmp_path / "a", profile_steps=(3, 4)))
    fit(created(), loader(), config(max_steps=6, dir=tmp_path / "b"))
    assert traced(tmp_path / "a" / "traces") == {4: 2}
    assert not (tmp_path / "b" / "traces").exists()


def test_two_profilers_at_once_are_refused(tmp_path):
    """Torch records for one at a time, so the error says which one has to go."""
    with torch.profiler.profile(), pytest.raises(ConfigError, match="another torch profiler"):
        list(run(stepping(profile(tmp_path, range(1, 2))), created(), loader()))


@pytest.mark.parametrize(("wrong", "says"), [(range(0), "names no steps"), (range(3), "counted from 1"), (5, "must be a range of steps")])
def test_steps_that_are_none_are_refused(wrong, says, tmp_path):
    """Before any work; and so is a place that is not on this machine."""
    with pytest.raises(ConfigError, match=says):
        profile(tmp_path, wrong)
    with pytest.raises(ConfigError, match="is a URL"):
        profile("memory://a", range(1, 2))
