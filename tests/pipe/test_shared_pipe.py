"""A pipe is a value: what a run opens or remembers belongs to its state, so one pipe used twice does what two pipes do."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.errors import FaultWarning
from fnlight.testing import assert_trees_equal


def train_step(model, batch):
    return F.mse_loss(model(batch), batch)


def created(seed=0, model=None):
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2)) if model is None else model
    task = fl.Task(model, train_step, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    return fl.TrainState.create(task, seed=seed)


def data(n=6):
    return [torch.randn(4, 2, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def whole(folder, record):
    """A pipe in which everything that acts between steps has its place."""
    return fl.pipe(
        train_step,
        fl.recompute("0"),
        fl.grad(),
        fl.accumulate(2),
        fl.skip_nonfinite(),
        fl.clip_quantile(),
        fl.apply(),
        fl.unfreeze_at({"0": 1}),
        fl.ema(0.9),
        fl.swa(1),
        fl.check_finite(fl.steps(2)),
        fl.debug_bundle(folder, fl.steps(2)),
        fl.evaluate_every(data(3), fl.steps(2), eval_step=lambda model, batch: {"loss": train_step(model, batch)}),
        fl.epoch_means(),
        fl.log_to(record, every=fl.steps(2)),
        fl.collect_garbage(),
        fl.stop_when(fl.patience("val/loss", 100), fl.max_steps(8)),
    )


def in_turn(steps, states):
    """Train two states step by step in turn, as two loops in one program do."""
    runs = [fl.run(step, state, data()) for step, state in zip(steps, states, strict=True)]
    ends = [None, None]
    while any(run is not None for run in runs):
        for i, run in enumerate(runs):
            if run is not None:
                ends[i] = next(run, None) or ends[i]
                runs[i] = None if ends[i][0].stopped else run
    return [state for state, _ in ends]


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_pipe_used_twice_does_what_two_pipes_do(interleaved, tmp_path):
    """Two states trained with one pipe, one after the other or in turn, end bitwise as with a pipe each, and are logged the same."""
    found = []
    for shared in (True, False):
        records = []
        first = whole(tmp_path, records.append)
        steps = (first, first if shared else whole(tmp_path, records.append))
        states = (created(seed=1), created(seed=2))
        ends = in_turn(steps, states) if interleaved else [list(fl.run(s, t, data()))[-1][0] for s, t in zip(steps, states, strict=True)]
        found.append((ends, records))
    (ends, records), (expected, others) = found
    assert records == others
    assert ends[0].history != ends[1].history
    for end, other in zip(ends, expected, strict=True):
        assert (end.progress, end.history) == (other.progress, other.history)
        assert_trees_equal(
            [dict(end.params), end.memory["ema"], end.memory["swa"]], [dict(other.params), other.memory["ema"], other.memory["swa"]]
        )


class Place(SimpleNamespace):
    """A placement of two ranks, of which this process plays one: evaluations read this rank's batches."""

    def __init__(self, rank):
        world = SimpleNamespace(rank=rank, size=2, gather=lambda found: [found])
        super().__init__(world=world, lockstep=False, writes=True, sync=lambda store: None, rest=lambda module: None, everyone=world)


def test_a_state_with_another_placement_evaluates_its_own_data():
    """The sources of an evaluation are opened for the placement of the state that is evaluated."""
    seen = []

    def eval_step(model, batch):
        seen.append(float(batch[0, 0]))
        return {"n": 1.0}

    step = fl.pipe(lambda state, batch: (state, {}), fl.evaluate_every(data(), lambda tick: True, eval_step=eval_step))
    firsts = [float(batch[0, 0]) for batch in data()]
    for place, expected in ((Place(0), firsts[::2]), (Place(1), firsts[1::2]), (None, firsts), (Place(0), firsts[::2])):
        state = created()
        state.store.place = place
        for _ in range(2):
            seen.clear()
            state, _ = step(state, None)
            assert seen == expected


def test_every_run_warns_of_a_sink_that_fails():
    """That a sink fails is said once in a run, also where two runs share the pipe and go in turn."""

    def broken(record):
        raise OSError("no space left")

    step = fl.pipe(train_step, fl.grad(), fl.apply(), fl.log_to(broken, every=fl.steps(1)), fl.stop_when(fl.max_steps(3)))
    with pytest.warns(FaultWarning, match="the sink broken failed") as told:
        states = in_turn((step, step), (created(seed=1), created(seed=2)))
    assert len(told) == 2
    assert [state.memory["failed_sinks"]["broken"]["records"] for state in states] == [3, 3]


def test_a_bundle_holds_the_steps_of_the_state_that_failed(tmp_path):
    """Of two states that are trained in turn with one pipe, the one that fails is written, with its own batches."""

    def fails(model, batch):
        if batch[0, 0] > 100:
            raise ZeroDivisionError("too large")
        return train_step(model, batch)

    step = fl.pipe(fails, fl.grad(), fl.apply(), fl.debug_bundle(tmp_path, fl.steps(100)))
    good, bad = created(seed=1), created(seed=2)
    for batch in data(3):
        good, _ = step(good, batch)
        bad, _ = step(bad, batch + 1)
    with pytest.raises(ZeroDivisionError, match="too large"):
        step(bad, torch.full((4, 2), 101.0))
    found = fl.load_bundle(tmp_path / "bundles" / "step-00000004", good.task)
    assert found.state.seed == 2
    assert found.repeated


def test_patterns_are_looked_up_in_the_model_that_is_trained():
    """One pipe freezes in each of two models what the pattern means there."""
    step = fl.pipe(train_step, fl.grad(), fl.apply(), fl.freeze("*.bias"), fl.stop_when(fl.max_steps(1)))
    small, large = created(), created(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)))
    for state in in_turn((step, step), (small, large)):
        before = dict(state.task.model.named_parameters())
        same = {name for name, p in state.params.items() if torch.equal(p, before[name])}
        assert same == {name for name in before if name.endswith("bias")}


def test_combinators_that_may_occur_twice_take_a_name(tmp_path):
    """Freezing, stopping, profiling and what is trained by hand may be in a pipe twice, each under its own name."""
    step = fl.pipe(
        train_step,
        fl.grad(),
        fl.apply(),
        fl.freeze("0.bias"),
        fl.freeze("2", eval_mode=True, name="head"),
        fl.stop_when(fl.max_steps(3)),
        fl.stop_when(fl.max_steps(2), name="mine"),
    )
    *_, (state, _) = fl.run(step, created(), data())
    assert state.stopped == "2 steps done"
    before = dict(state.task.model.named_parameters())
    assert [name for name, p in state.params.items() if not torch.equal(p, before[name])] == ["0.weight"]
    assert fl.profile(tmp_path, range(1, 2), name="other").key == "other"
    assert fl.manual(name="other").key == "other"


def test_the_end_of_a_run_is_not_remembered_for_the_next_one():
    """A step of several updates is cut short where its own run ends, and not where an earlier run of the same pipe or state did."""
    kernel = fl.pipe(train_step, fl.grad(), fl.apply(), fl.compile("trace", unroll=4))
    *_, (state, _) = fl.run(fl.pipe(kernel, fl.stop_when(fl.max_steps(2))), created(), data(8))
    assert state.progress.step == 2
    *_, (state, _) = fl.run(
        fl.pipe(kernel, fl.stop_when(lambda state: "enough" if state.progress.step >= 6 else None)), state, data(8), donate=True
    )
    assert state.progress.step == 6
