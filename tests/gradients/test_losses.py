"""Losses of several parts are the loss of the whole: by name, over many batches, and from batch to batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.checkpoint import load, save
from fnlight.data import Item
from fnlight.errors import ConfigError, StepError
from fnlight.gradients import accumulate, carry, grad, grad_cache, microbatch, weighted
from fnlight.loop import named_tensors, run, stop_when
from fnlight.metrics import Mean
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.tensors import fold_in, isolated, seed_generators
from fnlight.testing import assert_trees_equal
from fnlight.triggers import max_steps


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def created(train_step, model=None):
    with isolated():
        torch.manual_seed(0)
        return TrainState.create(Task(model or nn.Linear(3, 3), train_step, configure_optimizers=sgd), seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def flat(found):
    return torch.cat([value.double().flatten() for value in found.values])


def two(model, batch):
    """Two losses, and a metric."""
    y = model(batch)
    return {"near": F.mse_loss(y, batch), "small": y.abs().mean()}, {"mean": y.mean()}


def test_named_losses_train_on_their_weighted_sum():
    """The step is that of the sum with the weights of its step, bitwise, and every loss is a metric."""

    def by_hand(step):
        def train_step(model, batch):
            losses, metrics = two(model, batch)
            return 2.0 * losses["near"] + 0.5**step * losses["small"], metrics

        return train_step

    state, other = created(two), created(two)
    whole = pipe(two, grad(), weighted({"near": 2.0, "small": lambda step: 0.5**step}), apply())
    for step in range(3):
        state, metrics = whole(state, data(seed=step))
        other, expected = pipe(by_hand(step), grad(), apply())(other, data(seed=step))
        assert set(metrics) == {"loss", "near", "small", "mean"}
        assert torch.equal(metrics["loss"], expected["loss"])
        assert float(metrics["loss"]) == pytest.approx(2 * float(metrics["near"]) + 0.5**step * float(metrics["small"]), rel=1e-6)
    assert_trees_equal(dict(state.params), dict(other.params))


def test_named_losses_of_tokens_are_exact_over_padded_batches():
    """Means over tokens with padding, in uneven micro-batches: losses, their sum and the gradient are those of the one large batch."""

    def train_step(model, batch):
        held = batch.abs().sum(-1) > 0
        y, count = model(batch[held]), held.sum()
        return {
            "near": Mean((y - batch[held]).square().sum(), count),
            "small": Mean(y.abs().sum(), count),
        }

    def padded(n, length, seed):
        x = data(n * length, seed).view(n, length, 3)
        return x * (torch.arange(length) < torch.arange(1, n + 1)[:, None])[..., None]

    parts = [padded(2, 5, 1), padded(4, 5, 2), padded(1, 5, 3)]
    weights = weighted({"near": 1.0, "small": 0.3})
    one = pipe(train_step, grad(), weights, accumulate(1))(created(train_step).store, (torch.cat(parts),), 0)
    many = pipe(train_step, grad(), weights, accumulate(3))(created(train_step).store, tuple(parts), 0)
    assert (flat(many) - flat(one)).norm() <= 1e-6 * flat(one).norm()
    for name in ("loss", "near", "small"):
        assert float(many.metrics[name]) == pytest.approx(float(one.metrics[name]), rel=1e-6)


def test_weights_of_single_samples_are_exact_over_any_batches():
    """Samples that count more, or not at all, in uneven micro-batches and parts: loss and gradient are those of the weighted mean over all."""

    def train_step(model, batch):
        x, weight = batch
        losses = (model(x) - x).square().mean(-1)
        return Mean((weight * losses).sum(), weight.sum()), {"error": Mean((weight * losses).sum().detach(), weight.sum())}

    x, weight = data(9), torch.tensor([0.0, 0.0, 3.0, 0.5, 1.0, 0.0, 2.0, 0.25, 10.0])
    parts = tuple(zip(x.split([2, 3, 4]), weight.split([2, 3, 4]), strict=True))  # the first counts nothing at all
    found = pipe(train_step, grad(), accumulate(3))(created(train_step).store, parts, 0)
    divided = pipe(train_step, grad(), accumulate(3), microbatch(2))(created(train_step).store, parts, 0)
    module = created(train_step).store.module
    loss = (weight * (module(x) - x).square().mean(-1)).sum() / weight.sum()
    loss.backward()
    expected = torch.cat([p.grad.double().flatten() for p in module.parameters()])
    for each in (found, divided):
        assert (flat(each) - expected).norm() <= 1e-6 * expected.norm()
        assert float(each.metrics["loss"].compute()) == pytest.approx(loss.item(), rel=1e-6)
        assert float(each.metrics["error"].compute()) == pytest.approx(loss.item(), rel=1e-6)


def contrast(found):
    """Each sample shall be near to its twin and far from all others."""
    logits = F.normalize(found["a"]) @ F.normalize(found["b"]).T / 0.1
    truth = torch.arange(len(logits))
    return F.cross_entropy(logits, truth), {"acc": (logits.argmax(-1) == truth).float().mean()}


def embed(model, batch):
    """Two views of each sample."""
    return {"a": model(batch), "b": model(batch + 0.1)}


@pytest.mark.parametrize("sizes", [(4, 4), (2, 5, 1), (3, 3, 3, 3)])
def test_a_loss_over_many_batches_is_that_of_their_union(sizes):
    """Gradient, loss and metrics are those of the one large batch to 1e-6, however large the batches are."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8))
    state = created(embed, model)
    whole = data(sum(sizes))
    cached = pipe(embed, grad_cache(contrast, len(sizes)))(state.store, whole.split(list(sizes)), 3)
    values = [value.clone() for value in cached.values]
    state.store.module.zero_grad()
    plain = pipe(lambda m, b: contrast(embed(m, b)), grad(), accumulate(1))(state.store, (whole,), 3)
    expected = flat(plain)
    assert (flat(cached._replace(values=values)) - expected).norm() <= 1e-6 * expected.norm()
    assert float(cached.metrics["loss"]) == pytest.approx(float(plain.metrics["loss"]), rel=1e-6)
    assert float(cached.metrics["acc"]) == float(plain.metrics["acc"])


def test_both_passes_draw_the_same_and_write_buffers_once():
    """With dropout and BatchNorm the gradient is that of one graph over all batches, and statistics move once a batch."""
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    state = created(embed, model)
    twin, batches = state.module(), (data(4, 1), data(6, 2), data(5, 3))
    found = pipe(embed, grad_cache(contrast, 3))(state.store, batches, 7)
    with isolated():
        parts = []
        for i, batch in enumerate(batches):
            seed_generators(fold_in(7, i))
            parts.append(embed(twin, batch))
        contrast({name: torch.cat([part[name] for part in parts]) for name in ("a", "b")})[0].backward()
    expected = torch.cat([p.grad.double().flatten() for p in twin.parameters()])
    assert (flat(found) - expected).norm() <= 1e-6 * expected.norm()
    assert_trees_equal(
        {n: t.detach() for n, t in named_tensors(state.store.module).items()}, {n: t.detach() for n, t in named_tensors(twin).items()}
    )


class Recurrent(nn.Module):
    """A cell that is given its hidden state."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(3, 3, batch_first=True)

    def forward(self, x, hidden):
        return self.cell(x, hidden)


def zeros(model, batch):
    return torch.zeros(1, len(batch), 3)


def follow(model, batch):
    """Predict the next input."""
    x, hidden = batch
    y, hidden = model(x[:, :-1], hidden)
    return F.mse_loss(y, x[:, 1:]), {"size": hidden.abs().mean()}, hidden


def chunks(count=4):
    return list(data(2 * 5 * count, 5).view(2, 5 * count, 3).split(5, dim=1))


def test_what_is_carried_is_that_of_a_plain_loop(tmp_path):
    """Truncated back-propagation by hand gives bitwise the same weights over two epochs, and so does going on from a file at every step."""
    task = Task(Recurrent(), follow, configure_optimizers=sgd)
    step = pipe(follow, grad(), carry(zeros), apply(), stop_when(max_steps(8)))
    saved = []
    for state, _ in run(step, TrainState.create(task, seed=0), chunks()):
        saved.append(save(state, tmp_path / f"{state.progress.step}"))
    module = TrainState.create(task).module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        hidden = zeros(module, chunks()[0])
        for chunk in chunks():
            optimizer.zero_grad()
            loss, _, hidden = follow(module, (chunk, hidden.detach()))
            loss.backward()
            optimizer.step()
    assert_trees_equal(dict(state.params), {n: p.detach() for n, p in module.named_parameters()})
    assert torch.equal(state.memory["carry"]["value"], hidden.detach())
    assert not state.memory["carry"]["value"].requires_grad
    for path in saved[:-1]:
        assert_trees_equal(list(run(step, load(path, task), chunks()))[-1][0], state)


def test_what_is_carried_goes_through_the_batches_of_a_group():
    """With `accumulate` each batch of a group begins where the one before ended."""
    task = Task(Recurrent(), follow, configure_optimizers=sgd)
    state = TrainState.create(task, seed=0)
    module, parts = state.module(), chunks(2)
    step = pipe(follow, grad(), carry(zeros), accumulate(2), apply())
    after, _ = step(state, Item.of(*parts, state=state))
    first = follow(module, (parts[0], zeros(module, parts[0])))[2].detach()
    torch.testing.assert_close(after.memory["carry"]["value"], follow(module, (parts[1], first))[2].detach())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: weighted({}), ConfigError, "weighted takes weights by name"),
        (lambda: weighted({"a": "b"}), ConfigError, "weight of 'a' must be a number or a function"),
        (lambda: weighted({"loss": 1}), ConfigError, "which is the name of their sum"),
        (
            lambda: once(two, grad(), weighted({"near": 1.0})),
            StepError,
            r"expects a dict of the losses \['near'\].*got \['near', 'small'\]",
        ),
        (lambda: once(mixed, grad(), weighted({"a": 1.0, "b": 1.0})), StepError, "some are fl.Mean and some are not"),
        (lambda: grad_cache(contrast, 0), ConfigError, "at least 1, but got 0"),
        (lambda: once(embed, grad_cache(lambda found: found["a"], 1)), StepError, "must be a scalar tensor that depends on the embeddings"),
        (lambda: once(embed, grad_cache(contrast, 1), microbatch(2)), StepError, "leave microbatch out"),
        (lambda: once(two, grad(), carry(zeros)), StepError, r"must return \(loss, metrics, carried\), but returned"),
        (lambda: once(follow, grad(), carry(zeros), accumulate(1), microbatch(2)), StepError, "leave microbatch out"),
    ],
)
def test_losses_that_mean_nothing_are_refused(make, error, message):
    """When they are made, or else in the first step."""
    with pytest.raises(error, match=message):
        make()


def mixed(model, batch):
    return {"a": Mean(model(batch).sum(), 2), "b": model(batch).mean()}


def once(fn, *combinators):
    def trivial(model, batch):
        return fn(model, batch[0] if isinstance(batch, tuple) and fn is two else batch)

    pipe(trivial, *combinators, apply())(created(trivial), data())
