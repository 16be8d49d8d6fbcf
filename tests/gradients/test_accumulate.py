"""`accumulate` makes one gradient and one set of metrics of several batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.data import Item
from fnlight.errors import ConfigError
from fnlight.gradients import accumulate, grad
from fnlight.metrics import Mean
from fnlight.pipe import pipe
from fnlight.step import apply
from tests.small_steps import created, data, loss_fn, sum_fn


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_accumulation_over_uneven_batches_is_one_large_batch(sizes):
    """With Mean(total, weight), n batches of any sizes equal their concatenation."""
    state = created(sum_fn)
    batches = [data(n, seed=i) for i, n in enumerate(sizes)]
    step = pipe(sum_fn, grad(), accumulate(len(sizes)), apply())
    many, metrics = step(state.copy(), Item.of(*batches, state=state))
    one, whole = step(state.copy(), torch.cat(batches))
    for name, p in one.params.items():
        torch.testing.assert_close(many.params[name], p, rtol=1e-6, atol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


def test_metrics_are_merged_over_a_group():
    """Plain scalars count with weight 1 a batch, monoids merge as they do, and nothing keeps a graph."""

    def fn(model, batch):
        loss = loss_fn(model, batch)
        return loss, {"twice": 2 * loss, "size": Mean(batch.sum(), len(batch))}

    state = created(fn)
    batches = data(2, 1), data(4, 2)
    _, metrics = pipe(fn, grad(), accumulate(2), apply())(state.copy(), Item.of(*batches, state=state))
    losses = [loss_fn(state.module(), b) for b in batches]
    assert list(metrics) == ["loss", "twice", "size"]
    assert float(metrics["twice"]) == pytest.approx(float(sum(losses).detach()))
    assert float(metrics["size"]) == pytest.approx(float(torch.cat(batches).sum() / 6))
    assert not metrics["twice"].total.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accumulate(0), r"accumulate must be a number of batches >= 1.*but got 0"),
        (lambda: accumulate({5: 4}), r"must start at epoch 0"),
    ],
)
def test_a_combinator_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()
