"""Loss scaling against a plain loop with ``torch.amp.GradScaler``: bitwise, overflows and all."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.tensors import TRAIN, fold_in, isolated, seed_generators
from fnlight.testing import RecordingSink, assert_trees_equal

OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=False, foreach=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
BAD = (2, 3, 7, 11)
"""Batches whose loss is far beyond what scaled gradients in fp16 can hold."""


def make_model():
    with isolated():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def make_batches(bad=BAD):
    generator = torch.Generator().manual_seed(1)
    found = [(torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator), torch.tensor(1.0)) for _ in range(14)]
    return [(x, y, torch.tensor(torch.inf) if i in bad else one) for i, (x, y, one) in enumerate(found)]


def loss_of(model, batch):
    return F.mse_loss(model(batch[0]).float(), batch[1]) * batch[2]


def halved(step):
    return 0.5 ** (step // 3)


def plain_loop(data, make, accumulate=1, clip=None):
    """What everybody writes, with keyed generators: the schedule follows the optimizer's steps."""
    model = make_model()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    step, skipped, losses = 0, 0, []
    for i in range(0, len(data), accumulate):
        optimizer.param_groups[0]["lr"] = 1e-2 * halved(step)
        group, total = data[i : i + accumulate], 0.0
        key = fold_in(5, TRAIN, step)
        key = fold_in(key, (1 << 32) + skipped) if skipped else key
        for j, batch in enumerate(group):
            seed_generators(fold_in(key, j))
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        if len(group) > 1:
            for p in model.parameters():
                p.grad /= len(group)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        made = scaler.get_scale() >= before
        optimizer.zero_grad()
        step, skipped = step + made, skipped + (not made)
        if made:
            losses.append(total / len(group))
    return model, optimizer, scaler, step, skipped, losses


def task_of(make):
    return fl.Task(make_model(), loss_of, configure_optimizers=lambda m: fl.Optim(make(m.parameters()), schedule=halved))


def scaled_pipe(accumulate=1, clip=None, *more):
    parts = [fl.autocast(torch.float16), fl.grad()]
    parts += [fl.accumulate(accumulate)] if accumulate > 1 else []
    parts += [fl.loss_scale(init=2.0**20, interval=3)]
    parts += [fl.clip_norm(clip)] if clip else []
    return fl.pipe(loss_of, *parts, fl.apply(), *more)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_scaling_is_that_of_torch(name, accumulate, clip):
    """Weights, optimizer memory, scale, growth, steps, skips and schedule agree, with overflows from batches and from the scale."""
    data, make = make_batches(), OPTIMIZERS[name]
    with isolated():
        model, optimizer, scaler, step, skipped, _ = plain_loop(data, make, accumulate, clip)
    attempts = -(-len(data) // accumulate)
    state = fl.TrainState.create(task_of(make), seed=5)
    states = fl.run(scaled_pipe(accumulate, clip, fl.ema(0.5)), state, data)
    state, _ = list(islice(states, attempts))[-1]
    assert (state.progress.step, state.progress.skipped) == (step, skipped)
    assert skipped >= len({i // accumulate for i in BAD})
    for (key, value), expected in zip(model.state_dict().items(), state.params.values(), strict=True):
        assert torch.equal(value, expected), key
    for (key, slots), expected in zip(state.opt_state.items(), optimizer.state.values(), strict=True):
        assert all(torch.equal(slots[slot], expected[slot]) for slot in slots), key
    tree = state.memory["loss_scale"]
    assert (tree["scale"].item(), tree["good"].item()) == (scaler.get_scale(), scaler._get_growth_tracker())


def test_a_skipped_step_is_resumed_exactly(tmp_path):
    """From a save at every attempt, skipped ones among them, the run ends bitwise where it ended; means count good steps only."""
    data, make = make_batches(), OPTIMIZERS["fused AdamW"]

    def whole():
        return scaled_pipe(1, 0.1, fl.ema(0.5), fl.epoch_means())

    states = fl.run(whole(), fl.TrainState.create(task_of(make), seed=5), data)
    for i, (state, _) in enumerate(islice(states, len(data))):
        fl.save(state, tmp_path / f"{i}")
        last = state
    for i in range(len(data) - 1):
        resumed = list(islice(fl.run(whole(), fl.load(tmp_path / f"{i}", task_of(make)), data), len(data) - 1 - i))[-1][0]
        assert_trees_equal(resumed, last)
    with isolated():
        losses = plain_loop(data, make, 1, 0.1)[-1]
    assert last.history[-1].metrics["train/loss"] == pytest.approx(sum(float(x) for x in losses) / len(losses), rel=1e-6)
    assert last.history[-1].metrics["train/skipped"] == last.progress.skipped


def test_attempts_at_one_step_share_no_random_numbers():
    """A step that is tried again with another batch draws other numbers; without skips the keys are what they were."""
    drawn = []

    def noisy(model, batch):
        drawn.append(torch.rand(()).item())
        return loss_of(model, batch)

    step = fl.pipe(noisy, fl.autocast(torch.float16), fl.grad(), fl.loss_scale(), fl.apply())
    list(islice(fl.run(step, fl.TrainState.create(task_of(OPTIMIZERS["AdamW"]), seed=5), make_batches()), 14))
    assert len(set(drawn)) == 14
    with isolated():
        seed_generators(fold_in(5, TRAIN, 0, 0))
        assert torch.rand(()).item() == drawn[0]


def test_nothing_fires_twice_for_a_skipped_step(tmp_path):
    """Averages, evaluations, checkpoints and records happen once a step, however often it was tried."""
    sink = RecordingSink()
    task = task_of(OPTIMIZERS["fused AdamW"])
    counted = []

    def eval_step(model, batch):
        counted.append(1)
        return {"loss": loss_of(model, batch)}

    data = make_batches()
    config = fl.FitConfig(
        max_epochs=1, precision="fp16", dir=tmp_path, save_every=fl.steps(2), keep=fl.last(50), eval_every=fl.steps(2), sinks=sink,
        log_every=fl.steps(2), ema=0.5, device="cpu", progress=False,
    )  # fmt: skip
    task = fl.Task(make_model(), loss_of, eval_step, configure_optimizers=task.configure_optimizers)
    state = fl.fit(fl.TrainState.create(task, seed=5), fl.Loaders(train=data, val=make_batches(())[:1]), config)
    assert state.progress.skipped == len(BAD)
    assert state.progress.step == len(data) - len(BAD)
    assert state.progress.samples == 6 * len(data)
    assert len(counted) == state.progress.step // 2
    assert [record.step for record in sink.records if "train/loss" in record.metrics] == [2, 4, 6, 8, 10]
    found = fl.load(tmp_path, task)
    assert_trees_equal(found, state)
