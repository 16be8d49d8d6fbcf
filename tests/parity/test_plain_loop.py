"""`fit` against a plain PyTorch loop that is written out here: bitwise in weights, buffers, optimizer memory and losses."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from fnlight import FitConfig, Loaders, Mean, Optim, Task, TrainState, evaluate, fit, from_torch, steps
from fnlight.data import Source
from fnlight.tensors import TRAIN, fold_in, isolated, seed_generators
from fnlight.testing import RecordingSink, assert_trees_equal

SEED, EPOCHS = 8, 3
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def make_model():
    with isolated():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
        )


def make_loader(shuffle=False):
    """Seven batches, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(52, 6, generator=generator), torch.randint(4, (52,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain_loop(epoch_batches, *, optimizer=ADAMW, scheduler=None, accumulate=1, clip_norm=None, clip_value=None, bf16=False, ema=None):
    """Train as everybody writes it; of fnlight there is only the seeding of the generators, which dropout draws from."""
    model = make_model()
    optimizer = optimizer(model.parameters())
    scheduler = scheduler(optimizer) if scheduler else None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    if average:
        average.update_parameters(model)  # the average begins with the first weights
    step, losses = 0, []
    for epoch in range(EPOCHS):
        batches = list(epoch_batches(epoch))
        for start in range(0, len(batches), accumulate):
            group = batches[start : start + accumulate]
            summed = torch.zeros(())
            for microbatch, batch in enumerate(group):
                seed_generators(fold_in(SEED, TRAIN, step, microbatch))
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = loss_of(model, batch)
                loss.backward()
                summed += loss.detach()
            for p in model.parameters():
                p.grad /= len(group)
            if clip_value:
                torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
            if average:
                average.update_parameters(model)
            losses.append(float(summed) / len(group))
            step += 1
    return model, optimizer, losses, average


def assert_parity(loader=None, epoch_batches=None, *, optimizer=ADAMW, scheduler=None, schedule=None, fused=True, **options):
    """Both ways of training give bitwise the same."""
    loader = loader or make_loader()
    chosen = partial(optimizer, fused=True) if fused else optimizer
    with isolated():
        model, plain, losses, average = plain_loop(
            epoch_batches or (lambda epoch: loader), optimizer=chosen, scheduler=scheduler, **options
        )
    log = RecordingSink()
    config = {("precision" if k == "bf16" else k): ("bf16" if k == "bf16" else v) for k, v in options.items()}
    configured = FitConfig(max_epochs=EPOCHS, log_every=steps(1), sinks=log, device="cpu", progress=False, **config)
    task = Task(make_model(), loss_of, configure_optimizers=lambda m: Optim(optimizer(m.parameters()), schedule))
    state = fit(TrainState.create(task, seed=SEED), loader, configured)
    assert log.steps("train/loss") == dict(enumerate(losses, 1))
    assert_trees_equal(state.module(), model)
    assert_trees_equal(state.opt_state, {name: plain.state[p] for name, p in model.named_parameters() if p in plain.state})
    if average is not None:
        assert_trees_equal(state.memory["ema"], dict(average.module.named_parameters()))
    return state


def test_bare():
    """Forward, backward and step, with dropout and BatchNorm."""
    assert_parity()


@pytest.mark.parametrize(
    "optimizer, fused",
    [
        (partial(torch.optim.SGD, lr=0.1), True),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), False),
        (partial(torch.optim.Adam, lr=1e-2, amsgrad=True), True),
        (partial(torch.optim.Adagrad, lr=1e-1), True),
        (partial(torch.optim.RMSprop, lr=1e-3), False),
        (partial(torch.optim.NAdam, lr=1e-3), False),
    ],
)
def test_optimizers(optimizer, fused):
    """Other optimizers, in the fused form where there is one that is safe."""
    assert_parity(optimizer=optimizer, fused=fused)


@pytest.mark.parametrize("accumulate", [2, 3, 10])
def test_accumulation(accumulate):
    """Groups of batches, the last one of an epoch divided by its own size, one longer than an epoch too."""
    state = assert_parity(accumulate=accumulate)
    assert state.progress.step == EPOCHS * -(-7 // accumulate)


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 100.0])
def test_clipping_by_norm(max_norm):
    """`clip_norm` is `torch.nn.utils.clip_grad_norm_`, where it clips and where it does not."""
    assert_parity(clip_norm=max_norm)


@pytest.mark.parametrize("max_value", [1e-3, 1.0])
def test_clipping_by_value(max_value):
    """`clip_value` is `torch.nn.utils.clip_grad_value_`."""
    assert_parity(clip_value=max_value)


def test_bf16():
    """`precision="bf16"` is `torch.autocast` around model and loss, and nothing else."""
    state = assert_parity(bf16=True)
    assert {p.dtype for p in state.params.values()} == {torch.float32}
    bare = assert_parity()
    assert not torch.equal(state.params["0.weight"], bare.params["0.weight"])


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_averaged_weights(decay):
    """`ema` is `torch.optim.swa_utils.AveragedModel`, begun with the first weights."""
    assert_parity(ema=decay)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: LambdaLR(optimizer, lambda count: 0.8**count),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=21, eta_min=1e-4),
        lambda optimizer: StepLR(optimizer, 4, 0.5),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.05, total_steps=22),
    ],
)
def test_schedulers_of_torch(make):
    """A torch scheduler that is stepped in the loop is `from_torch` of it; momentum that it cycles is cycled too."""
    assert_parity(scheduler=make, schedule=from_torch(make))


def test_a_schedule():
    """A function of completed steps is `LambdaLR`."""
    assert_parity(scheduler=lambda optimizer: LambdaLR(optimizer, lambda count: 1 / (1 + count)), schedule=lambda count: 1 / (1 + count))


def test_all_together():
    """Accumulation, both clippings, bf16, averaged weights and a schedule at once."""
    assert_parity(
        accumulate=2, clip_value=0.05, clip_norm=0.1, bf16=True, ema=0.9,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda count: 0.9**count), schedule=lambda count: 0.9**count,
    )  # fmt: skip


def test_shuffled_data():
    """Over a shuffled loader the plain loop takes the batches in the keyed order that `Source` gives for (seed, epoch)."""
    loader = make_loader(shuffle=True)
    assert_parity(loader, lambda epoch: [batch for batch, _, _ in Source(loader).epoch(SEED, epoch)], accumulate=2, clip_norm=1.0)


def test_evaluation_and_a_plateau():
    """Evaluating after each epoch, and a scheduler that watches it: `val/loss` is the exact mean, and the weights are those of the loop."""
    loader, val = make_loader(), make_loader(shuffle=True).dataset
    parts = [(val.tensors[0][i : i + 20], val.tensors[1][i : i + 20]) for i in range(0, 52, 20)]

    def make(optimizer):
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.5)

    def eval_step(model, batch):
        return {"loss": Mean(F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))}

    def configure(m):
        return Optim(ADAMW(m.parameters()), from_torch(make), monitor="val/loss")

    task = Task(make_model(), loss_of, eval_step, configure_optimizers=configure)
    state = fit(
        TrainState.create(task, seed=SEED), Loaders(train=loader, val=parts), FitConfig(max_epochs=EPOCHS, device="cpu", progress=False)
    )

    model = make_model()
    optimizer = ADAMW(model.parameters(), fused=True)
    scheduler, found, step = make(optimizer), [], 0
    with isolated():
        for _ in range(EPOCHS):
            for batch in loader:
                seed_generators(fold_in(SEED, TRAIN, step, 0))
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            model.eval()
            with torch.no_grad():
                total = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in parts)
            model.train()
            found.append(total / 52)
            scheduler.step(found[-1])
    assert [r.metrics["val/loss"] for r in state.history] == found
    assert_trees_equal(state.module(), model)
    assert optimizer.param_groups[0]["lr"] < 1e-2, "the plateau never fell, so this test would show nothing about it"
    assert evaluate(state, parts) == {"loss": found[-1]}


def test_a_step_does_not_touch_the_users_model():
    """The model of the task is what it was, and training again from it gives the same."""
    loader, model = make_loader(), make_model()
    kept = copy.deepcopy(model)
    task = Task(model, loss_of, configure_optimizers=lambda m: ADAMW(m.parameters()))
    config = FitConfig(max_epochs=1, device="cpu", progress=False)
    a, b = (fit(TrainState.create(task, seed=SEED), loader, config) for _ in range(2))
    assert_trees_equal(a, b)
    assert_trees_equal(model, kept)
