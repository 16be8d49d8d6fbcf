"""`run` goes through the data, yields every state, works on a copy, and charges the clock."""

import subprocess
import sys

import torch

from fnlight.gradients import accumulate, grad
from fnlight.loop import run, stop_when
from fnlight.pipe import pipe
from fnlight.step import apply, ema
from fnlight.triggers import max_epochs, max_steps
from tests.loop.runs import ran
from tests.small_runs import Slow, created, loader, train_step


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


def test_the_mean_of_a_group_is_one_step():
    """With accumulate(3), four batches are two steps, the last of one batch."""
    step = pipe(train_step, grad(), accumulate(3), apply(), ema(0.9), stop_when(max_epochs(1)))
    found = [s.progress for s, _ in run(step, created(), loader())]
    assert [(p.step, p.batch, p.epoch, p.samples) for p in found] == [(1, 3, 0, 6), (2, 0, 1, 8)]


def test_a_program_may_end_in_the_middle_of_a_run():
    """Python ends while a generator of `run` is open: nothing is read any more, and the process ends with 0."""
    program = """
import fnlight as fl
from fnlight.testing import tiny_batches, tiny_task
task = tiny_task()
items = fl.run(fl.pipe(task.train_step, fl.grad(), fl.apply()), fl.TrainState.create(task), tiny_batches())
next(items)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
