"""Gradients are kept within the bounds that torch's own functions keep them in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.errors import ConfigError
from fnlight.gradients import clip_adaptive, clip_each, clip_norm, clip_quantile, clip_value, grad
from fnlight.metrics import Mean
from fnlight.optim import Optim
from fnlight.pipe import pipe
from fnlight.protocols import Gradients
from fnlight.state import Store, Task, TrainState
from fnlight.step import apply


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
        (lambda: clip_each(0), r"clip_each must be a finite number above 0, but got 0"),
        (lambda: clip_adaptive(0), r"clip_adaptive must be a finite number above 0, but got 0"),
        (lambda: clip_adaptive(exclude="head"), r"must be a list of patterns, but got the string 'head'"),
        (lambda: clip_quantile(1.5), r"clip_quantile must be a quantile in 0..1, but got 1.5"),
        (lambda: clip_quantile(window=0), r"window=...\) must be a whole number of at least 1, but got 0"),
        (lambda: clip_value(-1.0), r"clip_value must be a finite number above 0, but got -1.0"),
    ],
)
def test_a_bound_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


def gradients(combinator, values, params=None):
    """What a combinator makes of gradients, once for each list of them."""
    module = nn.ParameterDict({f"p{i}": nn.Parameter(p) for i, p in enumerate(params or [torch.ones_like(v) for v in values[0]])})
    store = Store(module, Optim(None), {})
    if combinator.init is not None:
        store.memory[combinator.key] = combinator.init(store)
    found = []
    for one in values:
        given = Gradients([v.clone() for v in one], torch.tensor(0.0), 1.0, {})
        found.append(combinator(lambda *_, given=given: given)(store, (None,), 0))
    return found


def test_clip_each_bounds_every_gradient_by_itself():
    """One large gradient does not shrink the others: each is what torch makes of it alone."""
    values = [torch.randn(3, 4), 100 * torch.randn(5), torch.zeros(2)]
    found = gradients(clip_each(1.0), [values])[0].values
    for value, clipped in zip(values, found, strict=True):
        p = nn.Parameter(value)
        p.grad = value.clone()
        nn.utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(clipped, p.grad)


def test_clip_adaptive_is_the_formula_of_the_paper():
    """Rows of a matrix, channels of a convolution and whole vectors, each against the norm of its weights."""
    torch.manual_seed(0)
    params = [torch.randn(3, 4), torch.randn(2, 3, 2, 2), torch.zeros(5), torch.randn(3, 4)]
    values = [torch.randn_like(p) for p in params]
    found = gradients(clip_adaptive(0.02, exclude=["p3"]), [values], params)[0].values
    for p, g, clipped in list(zip(params, values, found, strict=True))[:3]:
        rows = (p.flatten(1), g.flatten(1), clipped.flatten(1)) if p.dim() > 1 else (p[None], g[None], clipped[None])
        for weight, before, after in zip(*rows, strict=True):
            limit = 0.02 * max(weight.norm().item(), 1e-3)
            norm = before.norm().item()
            torch.testing.assert_close(after, before * (limit / norm) if norm > limit else before)
    assert torch.equal(found[3], values[3])


def test_clip_quantile_is_autoclip():
    """The limit is the quantile of the norms so far, the present one among them; the window forgets the oldest."""
    norms = [4.0, 2.0, 8.0, 1.0, 16.0, 3.0]
    found = gradients(clip_quantile(0.25, window=4), [[torch.tensor([n, 0.0])] for n in norms])
    for i, (norm, one) in enumerate(zip(norms, found, strict=True)):
        limit = torch.quantile(torch.tensor(norms[max(0, i - 3) : i + 1]), 0.25).item()
        assert one.values[0][0].item() == pytest.approx(min(norm, limit), rel=1e-5)
        assert one.metrics["grad_norm"].item() == norm


def test_clip_quantile_forgets_norms_that_are_no_numbers():
    """An infinite gradient does not raise the limit of those that follow."""
    found = gradients(clip_quantile(1.0), [[torch.tensor([n])] for n in (torch.nan, 1.0, torch.inf, 2.0)])
    assert [one.values[0].item() for one in found[1::2]] == pytest.approx([1.0, 2.0])
