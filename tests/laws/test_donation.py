"""Law 7: a donated state is never readable, and what a step returned is."""

import inspect

import pytest

from fnlight import FitConfig, TrainState, evaluate, fit, predict, pure, run, save, update
from fnlight.data import Item
from fnlight.errors import DonatedStateError
from fnlight.testing import trees_equal
from tests.laws.combinators import PAIRS, pipe_with
from tests.laws.tasks import TASKS

READERS = {
    "params": lambda state: state.params,
    "buffers": lambda state: state.buffers,
    "opt_state": lambda state: state.opt_state,
    "memory": lambda state: state.memory,
    "wall_time": lambda state: state.wall_time,
    "live": lambda state: state.live,
    "module": lambda state: state.module(),
    "copy": lambda state: state.copy(),
    "to": lambda state: state.to("cpu"),
    "moved": lambda state: state.moved("cpu"),
    "donated": lambda state: state.donated(),
    "advanced": lambda state: state.advanced(Item.of(1, state=state)),
}
WITHOUT_TENSORS = {"create", "device", "key", "recorded"}


def test_the_list_holds_every_reader_of_a_state():
    """Each public property and method of `TrainState` reads tensors, and is tried below, or does not, and is known not to."""
    public = {name for name, _ in inspect.getmembers(TrainState) if not name.startswith("_")}
    fields = {"task", "progress", "seed", "history", "stopped", "store", "version"}
    assert public - fields == READERS.keys() | WITHOUT_TENSORS


@pytest.mark.parametrize(("name", "choice"), PAIRS)
def test_after_a_step_its_input_cannot_be_read_and_its_output_can(name, choice, tmp_path):
    """Whatever reads tensors raises for the state that went in, and works for the one that came out."""
    case = TASKS[name]
    step = pipe_with(choice, case.make(), tmp_path, case.batches())
    before = TrainState.create(case.make())
    after, _ = step(before, case.batches()[0])
    for read in READERS.values():
        with pytest.raises(DonatedStateError, match=r"the state of step 0 was donated to a later step.*state\.copy\(\).*fl\.pure\(step\)"):
            read(before)
    assert trees_equal(after.params, dict(after.module().named_parameters()))
    assert READERS["copy"](after).progress.step == 1
    assert (before.progress.step, before.device, repr(before)[:17]) == (0, after.device, "TrainState(step=0")


def test_what_takes_a_state_refuses_a_donated_one(tmp_path):
    """Evaluating, predicting, saving, stepping and training on all refuse, and write nothing."""
    case = TASKS["convnet"]
    step = pipe_with("apply", case.make(), tmp_path, None)
    before = TrainState.create(case.make())
    after, _ = step(before, case.batches()[0])
    kept = after.copy()
    calls = [
        lambda: evaluate(before, case.batches()),
        lambda: list(predict(before, case.batches())),
        lambda: save(before, tmp_path / "state"),
        lambda: step(before, case.batches()[0]),
        lambda: pure(step)(before, case.batches()[0]),
        lambda: update(before, case.batches()[0]),
        lambda: next(run(step, before, case.batches())),
        lambda: next(run(step, before, case.batches(), donate=True)),
        lambda: fit(before, case.batches(), FitConfig(max_steps=1, progress=False)),
        lambda: fit(before, case.batches(), FitConfig(max_steps=1, progress=False, donate=True)),
    ]
    for call in calls:
        with pytest.raises(DonatedStateError, match="the state of step 0 was donated to a later step"):
            call()
    assert list(tmp_path.iterdir()) == []
    assert trees_equal(after, kept)


def test_a_step_that_fails_half_way_donates_its_input_too(tmp_path):
    """No one reads a state that is half updated."""
    case = TASKS["convnet"]
    before = TrainState.create(case.make())
    step = pipe_with("ema", case.make(), tmp_path, None)
    with pytest.raises(RuntimeError, match="expected input"):
        step(before, (case.batches()[0][0][:, :, 0], case.batches()[0][1]))
    with pytest.raises(DonatedStateError, match="or failed half-way"):
        before.params  # the access is what is tested


def test_fit_and_run_donate_when_told_to(tmp_path):
    """With `donate=True` the state that went in is gone; without, it stays readable."""
    case = TASKS["convnet"]
    for donate in (False, True):
        state = TrainState.create(case.make())
        fit(state, case.batches(), FitConfig(max_steps=1, progress=False, donate=donate))
        other = TrainState.create(case.make())
        next(run(pipe_with("apply", case.make(), tmp_path, None), other, case.batches(), donate=donate))
        assert [s.store.version == s.version for s in (state, other)] == [not donate] * 2
