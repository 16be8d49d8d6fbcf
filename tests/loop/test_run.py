"""`run` and its combinators do what is due, in one order, and end a run properly."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fnlight.checkpoint import checkpoints, last, load
from fnlight.errors import ConfigError, LoaderError
from fnlight.gradients import accumulate, grad
from fnlight.loop import checkpoint_every, epoch_means, evaluate_every, log_to, run, stop_when
from fnlight.metrics import Mean, Text
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply, ema
from fnlight.triggers import at_end, epochs, max_epochs, max_steps, steps
from tests.small_runs import Slow


def train_step(model, batch):
    return F.mse_loss(model(batch), batch)


def eval_step(model, batch):
    return {"loss": Mean(F.mse_loss(model(batch), batch, reduction="sum"), batch.numel())}


def created(train_step=train_step, eval_step=eval_step):
    torch.manual_seed(0)
    return TrainState.create(
        Task(nn.Linear(3, 3), train_step, eval_step, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    )


def rows(n=8):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def loader(n=8, batch_size=2, shuffle=True):
    return DataLoader(rows(n), batch_size=batch_size, shuffle=shuffle)


def ran(*combinators, state=None, data=None, fn=train_step, **options):
    """The last state of a run, and what it yielded."""
    state = state or created(fn)
    step = pipe(fn, grad(), apply(), *combinators)
    found = list(run(step, state, data or loader(), **options))
    return found[-1][0], found


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.records, self.calls = [], []

    def __call__(self, record):
        self.records.append(record)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_a_run_goes_through_the_epochs_until_a_rule_says_why_it_stops():
    """The last state carries the reason; those before it carry none."""
    state, found = ran(stop_when(max_epochs(2)))
    assert [s.progress.step for s, _ in found] == list(range(1, 9))
    assert [(s.progress.epoch, s.progress.batch) for s, _ in found][3:5] == [(1, 0), (1, 1)]
    assert state.stopped == "2 epochs done"
    assert found[-2][0].stopped is None
    assert state.progress.samples == 16


def test_a_run_leaves_its_input_and_the_generators_alone():
    """It works on a copy, and puts the global generators back."""
    state = created()
    before, random = state.params["weight"].clone(), torch.default_generator.get_state()
    ran(stop_when(max_steps(3)), state=state)
    assert torch.equal(state.params["weight"], before)
    assert torch.equal(torch.default_generator.get_state(), random)


def test_a_donated_run_trains_on_the_very_tensors():
    """donate=True makes no copy."""
    state = created()
    last_state, _ = ran(stop_when(max_steps(3)), state=state, donate=True)
    assert last_state.store is state.store


def test_a_run_that_is_over_stays_over():
    """Rules are asked before the first step too, and the generator's value is the state."""
    state, _ = ran(stop_when(max_steps(3)))
    steps_taken = run(pipe(train_step, grad(), apply(), stop_when(max_steps(3))), state, loader())
    with pytest.raises(StopIteration) as end:
        next(steps_taken)
    assert end.value.value.stopped == "3 steps done"
    assert end.value.value.progress.step == 3


def test_a_users_own_step_can_be_run():
    """Any function of (state, batch) is a step."""

    def own(state, item):
        return state.recorded({"own/n": float(len(item.batches[0]))}), {}

    state, _ = next(run(own, created(), loader()))
    assert state.history[0].metrics == {"own/n": 2.0}


def test_seconds_come_from_the_clock():
    """Each step is charged with what passed since the one before was asked for."""
    data = Slow(list(loader()), 5.0)
    _, found = ran(stop_when(max_steps(3)), data=data, clock=data.clock)
    first, second, _ = (s.progress.seconds for s, _ in found)
    assert second - first == 5.0


def test_evaluations_are_records_of_the_history():
    """evaluate_every adds val/... at the step where it was due, and leaves the state at that."""
    state, _ = ran(evaluate_every(loader(), steps(3)), stop_when(max_steps(7)))
    assert [(r.step, r.epoch, list(r.metrics)) for r in state.history] == [(3, 0, ["val/loss"]), (6, 1, ["val/loss"])]


def test_several_evaluations_have_names_of_their_own():
    """Two evaluations at one step make one record."""
    state, _ = ran(
        evaluate_every({"a": loader(), "b": loader()}, epochs(1)),
        evaluate_every(loader(), epochs(1), name="test"),
        stop_when(max_epochs(1)),
    )
    assert list(state.history[0].metrics) == ["val/a/loss", "val/b/loss", "test/loss"]


def test_data_that_an_evaluation_used_up_is_an_error_that_says_which_evaluation():
    """A second evaluation finds nothing; the error names it, and where the training stood."""
    step = pipe(
        train_step, grad(), apply(), evaluate_every(iter([torch.ones(2, 3)]), every=steps(1), name="held out"), stop_when(max_steps(3))
    )
    with pytest.raises(LoaderError, match="used up") as raised:
        list(run(step, created(), [torch.ones(2, 3)]))
    assert raised.value.__notes__ == ["in the evaluation 'held out', behind step 2"]


def test_an_evaluation_at_the_end_happens_once():
    """at_end evaluates after the last step, unless that step was evaluated anyway."""
    state, _ = ran(evaluate_every(loader(), at_end), stop_when(max_steps(3)))
    assert [r.step for r in state.history] == [3]
    state, _ = ran(evaluate_every(loader(), at_end | steps(3)), stop_when(max_steps(3)))
    assert [r.step for r in state.history] == [3]


def test_checkpoints_hold_the_state_with_its_evaluation(tmp_path):
    """Saving comes after evaluation; the last state is saved with the reason why it ended."""
    state, _ = ran(evaluate_every(loader(), epochs(1)), checkpoint_every(tmp_path, epochs(1), keep=last(5)), stop_when(max_steps(6)))
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    first, final = (load(path, state.task) for _, path in checkpoints(tmp_path))
    assert [r.step for r in first.history] == [4]
    assert first.stopped is None
    assert final.stopped == "6 steps done"
    assert torch.equal(final.params["weight"], state.params["weight"])


def test_a_final_state_that_was_just_saved_only_learns_why_it_ended(tmp_path):
    """No second copy of the tensors is written; the record is completed."""
    written = []
    real = os.replace
    state, _ = ran(checkpoint_every(tmp_path, epochs(1)), stop_when(max_epochs(1)))
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    assert load(tmp_path, state.task).stopped == "1 epochs done"
    assert written == []
    assert os.replace is real


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_a_checkpoint_knows_what_was_logged(tmp_path, k):
    """A run that goes on from any checkpoint writes the very records that it would have written: the tick is logged before it is saved."""

    def steps_of(sink, keep):
        often = checkpoint_every(tmp_path, steps(1), keep=keep)
        return [evaluate_every(loader(), epochs(1)), epoch_means(), log_to(sink, every=steps(3)), often, stop_when(max_steps(7))]

    whole, rest = Recorder(), Recorder()
    ran(*steps_of(whole, last(9)))
    ran(*steps_of(rest, last(9)), state=load(checkpoints(tmp_path)[k - 1][1], created().task))
    assert [(r.step, r.metrics) for r in rest.records] == [(r.step, r.metrics) for r in whole.records if r.step > k]


def test_a_run_first_removes_what_a_killed_one_did_not_come_to(tmp_path):
    """Retention is applied when a run goes on, so a run that was killed before it could delete leaves nothing for good."""
    ran(checkpoint_every(tmp_path, steps(2), keep=last(9)), stop_when(max_steps(6)))
    state = load(tmp_path, created().task)
    resumed = run(pipe(train_step, grad(), apply(), checkpoint_every(tmp_path, steps(2)), stop_when(max_steps(6))), state, loader())
    with pytest.raises(StopIteration) as end:
        next(resumed)
    assert end.value.value.progress.step == 6
    assert [step for step, _ in checkpoints(tmp_path)] == [6]


def test_only_what_this_run_wrote_is_removed(tmp_path):
    """Retention leaves other directories alone, and keeps what it says."""
    other = tmp_path / "checkpoints" / "step-00000001"
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("keep me")
    ran(checkpoint_every(tmp_path, steps(2), keep=last(2)), stop_when(max_steps(7)))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000006", "step-00000007"]
    assert (other / "mine.txt").read_text() == "keep me"


def test_a_directory_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    """A file stands where the directory should be."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    seen = []

    def watched(model, batch):
        seen.append(1)
        return train_step(model, batch)

    with pytest.raises(ValueError, match="file"):
        ran(checkpoint_every(blocked / "run", steps(1)), stop_when(max_steps(1)), fn=watched)
    assert seen == []


def test_sinks_get_exact_means_since_the_last_record():
    """Windows do not overlap, and the last one may be short."""
    sink = Recorder()
    _, found = ran(log_to(sink, every=steps(3)), stop_when(max_steps(7)))
    losses = [float(m["loss"]) for _, m in found]
    got = [(r.step, r.metrics["train/loss"]) for r in sink.records]
    assert got == [(3, pytest.approx(sum(losses[:3]) / 3)), (6, pytest.approx(sum(losses[3:6]) / 3)), (7, pytest.approx(losses[6]))]
    assert sink.records[0].metrics["lr"] == 0.1
    assert sink.calls == ["flush", "close"]


def test_evaluations_go_to_the_sinks_at_once():
    """A record of the history is sent when it is made; means over an epoch have a name of their own."""
    sink = Recorder()
    ran(evaluate_every(loader(), epochs(1)), epoch_means(), log_to(sink, every=steps(100)), stop_when(max_epochs(2)))
    assert [(r.step, sorted(r.metrics)) for r in sink.records] == [
        (4, ["train_epoch/loss", "val/loss"]),
        (8, ["train_epoch/loss", "val/loss"]),
        (8, ["lr", "train/loss"]),
    ]


def test_an_evaluation_at_the_end_reaches_the_sinks():
    """What `finish` adds to the history is sent as well."""
    sink = Recorder()
    ran(evaluate_every(loader(), at_end), log_to(sink, every=steps(2)), stop_when(max_steps(2)))
    assert [sorted(r.metrics) for r in sink.records] == [["lr", "train/loss"], ["val/loss"]]


def test_media_reach_the_sinks_but_not_the_history():
    """Pictures and texts of a train_step or an eval_step are shown once."""

    def speaking(model, batch):
        return train_step(model, batch), {"note": Text("hello")}

    def speaking_eval(model, batch):
        return {"n": Mean(1.0), "note": Text("evaluated")}

    sink = Recorder()
    state = created(speaking, speaking_eval)
    after, _ = ran(
        evaluate_every(loader(), steps(2)), epoch_means(), log_to(sink, every=steps(2)), stop_when(max_steps(4)), state=state, fn=speaking
    )
    assert [(r.metrics["train/note"].data, r.metrics["val/note"].data) for r in sink.records] == [("hello", "evaluated")] * 2
    assert all("note" not in name for r in after.history for name in r.metrics)


def test_sinks_are_closed_however_a_run_ends():
    """A loop that is left early, or that fails, flushes and closes what it opened."""
    sink = Recorder()
    for _ in run(pipe(train_step, grad(), apply(), log_to(sink, every=steps(1))), created(), loader()):
        break
    assert sink.calls == ["flush", "close"]


def test_two_logs_need_two_names():
    """A second log_to says name=."""
    step = pipe(train_step, grad(), apply(), log_to(print), log_to(print, name="other"), stop_when(max_steps(1)))
    assert str(step).endswith("log_to(print, every=steps(50)) > log_to(print, every=steps(50)) > stop_when(max_steps(1))")


def test_the_mean_of_a_group_is_one_step():
    """With accumulate(3), four batches are two steps, the last of one batch."""
    step = pipe(train_step, grad(), accumulate(3), apply(), ema(0.9), stop_when(max_epochs(1)))
    found = [s.progress for s, _ in run(step, created(), loader())]
    assert [(p.step, p.batch, p.epoch, p.samples) for p in found] == [(1, 3, 0, 6), (2, 0, 1, 8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_to(), r"log_to needs a sink"),
        (lambda: log_to("log.jsonl"), r"a sink must be a function of a record, but got str: 'log.jsonl'"),
        (lambda: stop_when(), r"stop_when needs stop rules"),
        (lambda: stop_when(3), r"stop_when needs stop rules such as max_epochs\(10\), but got \(3,\)"),
        (lambda: checkpoint_every("runs", keep=3), r"keep must be a retention such as last\(3\)"),
    ],
)
def test_a_combinator_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_evaluation_without_an_eval_step_is_an_error_before_the_first_step():
    """The loop asks for it when it starts."""
    state = created(eval_step=None)
    with pytest.raises(ConfigError, match="this task has no eval_step"):
        ran(evaluate_every(loader(), steps(1000)), stop_when(max_steps(1)), state=state)
