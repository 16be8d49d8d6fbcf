"""Gradients are kept within the bounds that torch's own functions keep them in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.clip import clip_norm, clip_value
from fnlight.errors import ConfigError
from fnlight.metrics import Mean
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.update import apply, grad


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def created(train_step=loss_fn):
    torch.manual_seed(0)
    configure = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # one line says it
    return TrainState.create(Task(nn.Linear(3, 3), train_step, configure_optimizers=configure), seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def sum_fn(model, batch):
    """A loss as a sum and a weight."""
    return Mean(F.mse_loss(model(batch), batch, reduction="sum"), batch.numel())


def plain(state, batch, clip, train_step=loss_fn):
    """The module after one hand-written step."""
    module = state.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    train_step(module, batch).backward()
    clip(list(module.parameters()))
    optimizer.step()
    return dict(module.named_parameters())


def same(state, params):
    return all(torch.equal(state.params[name], p) for name, p in params.items())


def test_clip_norm_sees_true_gradients_and_returns_their_norm():
    """It clips what torch's own function clips, after the division by the weight."""
    state = created(sum_fn)
    norms = []

    def clip(params):
        norms.append(nn.utils.clip_grad_norm_(params, 0.01))

    step = pipe(sum_fn, grad(), clip_norm(0.01), apply())
    after, metrics = step(state.copy(), data())
    params = plain(state, data(), clip=clip)
    assert torch.allclose(metrics["grad_norm"], norms[0], rtol=1e-6)
    for name, p in params.items():
        torch.testing.assert_close(after.params[name], p, rtol=1e-6, atol=1e-8)


def test_clip_value_clamps_every_entry():
    """It clamps what torch's own function clamps, bitwise."""
    state = created()
    after, _ = pipe(loss_fn, grad(), clip_value(0.01), apply())(state.copy(), data())
    assert same(after, plain(state, data(), clip=lambda params: nn.utils.clip_grad_value_(params, 0.01)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip_norm(0), r"clip_norm must be a finite number above 0, but got 0"),
        (lambda: clip_value(-1.0), r"clip_value must be a finite number above 0, but got -1.0"),
    ],
)
def test_a_bound_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()
