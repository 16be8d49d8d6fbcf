"""Going back: where, how often, what is left out, and that a run that was stopped at any step goes back as the one that was not."""

import json
import math
import warnings
from itertools import islice

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.checkpoint import checkpoints, load, newest, step_path
from fnlight.errors import ConfigError, FaultWarning, NonFiniteError, SeamError
from fnlight.nonfinite import rollback
from fnlight.testing import assert_trees_equal

MARK = 99.0
"""A first entry of a batch that makes its loss NaN."""


def train_step(model, batch):
    """A loss that is NaN where a batch says so, with random numbers in it."""
    x = F.dropout(batch[:, 1:], 0.3)
    return F.mse_loss(model(x), batch[:, 1:]) * torch.where(batch[0, 0] == MARK, torch.nan, 1.0)


def data(*bad, count=12):
    """Batches, of which some are bad."""
    rows = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    for i in bad:
        rows[i][0, 0] = MARK
    return rows


def created(fn=train_step, configure=None):
    """A state of a small model with BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return fl.TrainState.create(fl.Task(model, fn, configure_optimizers=configure or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1))))


def config(folder, **changes):
    """A checkpoint every four steps, and all that could go wrong in going back."""
    given = {"max_epochs": 1, "dir": folder, "save_every": fl.steps(4), "nonfinite": "rollback", "ema": 0.9, "clip_norm": 1.0}
    return fl.FitConfig(**{**given, "device": "cpu", "progress": False, **changes})


def fit(folder, batches, state=None, **changes):
    """A run that may go back, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = fl.fit(state or created(), batches, config(folder, **changes))
    return after, [str(w.message) for w in caught if w.category is FaultWarning]


def test_a_run_goes_back_and_on_with_the_data_behind_the_trouble(tmp_path):
    """After a NaN in batch 7, noticed at step 8, the state is that of step 4, and goes on with batch 9 as if those between were not there."""
    after, told = fit(tmp_path / "run", data(6), keep=fl.every(4))
    place = tmp_path / "run" / "checkpoints" / "step-00000004"
    where = f"back to {place}; the data of the 4 steps since then is skipped (1 of at most 3 times in a row)"
    assert told == [f"the loss was NaN or infinite at step 7 (in epoch 0, up to its batch 7): {where}"]
    at = after.progress
    assert (at.step, at.skipped, at.epoch, at.samples) == (8, 4, 1, 48)
    assert {key: after.memory["rollback"][key] for key in ("to", "row", "total")} == {"to": 4, "row": 1, "total": 1}
    whole, _ = fit(tmp_path / "other", data(6), keep=fl.every(4), max_epochs=None, max_steps=4)
    then = attrs.evolve(whole.progress, batch=8, samples=32, epoch_samples=32, skipped=4)
    by_hand = fl.pipe(train_step, fl.grad(), fl.clip_norm(1.0), fl.apply(), fl.ema(0.9), fl.epoch_means(), fl.stop_when(fl.max_epochs(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, (state, _) = fl.run(by_hand, attrs.evolve(whole, progress=then), data(6))
    for name in ("params", "buffers", "opt_state", "history"):
        assert_trees_equal(getattr(after, name), getattr(state, name))
    assert_trees_equal(after.memory["ema"], state.memory["ema"])


def test_going_back_keeps_the_tensors_where_they_are(tmp_path):
    """What holds on to a parameter, such as a graph or a hook, still holds the one that is trained."""
    state = created()
    weight = state.store.module[0].weight
    after, told = fit(tmp_path, data(6), state, donate=True)
    assert len(told) == 1
    assert after.store is state.store
    assert after.store.module[0].weight is weight


@pytest.mark.parametrize(
    "changes",
    [{}, {"save_in_background": False}, {"eval_every": None, "save_every": fl.steps(3)}, {"accumulate": 2, "save_every": fl.steps(2)}],
)
def test_a_run_that_was_stopped_anywhere_goes_back_as_the_one_that_was_not(tmp_path, changes):
    """Left after every step, before and behind going back, within epochs and between them, and resumed: bitwise the same, log and all."""
    batches = data(6) if "accumulate" in changes else data(2, 6, 11)

    def run(name, **more):
        log = tmp_path / name / "log.jsonl"
        return config(
            tmp_path / name, **{"max_epochs": 3, "max_nonfinite": 20, "sinks": fl.JSONL(log), "log_every": fl.steps(2), **changes, **more}
        )

    def lines(name):
        return [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fl.fit(created(), batches, run("whole"))
        assert whole.memory["rollback"]["total"] >= 3
        assert all(math.isfinite(value) for record in whole.history for value in record.metrics.values())
        assert all(math.isfinite(value) for line in lines("whole") for value in line["metrics"].values())
        for k in range(1, 18 if "accumulate" in changes else 36, 4):
            state = created()
            steps = fl.run(fl.compose(state.task, run(f"{k}"), batches), state, batches)
            for _ in islice(steps, k):
                pass
            steps.close()  # as a kill would: nothing is saved
            again = fl.fit(created(), batches, run(f"{k}", resume=True))
            assert_trees_equal(again, whole)
            assert lines(f"{k}") == lines("whole")


def test_too_many_times_in_a_row_are_an_error(tmp_path):
    """A run that cannot get beyond a checkpoint fails, and says where; the checkpoint stands."""
    with pytest.raises(
        NonFiniteError,
        match=r"at step 5 \(in epoch 0, up to its batch 13\); it is the 3. time in a row after checkpoint .*step-00000004, and max_consecutive=2",
    ):
        fit(tmp_path, data(*range(6, 30), count=30), max_nonfinite=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    assert all(torch.isfinite(p).all() for p in load(newest(tmp_path), created().task).params.values())


def test_to_another_checkpoint_is_not_in_a_row(tmp_path):
    """What counts is how often a run cannot get beyond one checkpoint."""
    after, told = fit(tmp_path, data(5, 14, 25, count=30), max_nonfinite=1)
    assert [text[text.index("(") :].split("step-")[-1][:8] for text in told] == ["00000004", "00000008", "00000016"]
    assert after.memory["rollback"]["total"] == 3


@pytest.mark.parametrize(
    ("clip_norm", "message"),
    [(None, "by step 8, NaN or infinite: 0.weight"), (1.0, "the norm of the gradients was NaN or infinite at step 8")],
)
def test_weights_that_are_no_numbers_are_noticed_before_they_are_saved(clip_norm, message, tmp_path):
    """A gradient that is NaN where the loss is not: no checkpoint holds the weights that come of it."""

    def hidden(model, batch):
        loss = train_step(model, batch)
        return loss + (0 * model[0].weight.sum()).abs().sqrt() if batch[1, 0] == MARK else loss

    batches = data()
    batches[7][1, 0] = MARK
    after, told = fit(tmp_path, batches, created(hidden), clip_norm=clip_norm)
    assert told[0].startswith(message)
    assert all(torch.isfinite(p).all() for p in after.params.values())


def test_there_is_always_something_to_go_back_to(tmp_path):
    """`fit` saves the state before the first step, too."""
    after, told = fit(tmp_path, data(1))
    assert "step-00000000; the data of the 4 steps" in told[0]
    assert (after.progress.step, after.progress.epoch) == (8, 1)


def test_the_last_steps_are_looked_at(tmp_path):
    """A NaN that is noticed when the run is over leaves a sound state and a sound checkpoint."""
    after, told = fit(tmp_path, data(9), max_epochs=None, max_steps=10)
    assert len(told) == 1
    assert (after.progress.step, after.progress.batch, after.stopped) == (8, 10, "10 steps done")
    assert_trees_equal(load(newest(tmp_path), after.task), after)


def test_an_epoch_whose_end_is_left_out_leaves_no_record(tmp_path):
    """Its mean would be of nothing; the next one is whole."""
    after, told = fit(tmp_path, data(9), max_epochs=2, save_every=fl.epochs(1))
    assert len(told) == 2
    assert after.progress.step == 0
    assert list(after.history) == []
    fine, told = fit(tmp_path / "other", data(), max_epochs=2, save_every=fl.epochs(1))
    assert told == []
    assert [record.step for record in fine.history] == [12, 24]


class Resumable:
    """A loader that keeps its own place."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, found):
        self.at = found["at"]


def test_a_loader_that_keeps_its_place_stays_where_it_is(tmp_path):
    """The place in the data is that of now, in the memory as well."""
    after, told = fit(tmp_path, Resumable(data(6, count=20)), max_epochs=None, max_steps=8)
    assert len(told) == 1
    assert after.memory["loader"]["loader"] == {"at": 12} == {"at": after.progress.batch}


@pytest.mark.parametrize(
    "changes", [{"compile": "trace", "clip_norm": None}, {"precision": "bf16"}, {"microbatch": 2}, {"precision": "fp16"}]
)
def test_other_ways_of_stepping_go_back_too(tmp_path, changes):
    """A traced step, other precisions, parts of batches: the run goes on with finite weights, as an eager one by number of steps."""
    after, _ = fit(tmp_path, data(6), **changes)
    assert all(torch.isfinite(p).all() for p in after.params.values())
    assert after.progress.epoch == 1


def test_phases_go_back_together(tmp_path):
    """Several optimizers, each with memory of its own."""
    task = fl.Task(
        nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}),
        {name: lambda model, batch, name=name: train_step(model[name], batch) for name in ("a", "b")},
        configure_optimizers=lambda m: {name: torch.optim.Adam(m[name].parameters(), lr=0.1) for name in ("a", "b")},
    )
    after, told = fit(tmp_path, data(6), fl.TrainState.create(task), clip_norm=None, ema=None)
    assert len(told) == 1
    assert after.progress.updates == {"a": 8, "b": 8}
    assert all(torch.isfinite(p).all() for p in after.params.values())


def by_hand(folder, *more, **options):
    """A pipe with rollback."""
    return fl.pipe(train_step, fl.grad(), fl.apply(), rollback(folder, every=fl.steps(2), **options), *more, fl.stop_when(fl.max_epochs(1)))


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    """By hand, the first checkpoint may come too late."""
    saving = fl.checkpoint_every(tmp_path, every=fl.steps(4))
    with pytest.raises(NonFiniteError, match=r"at step 2 .*holds no valid checkpoint to go back to; save the first one earlier"):
        list(fl.run(by_hand(tmp_path, saving), created(), data(1)))
    initial = fl.checkpoint_every(tmp_path / "b", every=fl.steps(4), initial=True)
    assert str(initial).endswith("keep=last(1), initial=True)")
    with pytest.warns(FaultWarning, match="step-00000000"):
        *_, (state, _) = fl.run(by_hand(tmp_path / "b", initial), created(), data(1))
    assert state.progress.step == 10


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    """Where the checkpoint is of another model, the error says what could not be gone back to, and why."""
    other = fl.TrainState.create(fl.Task(nn.Linear(1, 1), train_step))
    fl.save(other, step_path(tmp_path, 0))
    with pytest.raises(NonFiniteError, match=r"step-00000000 could not be restored: the checkpoint is from another model"):
        list(fl.run(by_hand(tmp_path, fl.checkpoint_every(tmp_path, every=None)), created(), data(1)))


def test_what_rollback_needs_is_asked_for_before_the_first_step(tmp_path):
    """Something must save, nothing may keep copies of its own, and a number must be one."""
    with pytest.raises(SeamError, match=r"nothing in this pipe saves any; add checkpoint_every\(dir\)"):
        by_hand(tmp_path)
    with pytest.raises(SeamError, match="leave one of them out"):
        by_hand(tmp_path, fl.debug_bundle(tmp_path), fl.checkpoint_every(tmp_path))
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
            rollback(tmp_path, max_consecutive=wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"nonfinite='rollback'\) loads a checkpoint, but dir is None; give dir"),
        ({"dir": "a", "debug_bundle": True}, r"nonfinite='rollback'\) drops the steps that debug_bundle=True would repeat"),
        ({"nonfinite": "raise", "max_nonfinite": 3}, r"max_nonfinite=3\) limits nonfinite='skip' and 'rollback', but nonfinite is 'raise'"),
        ({"dir": "a", "max_nonfinite": 0}, r"max_nonfinite=...\) must be .*at least 1"),
    ],
)
def test_fields_that_cannot_be_meant_are_refused(fields, message):
    """The configuration says it when it is made."""
    with pytest.raises(ConfigError, match=message):
        fl.FitConfig(**{"max_epochs": 1, "nonfinite": "rollback", **fields})


def test_the_configuration_says_how_often(tmp_path):
    """The number goes to whatever is gone along with; a try-out writes no files, so it raises."""
    state = created()
    shown = [
        str(fl.compose(state.task, config(tmp_path, **given)))
        for given in ({"max_nonfinite": 7}, {"nonfinite": "skip", "max_nonfinite": 5})
    ]
    assert "every=epochs(1) | steps(4), max_consecutive=7)" in shown[0]
    assert "skip_nonfinite(max_consecutive=5)" in shown[1]
    fp16 = fl.compose(state.task, config(tmp_path, nonfinite="skip", max_nonfinite=5, precision="fp16"))
    assert "loss_scale(max_consecutive=5)" in str(fp16)
    fl.fit(state, data(), config(tmp_path / "new", fast_dev_run=True, max_nonfinite=2))
    assert not (tmp_path / "new").exists()
