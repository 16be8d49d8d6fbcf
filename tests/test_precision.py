"""A step in another precision computes what torch computes there."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.errors import ConfigError
from fnlight.loop import evaluate_every, run
from fnlight.pipe import pipe
from fnlight.precision import autocast
from fnlight.state import Task, TrainState
from fnlight.update import accumulate, apply, grad
from fnlight.when import steps


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def created(train_step=loss_fn):
    torch.manual_seed(0)
    configure = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # one line says it
    return TrainState.create(Task(nn.Linear(3, 3), train_step, configure_optimizers=configure), seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_autocast_computes_in_bf16_and_keeps_fp32_weights():
    """The loss is the autocast one; parameters and gradients keep their dtype."""
    state = created()
    after, metrics = pipe(loss_fn, autocast(torch.bfloat16), grad(), apply())(state.copy(), data())
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_fn(state.module(), data())
    assert torch.equal(metrics["loss"], expected.detach())
    assert after.params["weight"].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: autocast(torch.float64), r"autocast takes torch.bfloat16 or torch.float16, but got torch.float64"),
    ],
)
def test_a_precision_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_weight_cache_is_never_stale():
    """A weight used twice is cast once a pass, and afresh after every update: over micro-batches, steps and evaluations between them."""

    def twice(model, batch):
        return F.mse_loss(model(model(batch)), batch)

    def uncached(fn):
        def cast(model, batch):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return fn(model, batch)

        return cast

    def evaluated(model, batch):
        return {"loss": twice(model, batch)}

    cached = pipe(
        loss_fn, autocast(torch.bfloat16), grad(), accumulate(2), apply(),
        evaluate_every([data()], steps(1), eval_step=autocast(torch.bfloat16)(evaluated)),
    )  # fmt: skip
    plain = pipe(uncached(loss_fn), grad(), accumulate(2), apply(), evaluate_every([data()], steps(1), eval_step=uncached(evaluated)))
    state = created()
    ends = [list(islice(run(step, state, [data(seed=i) for i in range(4)]), 6))[-1][0] for step in (cached, plain)]
    assert all(torch.equal(p, ends[1].params[name]) for name, p in ends[0].params.items())
    assert [r.metrics["val/loss"] for r in ends[0].history] == [r.metrics["val/loss"] for r in ends[1].history]
    assert len({r.metrics["val/loss"] for r in ends[0].history}) == 6
