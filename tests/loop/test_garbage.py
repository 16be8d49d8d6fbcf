"""Garbage is collected between steps, and however a run ends, Python collects as it did before."""

import gc
from itertools import islice

import pytest
import torch
from torch import nn

import fnlight as fl


def task(fn=lambda model, batch: model(batch).square().mean()):
    return fl.Task(nn.Linear(2, 1), fn, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))


DATA = [torch.ones(2, 2)] * 5


@pytest.fixture
def collections():
    """The generation of every collection that begins."""
    seen = []
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]) if phase == "start" else None)
    yield seen
    gc.callbacks.pop()


@pytest.fixture
def settings():
    """What must be as it was."""
    before = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()
    yield before
    gc.set_threshold(*before[1])
    gc.unfreeze() if not before[2] else None


def now():
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()


def frozen(mine):
    """Whether this object is; how many are may fall at any time, as other threads let theirs go."""
    return not any(one is mine for one in gc.get_objects())


def step_of(fn, *parts):
    return fl.pipe(fn, fl.grad(), fl.apply(), *parts)


def test_garbage_is_collected_where_it_is_due(collections, settings):
    """Before the first step, and then at every second one; what is older than the run is out of it."""
    one = task()
    found = fl.run(step_of(one.train_step, fl.collect_garbage(every=fl.steps(2))), fl.TrainState.create(one), DATA)
    next(found)
    assert gc.get_freeze_count() > 1000
    collections.clear()
    assert [len(list(islice(found, 1))) + len(collections) for _ in range(4)] == [2, 2, 3, 3]
    assert set(collections) == {2}
    found.close()
    assert now() == settings


@pytest.mark.parametrize("end", ["stopped", "failed", "left"])
def test_however_a_run_ends_python_collects_as_before(end, settings):
    """After a stop, an error in a step, and a loop that was left, thresholds and frozen objects are as they were."""

    def fn(model, batch):
        if end == "failed":
            raise ZeroDivisionError("in the step")
        return model(batch).sum()

    one = task(fn)
    rules = [fl.stop_when(fl.max_steps(3))] if end == "stopped" else []
    found = fl.run(step_of(fn, fl.collect_garbage(), *rules), fl.TrainState.create(one), DATA)
    if end == "failed":
        with pytest.raises(ZeroDivisionError, match="in the step"):
            list(found)
    elif end == "left":
        next(found)
        found.close()
    else:
        list(found)
    assert now() == settings


def test_what_the_user_has_chosen_stays(settings):
    """Objects that were frozen before stay frozen, and where Python was told never to collect by itself it does not."""
    gc.set_threshold(0, 5, 5)
    mine, one = [], task()
    gc.freeze()
    found = fl.run(step_of(one.train_step, fl.collect_garbage()), fl.TrainState.create(one), DATA)
    next(found)
    assert gc.get_threshold()[0] == 0
    found.close()
    assert gc.isenabled() == settings[0]
    assert gc.get_threshold() == (0, 5, 5)
    assert frozen(mine)
    gc.unfreeze()


def test_a_run_within_a_run_leaves_the_outer_one_alone(settings):
    """The inner run finds the garbage seen to, and puts nothing back that is not its own."""
    one = task()
    outer, inner = (fl.run(step_of(one.train_step, fl.collect_garbage()), fl.TrainState.create(one), DATA) for _ in range(2))
    mine = []
    next(outer), next(inner)
    inner.close()
    assert frozen(mine)
    assert gc.get_threshold() != settings[1]
    outer.close()
    assert now() == settings


def test_fit_trains_the_same_with_it(settings):
    """The values are bitwise those of a run that leaves it to Python."""
    one = task()
    found = [fl.fit(fl.TrainState.create(one), DATA, fl.FitConfig(max_steps=7, progress=False, gc=gc)) for gc in ("auto", "managed")]
    fl.testing.assert_trees_equal(found[0].params, found[1].params)
    assert now() == settings


def test_what_gc_may_be_is_said():
    """Anything else is refused before any work."""
    with pytest.raises(fl.errors.ConfigError, match="must be one of 'auto', 'managed', but got 'off'"):
        fl.FitConfig(max_steps=1, gc="off")
