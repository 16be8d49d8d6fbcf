"""Law 3: n micro-batches are one batch n times as large."""

import pytest
import torch
from torch import nn

from fnlight import FitConfig, Mean, Task, TrainState, accumulate, apply, clip_norm, fit, grad, pipe
from fnlight.data import Item
from tests.laws.tasks import TASKS

TRAINED = [name for name, case in TASKS.items() if case.trains and case.kind == "loss"]


def calm(case):
    """A task whose samples do not see each other in training: norms use their statistics, dropout is off."""
    task = case.make()
    task.model.eval()
    return task


def is_plain(case):
    """Whether the loss of a task is a scalar, which counts once a batch."""
    task = case.make()
    return not isinstance(task.train_step(task.model, case.batches()[0])[0], Mean)


PLAIN = [name for name in TRAINED if is_plain(TASKS[name])]


def by_samples(train_step):
    """The same loss as a sum over samples with its weight, where it is a mean."""

    def weighted(model, batch):
        loss, metrics = train_step(model, batch)
        if isinstance(loss, Mean):
            return loss, metrics
        count = len(batch[0])
        return Mean(loss * count, count), {name: Mean(value * count, count) for name, value in metrics.items()}

    return weighted


def gradients(task, batches, *combinators):
    fn = pipe(by_samples(task.train_step), grad(), accumulate(len(batches)), *combinators)
    found = fn(TrainState.create(task).store, tuple(batches), 0)
    return found, torch.cat([v.double().flatten() for v in found.values])


def parted(case, sizes):
    """One batch, and the same samples in micro-batches of these sizes."""
    x, y = (torch.cat(parts) for parts in zip(*case.batches(4), strict=True))
    x, y = x[: sum(sizes)], y[: sum(sizes)]
    return (x, y), list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 5), (1, 7, 3), (2, 9, 1, 4)])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_micro_batches_are_those_of_the_whole(name, sizes):
    """Gradients, loss and metrics agree to 1e-6 relative, however many samples or tokens each micro-batch holds."""
    whole, parts = parted(TASKS[name], sizes)
    task = calm(TASKS[name])
    one, expected = gradients(task, [whole])
    many, found = gradients(task, parts)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert float(many.metrics["loss"]) == pytest.approx(float(one.metrics["loss"]), rel=1e-6)
    assert float(many.metrics["acc"]) == pytest.approx(float(one.metrics["acc"]), rel=1e-6)
    assert float(many.weight) == float(one.weight)


@pytest.mark.parametrize("name", TRAINED)
def test_clipping_sees_the_gradient_of_the_whole_group(name):
    """The norm behind `accumulate` is that of the true gradient, not of a part or of a sum."""
    whole, parts = parted(TASKS[name], (1, 7, 3))
    task = calm(TASKS[name])
    one, expected = gradients(task, [whole], clip_norm(1e-3))
    many, found = gradients(task, parts, clip_norm(1e-3))
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert float(many.metrics["grad_norm"]) == pytest.approx(float(one.metrics["grad_norm"]), rel=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_losses_of_even_micro_batches_are_those_of_the_whole(name):
    """A plain scalar counts with weight 1: equal micro-batches give the gradient of their union."""
    whole, parts = parted(TASKS[name], (4, 4, 4))
    task = calm(TASKS[name])
    one = pipe(task.train_step, grad(), accumulate(1))(TrainState.create(task).store, (whole,), 0)
    many = pipe(task.train_step, grad(), accumulate(3))(TrainState.create(task).store, tuple(parts), 0)
    expected, found = (torch.cat([v.double().flatten() for v in g.values]) for g in (one, many))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_an_epoch_of_groups_is_an_epoch_of_larger_batches():
    """`fit` with `accumulate=2` on five batches takes the steps, and comes to the weights, of two double batches and a single one."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randn(20, 2)

    def train_step(model, batch):
        return Mean((model(batch[0]) - batch[1]).square().sum(), batch[1].numel())

    task = Task(nn.Linear(4, 2), train_step, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    small = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    large = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    a = fit(TrainState.create(task), small, FitConfig(max_epochs=3, accumulate=2, progress=False))
    b = fit(TrainState.create(task), large, FitConfig(max_epochs=3, progress=False))
    assert (a.progress.step, a.progress.samples) == (b.progress.step, b.progress.samples) == (9, 60)
    for name, value in a.params.items():
        torch.testing.assert_close(value, b.params[name], rtol=1e-6, atol=1e-7)
    assert [r.metrics["train/loss"] for r in a.history] == pytest.approx([r.metrics["train/loss"] for r in b.history], rel=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_a_group_of_one_changes_nothing(name):
    """`accumulate(1)` is bitwise the pipe without it."""
    case = TASKS[name]
    task = case.make()
    item = Item((case.batches()[0],), 0, 1, last=False, samples=6)
    bare, _ = pipe(task.train_step, grad(), apply())(TrainState.create(task), item)
    grouped, _ = pipe(task.train_step, grad(), accumulate(1), apply())(TrainState.create(task), item)
    assert all(torch.equal(value, grouped.params[key]) for key, value in bare.params.items())
