"""`grad` seeds the generators, reads what a loss function returns, and says what it should have returned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.errors import StepError
from fnlight.gradients import grad
from fnlight.metrics import Mean
from fnlight.pipe import pipe
from fnlight.step import apply, update
from fnlight.tensors import TRAIN, fold_in, isolated, seed_generators
from tests.small_steps import created, data, loss_fn, sum_fn


def test_dropout_is_a_function_of_seed_and_step():
    """The key of a micro-batch is folded from seed, stream, step and index, and seeds the generators."""
    state = created(model=nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), seed=7)
    after, metrics = update(state, data())
    with isolated():
        seed_generators(fold_in(7, TRAIN, 0, 0))
        expected = loss_fn(state.module(), data())
    assert torch.equal(metrics["loss"], expected.detach())
    assert not torch.equal(update(after, data())[1]["loss"], metrics["loss"])


def test_a_weight_may_be_a_tensor_or_a_float():
    """Counts of tokens need not leave the device."""
    state = created()
    expected = update(created(sum_fn), data())[0]
    for weight in (torch.tensor(12), torch.tensor(12.0), 12, 12.0):
        fn = lambda model, batch, weight=weight: Mean(F.mse_loss(model(batch), batch, reduction="sum"), weight)  # one line a case
        after, metrics = pipe(fn, grad(), apply())(state.copy(), data())
        torch.testing.assert_close(dict(after.params), dict(expected.params), rtol=1e-6, atol=1e-7)
        assert isinstance(metrics["loss"], Mean)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda m, b: None, r"returned no loss: it must return a scalar tensor"),
        (lambda m, b: m(b), r"scalar loss of shape \[\], but its shape is \[4, 3\]; reduce it"),
        (lambda m, b: m(b).sum().item(), r"returned float: .*do not call .item\(\)"),
        (lambda m, b: m(b).sum().detach(), r"loss without a graph"),
        (lambda m, b: (m(b).sum(), 3), r"must return loss or \(loss, metrics\) with metrics a dict, but returned a tuple of Tensor, int"),
        (lambda m, b: (m(b).sum(), {"loss": 1.0}), r"a metric called 'loss', which is the name of the loss itself"),
        (lambda m, b: (m(b).sum(), {"out": m(b)}), r"metric 'out' must be one number, but has shape \[4, 3\]"),
        (
            lambda m, b: {"loss": m(b).sum()},
            r"must return loss or \(loss, metrics\) with metrics a dict, but returned a dict of \['loss'\]; return the loss",
        ),
        (lambda m, b: (m(b).sum().backward(), m(b).sum())[1], r"leave backward\(\) to fnlight, but has gone backward itself"),
    ],
)
def test_a_train_step_that_returns_something_else_is_told_what_to_return(fn, message):
    """Every wrong return value has its own error, and the caller's state stays readable."""
    state = created(fn)
    with pytest.raises(StepError, match=message):
        update(state, data())
    assert state.progress.step == 0
    assert state.params["weight"].shape == (3, 3)
