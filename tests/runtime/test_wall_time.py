"""Where the time of a run goes: every second has one cause, all runs of a state add up, and nothing but time depends on it."""

import os

import pytest
import torch

from fnlight.checkpoint import load, newest, save
from fnlight.errors import BrokenCheckpointError
from fnlight.fit import fit
from fnlight.gradients import grad
from fnlight.loop import checkpoint_every, evaluate_every, log_to, run, stop_when
from fnlight.pipe import pipe
from fnlight.runtime import WallTime
from fnlight.runtime.wall_time import CAUSES
from fnlight.step import apply
from fnlight.testing import RecordingSink, assert_trees_equal
from fnlight.triggers import at_end, max_steps, steps
from tests.small_runs import Slow, config, created, eval_step, loader, train_step


class Hours:
    """A clock that whoever does something moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds, fn):
        """The function, which takes so long."""

        def slow(*args):
            self.now += seconds
            return fn(*args)

        return slow


def spent_in_a_run(tmp_path, num_steps=6):
    """A run whose data, steps, evaluations and sinks take 2, 10, 100 and 1,000 seconds."""
    hours = Hours()
    data = Slow(list(loader(shuffle=False)), 2.0)
    data_clock = lambda: hours.now + data.now
    fn = hours.taking(10.0, train_step)
    state = created(fn, hours.taking(100.0, eval_step))
    step = pipe(
        fn,
        grad(),
        apply(),
        evaluate_every([torch.ones(2, 3)], every=steps(3)),
        log_to(hours.taking(1000.0, RecordingSink()), every=steps(2)),
        checkpoint_every(tmp_path, every=at_end, background=False),
        stop_when(max_steps(num_steps)),
    )
    *_, (state, _) = run(step, state, data, clock=data_clock)
    return state


def test_every_second_has_one_cause(tmp_path):
    """What the steps are charged with is what nothing else took, the first one and its batch being the start."""
    times = spent_in_a_run(tmp_path).wall_time
    assert times.seconds() == {
        "step": 50.0, "start": 12.0, "data": 10.0, "evaluate": 200.0, "log": 4000.0, "save": 0.0, "stall": 0.0, "lost": 0.0,
    }  # fmt: skip
    assert (times.total, times.runs) == (4272.0, 1)
    assert times.goodput == 50.0 / 4272.0


def test_a_run_that_goes_on_adds_up(tmp_path):
    """What is loaded knows what was spent before, and a second run is charged with its own start."""
    first = spent_in_a_run(tmp_path / "a", 4)
    loaded = load(save(first, tmp_path / "b"), first.task)
    assert loaded.wall_time.seconds() == first.wall_time.seconds()
    *_, (state, _) = run(
        pipe(loaded.task.train_step, grad(), apply(), stop_when(max_steps(6))), loaded, list(loader(shuffle=False)), clock=lambda: 7.0
    )
    assert (state.wall_time.runs, state.wall_time.total) == (2, first.wall_time.total)


def test_a_log_that_asks_gets_the_shares_of_its_window():
    """The shares of a record add up to 1, and samples a second are those of the wall's clock."""
    hours, sink = Hours(), RecordingSink()
    data, fn = Slow(list(loader(shuffle=False)), 1.0), hours.taking(3.0, train_step)
    step = pipe(fn, grad(), apply(), log_to(sink, every=steps(2), wall_time=True), stop_when(max_steps(4)))
    list(run(step, created(fn), data, clock=lambda: hours.now + data.now))
    first, second = sink.records
    assert first.metrics["time/start"] == 0.5
    assert (second.metrics["time/step"], second.metrics["time/data"], second.metrics["samples/s"]) == (0.75, 0.25, 0.5)
    for record in sink.records:
        assert sum(value for name, value in record.metrics.items() if name.startswith("time/")) == pytest.approx(1.0)


def test_a_log_that_does_not_ask_gets_nothing_of_it():
    """Records of two equal runs are equal unless somebody asks for their times."""
    sink = RecordingSink()
    list(run(pipe(train_step, grad(), apply(), log_to(sink, every=steps(2)), stop_when(max_steps(4))), created(), loader()))
    assert {name for record in sink.records for name in record.metrics} == {"train/loss", "lr"}


def test_states_that_took_another_time_are_equal(tmp_path):
    """Time does not count in comparisons."""
    a, b = (spent_in_a_run(tmp_path / name) for name in "ab")
    b.store.wall_time.total += 5.0
    assert_trees_equal(a, b)


def test_a_copy_counts_for_itself():
    """What a copy spends is not charged to the state that it was made of."""
    state = created()
    other = state.copy()
    other.store.wall_time.begin(lambda: 0.0)
    other.store.wall_time.lose(3.0)
    assert (state.wall_time.total, state.wall_time.runs, other.wall_time.total, other.wall_time.runs) == (0.0, 0, 3.0, 1)


def broken(model, batch):
    raise KeyboardInterrupt


def an_hour_ago(folder):
    """Let the newest checkpoint of a run look as if it had been written an hour ago."""
    manifest = os.path.join(newest(folder), "state.json")
    os.utime(manifest, (os.path.getatime(manifest), os.path.getmtime(manifest) - 3600))


def test_what_a_run_that_was_cut_off_had_not_saved_is_lost(tmp_path):
    """Going on from a checkpoint of a run that did not end in order counts the time since it was written."""
    calls = iter([train_step] * 5 + [broken])
    with pytest.raises(KeyboardInterrupt):
        fit(created(lambda *given: next(calls)(*given)), loader(), config(dir=tmp_path, save_every=steps(2), max_steps=9))
    an_hour_ago(tmp_path)
    state = fit(created(), loader(), config(dir=tmp_path, save_every=steps(2), max_steps=9, resume=True))
    assert 3600 <= state.wall_time.lost < 3700
    assert state.wall_time.total > state.wall_time.lost
    assert state.wall_time.runs == 2


def test_time_between_runs_that_ended_in_order_is_nobodys(tmp_path):
    """A run that ended at its last step and is prolonged another day has lost nothing."""
    fit(created(), loader(), config(dir=tmp_path, max_steps=4))
    an_hour_ago(tmp_path)
    times = fit(created(), loader(), config(dir=tmp_path, max_steps=6, resume=True)).wall_time
    assert (times.lost, times.runs) == (0.0, 2)
    assert times.total < 3600


@pytest.mark.parametrize("wrong", [{"total": -1.0}, {"data": "1"}, {"runs": 1.0}, {"save": True}, {"runs": -1}, {"log": 1e999}])
def test_times_of_a_stranger_are_numbers_or_refused(wrong):
    """Whatever a file says, what is read are seconds."""
    with pytest.raises(ValueError, match="the times of a run are"):
        WallTime.from_json(wrong)


def test_a_checkpoint_that_knows_nothing_of_times_is_read():
    """As one that was written before there were any."""
    assert WallTime.from_json({}).seconds() == {"step": 0.0, **dict.fromkeys(CAUSES, 0.0)}


def test_a_broken_section_is_a_broken_checkpoint(tmp_path, monkeypatch):
    """It is named as one, like all that fnlight does not write."""
    monkeypatch.setattr(WallTime, "to_json", lambda self: {"total": "much"})
    save(created(), tmp_path / "a")
    with pytest.raises(BrokenCheckpointError, match="the times of a run"):
        load(tmp_path / "a", created().task)


def test_a_clock_that_is_set_back_takes_nothing_away():
    """No cause ever has less than before, and none more than all."""
    hours = Hours()
    data, fn = Slow(list(loader(shuffle=False)), -1.0), hours.taking(-2.0, train_step)
    step = pipe(fn, grad(), apply(), log_to(hours.taking(-3.0, print), every=steps(2)), stop_when(max_steps(5)))
    *_, (state, _) = run(step, created(fn), data, clock=lambda: hours.now + data.now)
    assert set(state.wall_time.seconds().values()) == {0.0}


def test_a_run_that_fails_leaves_no_clock_running():
    """However a run ends, what its state counts has ended with it."""
    hours, state = Hours(), created(broken)
    with pytest.raises(KeyboardInterrupt):
        list(run(pipe(broken, grad(), apply()), state, loader(), donate=True, clock=hours))
    hours.now += 1000.0
    state.store.version = state.version
    assert state.wall_time.total == 0.0
