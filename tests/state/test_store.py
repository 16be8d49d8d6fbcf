"""Laws of `fnlight.state.store`: every part has one lifetime and known writers, and what belongs to a run or a step does not outlive it."""

import re

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight.pipe import Combinator, pipe
from fnlight.state import RunScope, StepScratch, Store
from fnlight.step import apply
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.repo.source import ROOT


@pytest.mark.parametrize("part", [Store, RunScope, StepScratch])
def test_every_slot_is_described_where_it_is(part):
    """The docstring of each part names all of its slots, with who writes them."""
    missing = [slot for slot in part.__slots__ if not re.search(rf"`{slot}`|^ *{slot}:", part.__doc__, re.M)]
    assert not missing


def test_the_page_on_the_design_has_the_lifetime_of_every_slot():
    """The table of docs/design.md names each slot of the store and of its parts exactly once."""
    section = (ROOT / "docs" / "design.md").read_text().split("## Lifetime of every part of a state")[1].split("\n## ")[0]
    named = [
        name.removeprefix("store.")
        for row in section.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`([\w.]+)`", row.split("|")[1])
    ]
    slots = [slot for slot in Store.__slots__ if slot not in ("run", "step")]
    slots += [f"run.{slot}" for slot in RunScope.__slots__] + [f"step.{slot}" for slot in StepScratch.__slots__]
    assert sorted(named) == sorted(slots)


def test_moving_a_state_keeps_what_is_open_and_forgets_what_follows_from_the_old_tensors():
    """A moved state has the run of before, a new step, and combinators that are given their memory again."""
    task = tiny_task()
    state, _ = pipe(task.train_step, fl.grad(), apply(), fl.ema(0.5))(fl.TrainState.create(task), tiny_batches("mlp", 1, 4)[0])
    store, run, scratch = state.store, state.store.run, state.store.step
    run.resources["file"], times = object(), store.wall_time
    version = state.version
    state = state.moved("cpu")
    assert (state.store is store, store.run is run, store.wall_time is times, list(run.resources)) == (True, True, True, ["file"])
    assert (store.step is scratch, store.owner, store.bound, run.retained_grads) == (False, None, None, None)
    assert (state.version, store.version) == (version + 2, version + 2)


def test_what_was_one_runs_is_gone_when_it_ends():
    """After a run no resource, no last step and no gradient of it is left in the store, so the next run starts without them."""
    closed, task = [], tiny_task()

    class Held:
        def close(self, error):
            closed.append(error)

    def start(state):
        state.store.run.resources["mine"] = Held()
        return state

    holding = Combinator("holding", lambda step: step, "step", "step", start=start)
    step = pipe(task.train_step, fl.grad(), apply(), holding, fl.stop_when(fl.max_steps(2)))
    for state, _ in fl.run(step, fl.TrainState.create(task), tiny_batches("mlp", 3, 4)):
        known = state.store.run.until
    run = state.store.run
    assert (known, closed) == (2, [None])
    assert (run.resources, run.until, run.retained_grads) == ({}, None, None)


def test_a_copy_of_a_store_has_a_run_and_a_step_of_its_own():
    """What belongs to a run or to a step is not copied, and the original keeps it."""
    store = Store(nn.Linear(2, 1), fl.Optim(None), {})
    store.step.scale, store.run.until = torch.ones(()), 7
    twin = store.copy()
    assert (twin.step.scale, twin.run.until, store.run.until) == (None, None, 7)
    assert_trees_equal(dict(twin.named), dict(store.named))
