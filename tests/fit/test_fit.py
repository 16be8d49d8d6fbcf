"""`fit` is one composition of the parts: what it is told it does, and it does nothing else."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fnlight.checkpoint import Folder, checkpoints, last
from fnlight.data import Loaders
from fnlight.errors import BrokenCheckpointError, CheckpointWarning, ConfigError, LoaderError, MonitorError, StepError, TaskWarning
from fnlight.fit import FitConfig, fit
from fnlight.optim import Optim
from fnlight.schedules import plateau
from fnlight.sinks import JSONL
from fnlight.state import TrainState
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from fnlight.triggers import steps
from tests.small_runs import both, config, counted, created, loader, train_step


def test_fit_trains_evaluates_and_says_why_it_stopped():
    """The loss falls, every epoch is a record, and the history prints as a table."""
    state = fit(created(), both(), config(max_epochs=3))
    losses = [r.metrics["val/loss"] for r in state.history]
    assert losses == sorted(losses, reverse=True)
    assert state.stopped == "3 epochs done"
    assert [list(r.metrics) for r in state.history] == [["val/loss", "train/loss"]] * 3
    assert str(state.history).splitlines()[0].split() == ["step", "epoch", "val/loss", "train/loss"]


def test_fit_leaves_its_input_alone():
    """State, module and global generators of the caller stay; the same call gives the same result."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    weights, random = model[0].weight.clone(), torch.default_generator.get_state()
    state = created(model=model)
    random = torch.default_generator.get_state()
    first = fit(state, both(), config(max_epochs=2))
    torch.manual_seed(99)
    second = fit(state, both(), config(max_epochs=2))
    torch.default_generator.set_state(random)
    assert torch.equal(model[0].weight, weights)
    assert torch.equal(state.params["0.weight"], weights)
    assert first.history == second.history
    assert all(torch.equal(p, second.params[n]) for n, p in first.params.items())


def test_fit_puts_the_global_generators_back():
    """What the caller draws next does not depend on whether fit ran."""
    state = created()
    torch.manual_seed(5)
    random = torch.default_generator.get_state()
    fit(state, both(), config(max_epochs=1))
    assert torch.equal(torch.default_generator.get_state(), random)


def test_donating_trains_on_the_very_tensors():
    """donate=True holds no second copy, and the caller's state is no longer readable."""
    state = created()
    ended = fit(state, both(), config(max_epochs=1, donate=True))
    assert ended.store is state.store
    with pytest.raises(RuntimeError, match="was donated to a later step"):
        _ = state.params


def test_phases_compose():
    """fit is a function: a second phase goes on from the state of the first."""
    whole = fit(created(), both(), config(max_epochs=4))
    half = fit(created(), both(), config(max_epochs=2))
    again = fit(half, both(), config(max_epochs=4))
    assert again.history == whole.history
    assert torch.equal(again.params["weight"], whole.params["weight"])


def test_nothing_is_done_where_nothing_is_asked_for(tmp_path, monkeypatch):
    """max_epochs=0 and max_steps=0 take no step; without a dir no file is written."""
    monkeypatch.chdir(tmp_path)
    fn, calls = counted()
    assert fit(created(fn), both(), config(max_epochs=0)).stopped == "0 epochs done"
    assert fit(created(fn), both(), config(max_steps=0)).progress.step == 0
    assert calls == []
    fit(created(), both(), config(max_epochs=1))
    assert os.listdir(tmp_path) == []


def test_a_run_is_resumed_where_it_stands(tmp_path):
    """resume=True goes on from the newest checkpoint, bitwise, and starts afresh where there is none."""
    whole = fit(created(), both(), config(max_epochs=4, dir=tmp_path / "whole"))
    fit(created(), both(), config(max_steps=6, dir=tmp_path / "part", resume=True))
    again = fit(created(), both(), config(max_epochs=4, dir=tmp_path / "part", resume=True))
    assert again.history == whole.history
    assert again.progress == whole.progress
    assert torch.equal(again.params["weight"], whole.params["weight"])


def test_a_resumed_run_reads_its_checkpoint_once(tmp_path, monkeypatch):
    """What is checked is what is loaded, and nothing is read for the digests alone."""
    fit(created(), both(), config(max_steps=6, dir=tmp_path))
    reads, fetch, digest = [], Folder.fetch, Folder.digest
    monkeypatch.setattr(Folder, "fetch", lambda self, name, kind: reads.append(name) or fetch(self, name, kind))
    monkeypatch.setattr(Folder, "digest", lambda self, name, kind: reads.append(name) or digest(self, name, kind))
    fit(created(), both(), config(max_steps=6, dir=tmp_path, resume=True))
    assert len(reads) == len(set(reads)) > 1


def test_a_run_goes_on_from_a_checkpoint_whose_replacement_was_cut_short(tmp_path):
    """What its writer set aside before it died stands in for it."""
    whole = fit(created(), both(), config(max_steps=6))

    def failing(model, batch):
        if len(seen) == 3:
            raise RuntimeError("the power is gone")
        seen.append(batch)
        return train_step(model, batch)

    seen = []
    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(created(failing), both(), config(max_steps=6, dir=tmp_path, save_every=steps(1)))
    path = tmp_path / "checkpoints" / "step-00000003"
    path.rename(path.with_name(".step-00000003.old-0123abcd"))
    with pytest.warns(CheckpointWarning, match="was being replaced when its writer ended"):
        again = fit(created(), both(), config(max_steps=6, dir=tmp_path, resume=True))
    assert torch.equal(again.params["weight"], whole.params["weight"])


def test_a_run_is_never_overwritten_by_another(tmp_path):
    """A dir that holds a run is an error that says how to go on."""
    fit(created(), both(), config(max_epochs=1, dir=tmp_path))
    with pytest.raises(ConfigError, match=r"already holds a run, up to step-00000004; resume it with FitConfig\(resume=True\)"):
        fit(created(), both(), config(max_epochs=2, dir=tmp_path))


def test_the_last_state_of_a_run_is_always_saved(tmp_path):
    """save_every=None saves at the end only; the configuration lies beside it."""
    fit(created(), both(), config(max_steps=6, dir=tmp_path, save_every=None))
    assert [step for step, _ in checkpoints(tmp_path)] == [6]
    assert FitConfig.from_json((tmp_path / "config.json").read_text()).max_steps == 6


def test_stop_is_heeded_only_past_the_minima():
    """A rule that holds all the time ends the run at the first step past min_steps."""
    state = fit(created(), both(), config(max_epochs=9, stop=lambda state: "now", min_steps=6))
    assert state.progress.step == 6


def test_limits_cut_the_epoch():
    """limit_train and limit_eval count batches, or are fractions of them."""
    fn, calls = counted()
    state = fit(created(fn), both(), config(max_epochs=2, limit_train=3, limit_eval=0.5))
    assert len(calls) == 6
    assert state.progress.step == 6
    assert fit(created(), both(), config(max_epochs=1, limit_train=0.5)).progress.step == 2


def test_overfitting_takes_the_same_batches_unshuffled():
    """overfit_batches=n trains on the first n batches of the data, each epoch."""
    fn, calls = counted()
    fit(created(fn), both(), config(max_epochs=2, overfit_batches=2))
    first = list(loader(shuffle=False))[:2]
    assert all(torch.equal(a, b) for a, b in zip(calls, first * 2, strict=True))


def test_a_dev_run_tries_everything_and_writes_nothing(tmp_path):
    """n batches of training and evaluation, no files, whatever else is configured."""
    fn, calls = counted()
    state = fit(created(fn), both(), config(max_epochs=50, fast_dev_run=2, dir=tmp_path / "run", sinks=JSONL(tmp_path / "log")))
    assert len(calls) == 2
    assert "val/loss" in state.history[0].metrics
    assert os.listdir(tmp_path) == []


def test_a_plateau_schedule_watches_the_history():
    """The learning rate falls once the monitored metric has stopped improving."""

    def configure(model):
        return Optim(torch.optim.SGD(model.parameters(), lr=0.0), plateau(factor=0.5, patience=0), monitor="val/loss")

    state = fit(created(configure=configure), both(), config(max_epochs=1))
    with pytest.raises(MonitorError, match="the schedule plateau.* monitors 'val/loss'"):
        fit(created(configure=configure), loader(), config(max_epochs=1))
    assert state.store.optim.optimizer.param_groups[0]["lr"] == 0.0


def test_missing_and_empty_data_are_errors_before_any_work():
    """The error says which loader."""
    with pytest.raises(LoaderError, match="fit needs training data"):
        fit(created(), Loaders(val=loader()), config(max_epochs=1))
    with pytest.raises(LoaderError, match="empty|no batch"):
        fit(created(), [], config(max_epochs=1))


def test_a_failing_step_loses_nothing(tmp_path):
    """The caller's state stays readable, and the checkpoint of the epoch before stands."""
    calls = []

    def failing(model, batch):
        calls.append(1)
        return train_step(model, batch) if len(calls) < 6 else None

    state = created(failing)
    with pytest.raises(StepError, match="returned no loss"):
        fit(state, both(), config(max_epochs=2, dir=tmp_path))
    assert state.progress.step == 0
    assert state.params["weight"].shape == (3, 3)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]


def test_progress_is_shown_without_changing_the_result(capfd):
    """The console is a sink like any other."""
    quiet = fit(created(), both(), config(max_epochs=2))
    loud = fit(created(), both(), config(max_epochs=2, progress=True))
    shown = capfd.readouterr()
    assert "val/loss" in shown.out + shown.err
    assert loud.history == quiet.history


def test_a_state_moves_to_the_device_that_was_asked_for():
    """A device of the caller's choice is used, and the caller's state stays where it is."""
    assert fit(created(), both(), config(max_steps=1, device="cpu")).device == torch.device("cpu")


def test_retention_holds_over_a_resume(tmp_path):
    """What the first part of a run wrote is this run's as well."""
    fit(created(), both(), config(max_epochs=2, dir=tmp_path, keep=last(2)))
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 8]
    fit(created(), both(), config(max_epochs=4, dir=tmp_path, keep=last(2), resume=True))
    assert [step for step, _ in checkpoints(tmp_path)] == [12, 16]


def test_a_run_whose_checkpoints_are_all_broken_is_not_started_over(tmp_path):
    """Resuming names each broken checkpoint, refuses, and leaves them as they are."""
    fit(created(), both(), config(max_epochs=1, dir=tmp_path))
    manifest = tmp_path / "checkpoints" / "step-00000004" / "state.json"
    manifest.write_text("{}")
    with (
        pytest.warns(UserWarning, match="skipped a broken checkpoint: .*step-00000004"),
        pytest.raises(BrokenCheckpointError, match="none of the 1 checkpoints in .* is valid, see the warnings above"),
    ):
        fit(created(), both(), config(max_epochs=2, dir=tmp_path, resume=True))
    assert manifest.read_text() == "{}"


def test_fits_in_several_threads_are_those_that_run_alone():
    """They wait for each other, and say so; the caller's generators stay as they were."""
    task = tiny_task("mlp")

    def one(seed):
        return fit(TrainState.create(task, seed=seed), tiny_batches("mlp"), FitConfig(max_steps=6, progress=False))

    alone = [one(seed) for seed in range(3)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", TaskWarning)
        found = list(threads.map(one, range(3)))
    for a, b in zip(alone, found, strict=True):
        assert_trees_equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_a_fit_that_waits_for_another_thread_says_so():
    """Nobody takes it for one that hangs."""
    inside, go_on = threading.Event(), threading.Event()

    def sink(record):
        inside.set()
        go_on.wait(60)

    def first():
        fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_steps=1, sinks=(sink,), log_every=steps(1), progress=False))

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(first)
        inside.wait(60)
        threading.Timer(0.2, go_on.set).start()
        with pytest.warns(TaskWarning, match="another thread of this process is in fl.fit.*start a process for each"):
            fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_steps=1, progress=False))
        running.result()


def test_a_fit_within_a_sink_or_a_rule_runs_and_leaves_the_other_alone():
    """The run around it is what it would have been."""
    inner = []

    def fits(record=None):
        inner.append(fit(TrainState.create(tiny_task(), seed=5), tiny_batches(), FitConfig(max_steps=2, progress=False)))

    def outer(sink, **options):
        told = FitConfig(max_steps=6, progress=False, log_every=steps(2), sinks=(sink,), **options)
        return fit(TrainState.create(tiny_task()), tiny_batches(), told)

    plain = outer(lambda record: None)
    assert_trees_equal(outer(fits), plain)
    assert_trees_equal(outer(lambda record: None, stop=lambda state: fits() and None), plain)
    assert len(inner) > 6
    for each in inner[1:]:
        assert_trees_equal(each, inner[0])
