"""A step in another precision computes the same as torch in that precision."""

import copy
from itertools import islice

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.checkpoint import load
from fnlight.data import Loaders
from fnlight.errors import ConfigError, SeamError, StepError
from fnlight.fit import FitConfig, fit
from fnlight.gradients import accumulate, grad
from fnlight.loop import evaluate_every, run
from fnlight.pipe import pipe
from fnlight.precision import autocast, cast, to_dtype
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.testing import assert_trees_equal
from fnlight.triggers import steps


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def created(train_step=loss_fn):
    torch.manual_seed(0)
    configure = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # short enough for one line
    return TrainState.create(Task(nn.Linear(3, 3), train_step, configure_optimizers=configure), seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_autocast_computes_in_bf16_and_keeps_fp32_weights():
    """The loss equals that of torch.autocast; parameters and gradients keep their dtype."""
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
        (lambda: cast(torch.int8), r"cast takes torch.bfloat16, torch.float16.*but got torch.int8"),
        (lambda: autocast(torch.float64), r"autocast takes torch.bfloat16 or torch.float16, but got torch.float64"),
    ],
)
def test_a_wrong_dtype_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_autocast_cache_never_holds_old_weights():
    """A weight used twice is cast once per pass, and again after every update: over micro-batches, steps and evaluations between them."""

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


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("fp16-true", torch.float16), ("fp64", torch.float64)])
def test_a_true_precision_equals_a_manual_loop_with_a_cast_model(precision, dtype, tmp_path):
    """`fit` is bit-identical to a manual loop with a model and batches of that dtype; saving, resuming and evaluating keep the dtype."""

    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.1)

    def eval_step(model, batch):
        return {"loss": loss_fn(model, batch)}

    torch.manual_seed(0)
    task = Task(nn.Linear(3, 3), loss_fn, eval_step, configure_optimizers=make)
    batches = [data(seed=i) for i in range(4)]
    config = FitConfig(max_epochs=2, precision=precision, dir=tmp_path / "a", sanity_batches=1, device="cpu", progress=False)
    state = fit(TrainState.create(task), Loaders(train=batches, val=batches[:1]), config)
    model = copy.deepcopy(task.model).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for batch in batches * 2:
        optimizer.zero_grad()
        loss_fn(model, batch.to(dtype)).backward()
        optimizer.step()
    assert {p.dtype for p in state.params.values()} == {dtype}
    assert {slot.dtype for slots in state.opt_state.values() for n, slot in slots.items() if n != "step"} == {dtype}
    assert all(torch.equal(p, state.params[name]) for name, p in model.named_parameters())
    half = attrs.evolve(config, max_epochs=1, dir=tmp_path / "b")
    fit(TrainState.create(task), Loaders(train=batches, val=batches[:1]), half)
    rest = attrs.evolve(config, dir=tmp_path / "b", resume=True)
    assert_trees_equal(fit(TrainState.create(task), Loaders(train=batches, val=batches[:1]), rest), state)
    assert_trees_equal(load(tmp_path / "a", task), state)


def test_a_state_in_another_precision_is_refused():
    """The error says how to convert the state, and the conversion works."""
    torch.manual_seed(0)
    task = Task(nn.Linear(3, 3), loss_fn, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    config = FitConfig(max_steps=1, precision="bf16-true", device="cpu", progress=False)
    state = fit(TrainState.create(task), [data()], config)
    further = attrs.evolve(config, max_steps=2, precision="fp32")
    with pytest.raises(ConfigError, match=r"trained with weights in bf16.*fl.to_dtype\(state, torch.float32\)"):
        fit(state, [data()], further)
    after = fit(to_dtype(state, torch.float32), [data()], further)
    assert {p.dtype for p in after.params.values()} == {torch.float32}
    assert {p.dtype for p in state.params.values()} == {torch.bfloat16}


def test_autocast_and_cast_together_are_refused():
    """Autocast keeps weights in fp32, cast converts them."""
    with pytest.raises(SeamError, match=r"autocast\(bf16\) keeps weights in fp32 and cast converts them"):
        pipe(loss_fn, cast(torch.float64), autocast(torch.bfloat16), grad(), apply())


def test_the_matmul_precision_is_set_during_the_run_only():
    """It is set during the steps and restored afterwards, also after an error."""
    seen = []

    def looking(model, batch):
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) == 2:
            raise ValueError("stop here")
        return loss_fn(model, batch)

    before = torch.get_float32_matmul_precision()
    config = FitConfig(max_steps=3, matmul_precision="medium", device="cpu", progress=False)
    with pytest.raises(ValueError, match="stop here"):
        fit(created(looking), [data()], config)
    assert (seen, torch.get_float32_matmul_precision()) == (["medium", "medium"], before)


def test_tensors_that_a_step_creates_have_the_same_dtype():
    """Noise that a train_step draws has the cast dtype, and the default dtype is restored, also after an error."""

    def noisy(model, batch):
        return F.mse_loss(model(torch.randn(2, 3)), batch) if len(batch) == 2 else batch.missing

    step = pipe(noisy, cast(torch.float64), grad(), apply())
    state, metrics = step(created(noisy), data(2))
    assert (metrics["loss"].dtype, torch.get_default_dtype()) == (torch.float64, torch.float32)
    with pytest.raises(AttributeError, match="missing"):
        step(state, data(3))
    assert torch.get_default_dtype() == torch.float32


class Bag:
    """An object that holds tensors; its subclass says how they are reached."""

    def __init__(self, x):
        self.x = x


class OpenBag(Bag):
    """One that can be cast."""

    def apply(self, fn):
        self.x = fn(self.x)
        return self


def test_cast_reaches_what_it_can_and_refuses_what_it_cannot():
    """Packed sequences and objects with ``apply`` are cast, the batch stays as it is; another object with tensors is an error."""
    seen = []
    fn = cast(torch.float64)(lambda model, batch: seen.append((batch[0].data.dtype, batch[1].x.dtype)))
    batch = (torch.nn.utils.rnn.pack_sequence([torch.ones(2)]), OpenBag(torch.ones(1)))
    fn(None, batch)
    assert seen == [(torch.float64, torch.float64)]
    assert batch[1].x.dtype == torch.float32
    with pytest.raises(StepError, match=r"a batch holds a Bag whose tensors .x. cannot be cast to fp64; give it a method apply"):
        fn(None, (batch[0], Bag(torch.ones(1))))
