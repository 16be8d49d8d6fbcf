"""`checkpoint_every` saves what the step, its evaluation and its log left, and removes only what it wrote."""

import pytest
import torch

from fnlight.checkpoint import checkpoints, last, load
from fnlight.errors import ConfigError, SeamError
from fnlight.gradients import grad
from fnlight.loop import checkpoint_every, epoch_means, evaluate_every, log_to, run, saving, stop_when
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.triggers import epochs, max_epochs, max_steps, steps
from tests.loop.runs import Recorder, ran
from tests.small_runs import created, loader, train_step


def test_checkpoints_hold_the_state_with_its_evaluation(tmp_path):
    """Saving comes after evaluation; the last state is saved with the reason why it ended."""
    state, _ = ran(evaluate_every(loader(), epochs(1)), checkpoint_every(tmp_path, epochs(1), keep=last(5)), stop_when(max_steps(6)))
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    first, final = (load(path, state.task) for _, path in checkpoints(tmp_path))
    assert [r.step for r in first.history] == [4]
    assert first.stopped is None
    assert final.stopped == "6 steps done"
    assert torch.equal(final.params["weight"], state.params["weight"])


def test_a_final_state_that_was_just_saved_only_learns_why_it_ended(tmp_path, monkeypatch):
    """No second copy of the tensors is written; the record is completed."""
    written = []
    real = saving.write
    monkeypatch.setattr(saving, "write", lambda *args, **options: written.append(1) or real(*args, **options))
    state, _ = ran(checkpoint_every(tmp_path, epochs(1)), stop_when(max_epochs(1)))
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    assert load(tmp_path, state.task).stopped == "1 epochs done"
    assert written == [1]


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: checkpoint_every("runs", keep=3), r"keep must be a retention such as last\(3\)"),
    ],
)
def test_a_combinator_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("late", [lambda: evaluate_every(loader(), epochs(1)), epoch_means, lambda: log_to(Recorder())])
def test_what_is_measured_and_logged_is_saved_with_the_tick(late, tmp_path):
    """Evaluation, history and log stand before saving and stopping after it; another order is refused."""
    saving, stopping = checkpoint_every(tmp_path, epochs(1)), stop_when(max_steps(1))
    assert pipe(train_step, grad(), apply(), late(), saving, stopping).kind == "step"
    with pytest.raises(SeamError, match="the order of a tick is"):
        pipe(train_step, grad(), apply(), saving, late(), stopping)
    with pytest.raises(SeamError, match="the order of a tick is"):
        pipe(train_step, grad(), apply(), late(), stopping, saving)
