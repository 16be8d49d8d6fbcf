"""Law 5: `fit` is the pipe by hand is a plain loop by hand, bitwise."""

import copy
from types import SimpleNamespace

import pytest
import torch

from fnlight import (
    FitConfig,
    Loaders,
    Mean,
    TrainState,
    accumulate,
    apply,
    autocast,
    check_finite,
    checkpoint_every,
    clip_norm,
    clip_value,
    compose,
    cosine,
    ema,
    epoch_means,
    epochs,
    evaluate_every,
    fit,
    grad,
    last,
    log_to,
    max_epochs,
    patience,
    pipe,
    run,
    steps,
    stop_when,
)
from fnlight.tensors import TRAIN, fold_in, isolated, seed_generators
from fnlight.testing import RecordingSink, assert_trees_equal, trees_equal
from tests.laws.tasks import TASKS, draw_near


def ended(step, state, loader):
    """The last state of a run that stops by itself."""
    return list(run(step, state, loader))[-1][0]


@pytest.mark.parametrize("name", TASKS)
def test_fit_is_the_pipe_by_hand(name, tmp_path):
    """A full configuration, and the combinators that it stands for, written out: one state, one history, one log, one text."""
    case, task, val = TASKS[name], TASKS[name].make(), TASKS[name].batches(2)
    logs = [RecordingSink(), RecordingSink(), RecordingSink()]

    whole = case.kind == "whole"
    gradients = {} if whole else {"accumulate": 2, "precision": "bf16", "clip_value": 0.5, "clip_norm": 1.0}

    def config(place, log):
        return FitConfig(
            max_epochs=4, stop=patience("val/loss", 3), ema=0.9, **gradients,
            dir=tmp_path / place, save_every=steps(3), keep=last(2), log_every=steps(2), sinks=log, device="cpu", progress=False,
        )  # fmt: skip

    loaders = Loaders(train=case.batches(), val=val)
    by_config = fit(TrainState.create(task, seed=1), loaders, config("a", logs[0]))
    composed = compose(task, config("b", logs[1]), loaders)
    by_compose = ended(composed, TrainState.create(task, seed=1), case.batches())
    looked_at = epochs(1) | steps(3) | steps(2)
    made_step = [] if whole else [autocast(torch.bfloat16), grad(), accumulate(2), clip_value(0.5), clip_norm(1.0), apply()]
    by_hand = pipe(
        task.train_step,
        *made_step,
        ema(0.9),
        check_finite(every=looked_at),
        evaluate_every(val, epochs(1), eval_step=None if whole else autocast(torch.bfloat16)(task.eval_step), weights="ema"),
        epoch_means(),
        log_to(logs[2], every=steps(2)),
        checkpoint_every(tmp_path / "b", every=steps(3), keep=last(2)),
        stop_when(patience("val/loss", 3) | max_epochs(4)),
    )
    assert str(by_hand) == str(composed)
    assert_trees_equal(by_config, by_compose)
    assert_trees_equal(by_config, ended(by_hand, TrainState.create(task, seed=1), case.batches()))
    assert trees_equal(logs[0].records, logs[1].records)
    assert trees_equal(logs[0].records, logs[2].records)


def plain_loop(task, batches, num_epochs, seed):
    """What everybody writes: forward, backward, step, with the generators seeded as fnlight documents it."""
    model, losses, step = copy.deepcopy(task.model), [], 0
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, fused=True) if params else None
    for _ in range(num_epochs):
        for batch in batches:
            seed_generators(fold_in(seed, TRAIN, step, 0))
            loss, _ = task.train_step(model, batch)
            total, weight = (loss.total, loss.weight) if isinstance(loss, Mean) else (loss, 1)
            if optimizer is not None:
                total.backward()
                for p in params:
                    p.grad *= 1 / weight
                optimizer.step()
                optimizer.zero_grad()
            losses.append((float(total.detach()), float(weight)))
            step += 1
    return model, losses


@pytest.mark.parametrize("name", [name for name, case in TASKS.items() if case.kind == "loss"])
def test_fit_is_a_plain_loop(name):
    """On every task: weights, buffers and every single loss of `fit` are bitwise those of a loop without fnlight."""
    case, task, log = TASKS[name], TASKS[name].make(), RecordingSink()
    config = FitConfig(max_epochs=3, log_every=steps(1), sinks=log, device="cpu", progress=False)
    state = fit(TrainState.create(task, seed=6), case.batches(), config)
    with isolated():
        model, losses = plain_loop(task, case.batches(), 3, seed=6)
    assert_trees_equal(state.module(), model)
    assert log.steps("train/loss") == {i: total / weight for i, (total, weight) in enumerate(losses, 1)}
    parts = [losses[i : i + 3] for i in (0, 3, 6)]
    assert [r.metrics["train/loss"] for r in state.history] == [sum(t for t, _ in each) / sum(w for _, w in each) for each in parts]


def plain_adversaries(task, batches, num_epochs, seed):
    """The loop that everybody writes for two optimizers: the generator has its turn every second step, clipped, with a cosine of its own."""
    model, losses, step, updates = copy.deepcopy(task.model), [], 0, 0
    disc = torch.optim.AdamW(model.disc.parameters(), lr=1e-2, fused=True)
    gen = torch.optim.SGD(model.gen.parameters(), lr=0.1, momentum=0.9)
    for _ in range(num_epochs):
        for batch in batches:
            seed_generators(fold_in(seed, TRAIN, step, 0, 0))
            loss, _ = task.train_step["disc"](model, batch)
            loss.backward()
            disc.step()
            model.zero_grad()
            losses.append({"disc": float(loss.detach())})
            step += 1
            if step % 2 == 0:
                gen.param_groups[0]["lr"] = 0.1 * cosine(total=5)(updates)
                seed_generators(fold_in(seed, TRAIN, step - 1, 1, 0))
                loss = task.train_step["gen"](model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.gen.parameters(), 0.05)
                gen.step()
                model.zero_grad()
                losses[-1]["gen"] = float(loss.detach())
                updates += 1
    return model, losses


def test_fit_of_two_optimizers_is_a_plain_loop():
    """Weights, buffers and every loss of both phases are bitwise those of a loop without fnlight, which works out all gradients of both."""
    case, task, log = TASKS["two optimizers"], TASKS["two optimizers"].make(), RecordingSink()
    config = FitConfig(max_epochs=3, log_every=steps(1), sinks=log, device="cpu", progress=False)
    state = fit(TrainState.create(task, seed=6), case.batches(), config)
    with isolated():
        model, losses = plain_adversaries(task, case.batches(), 3, seed=6)
    assert_trees_equal(state.module(), model)
    assert log.steps("train/disc/loss") == {i: each["disc"] for i, each in enumerate(losses, 1)}
    assert log.steps("train/gen/loss") == {i: each["gen"] for i, each in enumerate(losses, 1) if "gen" in each}
    assert state.progress.updates == {"disc": 9, "gen": 4}
    means = [sum(each["gen"] for each in part if "gen" in each) / n for part, n in ((losses[:3], 1), (losses[3:6], 2), (losses[6:], 1))]
    assert [r.metrics["train/gen/loss"] for r in state.history] == means


def test_fit_of_a_step_by_hand_is_a_plain_loop():
    """A function that changes the store itself does, under `fit`, bitwise what it does in a loop of one's own."""
    case, task = TASKS["a step by hand"], TASKS["a step by hand"].make()
    state = fit(TrainState.create(task, seed=6), case.batches(), FitConfig(max_epochs=3, device="cpu", progress=False))
    store = SimpleNamespace(module=copy.deepcopy(task.model), memory={"k-means": {"counts": torch.zeros(3)}})
    with isolated():
        for step, batch in enumerate(case.batches() * 3):
            seed_generators(fold_in(6, TRAIN, step))
            draw_near(store, (batch,), 0)
    assert_trees_equal(state.module(), store.module)
    assert_trees_equal(state.memory["k-means"], store.memory["k-means"])


@pytest.mark.parametrize("name", TASKS)
def test_states_compose(name):
    """`fit` to two epochs and `fit` on to four is `fit` to four."""
    case = TASKS[name]
    config = {"device": "cpu", "progress": False, "ema": 0.5}
    loaders = Loaders(train=case.batches(), val=case.batches(1))
    whole = fit(TrainState.create(case.make()), loaders, FitConfig(max_epochs=4, **config))
    first = fit(TrainState.create(case.make()), loaders, FitConfig(max_epochs=2, **config))
    assert_trees_equal(fit(first, loaders, FitConfig(max_epochs=4, **config)), whole)
