"""A step by hand is a step: donated, keyed, counted, saved, and composed with everything that stands behind a step."""

import pytest
import torch
from torch import nn

from fnlight import (
    JSONL,
    FitConfig,
    Loaders,
    Optim,
    Task,
    TrainState,
    apply,
    check_finite,
    clip_norm,
    compose,
    fit,
    grad,
    load,
    manual,
    max_steps,
    pipe,
    run,
    save,
    stop_when,
    update,
)
from fnlight.data import Item
from fnlight.errors import ConfigError, DonatedStateError, MemoryWarning, SeamError, StepError
from fnlight.tensors import fold_in, isolated
from fnlight.testing import assert_pure, assert_trees_equal, check_task

DATA = [torch.full((4, 2), float(i)) for i in range(3)]


@torch.no_grad()
def running_mean(store, batches, key):
    """The mean of all samples so far, by hand."""
    tree = store.memory["mean"]
    for batch in batches:
        tree["count"] += len(batch)
        store.module.weight += (batch - store.module.weight).sum(0) / tree["count"]
    return {"loss": store.module.weight.square().sum(), "noise": torch.rand(())}


def model():
    made = nn.Linear(2, 1, bias=False)
    return made.requires_grad_(False)


def started(store):
    return {"count": 0}


STEP = pipe(running_mean, manual(started, name="mean"))


def created(**options):
    torch.manual_seed(0)
    return TrainState.create(Task(model(), STEP, lambda m, batch: {"loss": (m.weight - batch).square().mean()}), **options)


def test_a_function_of_the_store_is_a_step():
    """It writes the module and its memory; its input is donated, and progress goes on."""
    before = created()
    after, _ = STEP(before, DATA[0])
    after, _ = STEP(after, DATA[2])
    assert after.params["weight"].tolist() == [[1.0, 1.0]]
    assert (after.progress.step, after.progress.samples, after.memory["mean"]) == (2, 8, {"count": 8})
    with pytest.raises(DonatedStateError, match="the state of step 0"):
        before.params  # the access is what is tested
    assert str(STEP) == "running_mean > manual(name='mean')"


def test_its_random_numbers_come_from_the_key_of_the_step():
    """Whatever was drawn before, a step draws the same; the key is that of the state."""
    state = created(seed=7)
    assert state.key == fold_in(7, 1, 0)
    drawn = []
    for skip in range(3):
        with isolated():
            torch.rand(skip)
            drawn.append(STEP(state.copy(), DATA[0])[1]["noise"])
    assert drawn[0] == drawn[1] == drawn[2]
    assert_pure(lambda state, batch: update(state, batch), state, DATA[0])


def test_a_group_is_given_whole():
    """With `batches_per_step=2` a step is given two batches at a time, and the rest of an epoch."""
    seen = []

    def counting(store, batches, key):
        seen.append(len(batches))
        return {}

    for _ in run(pipe(counting, manual(batches_per_step=2), stop_when(max_steps(4))), created(), DATA):
        pass
    assert seen == [2, 1, 2, 1]


def test_optimizers_in_a_step_by_hand():
    """Several optimizers may be used in any way; schedules set their rates by completed steps, and no gradient is left."""
    rates = []

    def both(store, batches, key):
        for name, part in (("a", store.module[0]), ("b", store.module[1])):
            optimizer = store.optims[name].optimizer
            part(batches[0]).square().mean().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return {}

    def configure(m):
        return {"a": Optim(torch.optim.SGD(m[0].parameters(), lr=1.0), lambda n: 0.5**n), "b": torch.optim.SGD(m[1].parameters(), lr=0.25)}

    task = Task(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), pipe(both, manual()), configure_optimizers=configure)
    state = fit(TrainState.create(task), DATA, FitConfig(max_steps=2, nonfinite="ignore", device="cpu", progress=False))
    assert rates == [1.0, 0.25, 0.5, 0.25]
    assert all(p.grad is None for p in state.store.params)


def test_fit_takes_a_whole_step(tmp_path):
    """A task whose `train_step` is a whole step is trained, evaluated, logged, saved and resumed by `fit`."""
    config = {"ema": 0.5, "device": "cpu", "progress": False}
    loaders = Loaders(train=DATA, val=DATA)
    whole = fit(created(), loaders, FitConfig(max_epochs=3, sinks=JSONL(tmp_path / "log.jsonl"), **config))
    part = fit(created(), loaders, FitConfig(max_steps=4, dir=tmp_path / "run", **config))
    resumed = fit(created(), loaders, FitConfig(max_epochs=3, dir=tmp_path / "run", resume=True, **config))
    assert part.progress.step == 4
    assert_trees_equal(resumed.params, whole.params)
    assert [sorted(r.metrics) for r in whole.history] == [["train/loss", "train/noise", "val/loss"]] * 3
    assert_trees_equal(load(save(whole, tmp_path / "a"), whole.task), whole)


def test_a_whole_step_has_no_place_for_what_is_done_to_gradients():
    """`fit` refuses to be told to clip what is not there, and `pipe` says where what belongs."""
    with pytest.raises(
        ConfigError,
        match=r"is a whole step already, running_mean > manual\(name='mean'\), so FitConfig cannot add clip_norm\(1\.0\) inside of it",
    ):
        compose(created().task, FitConfig(max_steps=1, clip_norm=1.0, progress=False))
    with pytest.raises(SeamError, match=r"clip_norm\(1\.0\) takes a GradFn"):
        pipe(STEP, clip_norm(1.0))
    with pytest.raises(SeamError, match=r"manual takes a manual update, \(store, batches, key\) -> metrics, but after grad it gets"):
        pipe(running_mean, grad(), manual())
    with pytest.raises(SeamError, match=r"apply takes .* but after manual\(name='mean'\) it gets a Step"):
        pipe(STEP, apply())


def test_a_step_by_hand_must_return_metrics():
    """Forgetting to return is found at the first step."""

    def forgetful(store, batches, key):
        pass

    with pytest.raises(StepError, match=r"forgetful must return a dict of metrics, which may be empty, but returned NoneType"):
        pipe(forgetful, manual())(created(), DATA[0])


def test_what_watches_a_loss_says_that_there_is_none():
    """`check_finite` needs a metric called loss."""
    step = pipe(lambda store, batches, key: {"error": torch.ones(())}, manual(), check_finite())
    with pytest.raises(StepError, match=r"no metric called 'loss', only \['error'\].*FitConfig\(nonfinite=\"ignore\"\)"):
        step(created(), DATA[0])


def test_the_checks_of_a_task_leave_out_what_a_whole_step_has_not():
    """Evaluation and the round trip are looked at all the same."""
    report = check_task(created().task, DATA[1])
    assert {"batch", "evaluation", "round_trip"} <= set(report.checked)
    assert {"deterministic", "keyed", "model", "gradients", "overfit"} <= set(report.skipped)


def test_a_step_without_any_helper():
    """`donated` and `advanced` are all that a `Step` written from scratch needs."""

    def step(state, batch):
        item = Item.of(batch, state=state)
        store = state.donated()
        with torch.no_grad():
            store.module.weight += item.batches[0].mean()
        return state.advanced(item), {}

    states = [created()]
    for state, _ in run(pipe(step, stop_when(max_steps(3))), states[0], DATA):
        states.append(state)
    assert (states[-1].progress.epoch, states[-1].progress.step, states[-1].progress.samples) == (1, 3, 12)
    assert torch.allclose(states[-1].params["weight"] - states[0].params["weight"], torch.tensor(3.0))
    with pytest.raises(DonatedStateError, match="the state of step 2"):
        states[-2].advanced(Item.of(DATA[0], state=states[-2]))


def test_memory_of_a_step_by_hand_that_starts_late_is_reported():
    """As for every combinator that remembers tensors."""
    step = pipe(lambda store, batches, key: {}, manual(lambda store: {"x": torch.ones(1)}))
    state, _ = STEP(created(), DATA[0])
    with pytest.warns(MemoryWarning, match=r"manual starts with new memory at step 1"):
        step(state, DATA[1])
