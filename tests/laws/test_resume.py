"""Laws 2 and 6: a run that resumes from a file ends bitwise where the first run did, from every step; and a file holds bitwise the state."""

import gc
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import attrs
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fnlight import FitConfig, Loaders, Optim, TrainState, fit, load, plateau, run, save, steps
from fnlight.checkpoint import step_path
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.laws.combinators import PAIRS, num_steps, pipe_with
from tests.laws.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_no_garbage():
    """Each of hundreds of runs that collect garbage would go over all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def loader_of(case):
    """Shuffled batches, the last one smaller."""
    x, y = (torch.cat(parts) for parts in zip(*case.batches(), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)


@pytest.mark.parametrize(("name", "choice"), PAIRS)
def test_a_file_holds_the_state_and_going_on_from_it_is_going_on(name, choice, tmp_path):
    """From every step of two shuffled epochs: what is loaded is bitwise what was saved, and ends bitwise where the first run did."""
    case = TASKS[name]
    loader, task = loader_of(case), case.make()
    step = pipe_with(choice, task, tmp_path, case.batches())
    total = num_steps(choice, case)
    for state, _ in islice(run(step, TrainState.create(task, seed=9), loader), total):
        done = state.progress.step
        save(state, tmp_path / f"{done}")
        assert_trees_equal(load(tmp_path / f"{done}", task), state)
    assert (state.progress.epoch, state.progress.batch) == (2, 0)
    for k in (1, 4) if choice == "compile" else range(1, total):  # each trace takes seconds: within an epoch, and in the next one
        others = pipe_with(choice, task, tmp_path, case.batches())
        resumed = list(islice(run(others, load(tmp_path / f"{k}", task), loader), total - k))[-1][0]
        assert_trees_equal(resumed, state)


class Noisy(Dataset):
    """Samples that are augmented where they are read, which is in a worker."""

    def __init__(self, count):
        self.x, self.y = tiny_batches(num_batches=1, batch_size=count)[0]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.3 * torch.randn(4), self.y[index]


def plateau_task():
    """BatchNorm, dropout, and a learning rate that falls each time the validation loss is not much better."""
    task = tiny_task()
    schedule = plateau(factor=0.5, patience=0, threshold=0.05)
    return attrs.evolve(
        task, configure_optimizers=lambda m: Optim(torch.optim.AdamW(m.parameters(), lr=0.05), schedule, monitor="val/loss")
    )


def test_resume_from_every_step(tmp_path):
    """For every k of three epochs: `fit` to k, save, load and `fit` to the end is bitwise `fit` to the end.

    With shuffling, dropout, augmentation in workers, an uneven last batch, averaged weights and a plateau.
    """
    task = plateau_task()
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    loaders = Loaders(train=DataLoader(Noisy(18), batch_size=4, shuffle=True, **workers), val=tiny_batches(seed=1))
    config = FitConfig(max_epochs=3, ema=0.8, clip_norm=1.0, eval_every=steps(2), device="cpu", progress=False)
    whole = fit(TrainState.create(task, seed=11), loaders, config)
    assert (whole.progress.step, whole.progress.samples, whole.stopped) == (15, 54, "3 epochs done")
    rates = {group["lr"] for group in whole.store.optim.optimizer.param_groups}
    assert rates.isdisjoint({0.05}), "the plateau never fell, so this test would show nothing about it"
    for k in range(1, 15):
        part = fit(TrainState.create(task, seed=11), loaders, attrs.evolve(config, max_epochs=None, max_steps=k))
        assert part.progress.step == k
        save(part, tmp_path / f"{k}")
        resumed = fit(load(tmp_path / f"{k}", task), loaders, config)
        assert_trees_equal(resumed, whole)
        assert resumed.stopped == whole.stopped


def test_resume_does_not_depend_on_the_number_of_workers(tmp_path):
    """A run that was begun with two workers goes on without any, bitwise."""
    task, data = plateau_task(), Noisy(18)
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    config = FitConfig(max_steps=8, device="cpu", progress=False)
    val = tiny_batches(seed=1)
    whole = fit(TrainState.create(task, seed=2), Loaders(train=loader, val=val), config)
    part = fit(TrainState.create(task, seed=2), Loaders(train=loader, val=val), attrs.evolve(config, max_steps=3))
    alone = DataLoader(data, batch_size=4, shuffle=True)
    assert_trees_equal(fit(load(save(part, tmp_path / "3"), task), Loaders(train=alone, val=val), config), whole)


def python(*args):
    """Another process of the same Python, in the root of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_resume_in_a_new_process(tmp_path):
    """A process that knows the code and the files only goes on bitwise, within an epoch and between epochs."""
    case = TASKS["transformer"]
    step = pipe_with("all of them", case.make(), tmp_path, case.batches())
    for state, _ in islice(run(step, TrainState.create(case.make(), seed=9), loader_of(case)), 5):
        save(state, tmp_path / f"{state.progress.step}")
    done = python("tests/laws/going_on.py", "transformer", tmp_path, 5, 1, 3)
    assert done.returncode == 0, done.stderr
    for k in (1, 3):
        assert_trees_equal(load(tmp_path / f"from-{k}", case.make()), state)


def test_resume_after_being_killed_at_any_instant(tmp_path):
    """Whatever the instant at which a run is killed, in a step or half-way through a save, `resume=True` ends bitwise where it would have."""
    done = python("tests/laws/killed.py", tmp_path)
    assert done.returncode == 0, done.stderr
    deaths = [int(line) for line in done.stdout.split()]
    whole = load(tmp_path / "whole", tiny_task())
    assert len(deaths) >= 10
    for at, death in enumerate(deaths):
        assert death == -signal.SIGKILL
        resumed = load(step_path(tmp_path / f"killed-{at}", whole.progress.step), tiny_task())
        assert_trees_equal(resumed, whole)
        left = [path.name for path in (tmp_path / f"killed-{at}" / "checkpoints").iterdir()]
        assert left == [f"step-{whole.progress.step:08d}"]
