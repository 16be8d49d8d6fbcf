"""Metrics of several batches are merged in a type that holds them, without graphs, and count with the samples of their batch."""

import weakref

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.errors import StepError
from fnlight.metrics import Cat, Histogram, Last, Max, Mean, Min, Sum, join_metrics, per_sample

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
DATA = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 22, 8)]  # 8, 8 and 6 samples


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def trained(train_step, data=DATA, **config):
    """The state after an epoch that leaves the weights as they are, so that every batch is measured with the same ones."""
    torch.manual_seed(0)
    task = fl.Task(nn.Linear(4, 1), train_step, configure_optimizers=sgd)
    return fl.fit(fl.TrainState.create(task), data, fl.FitConfig(max_epochs=1, progress=False, **config))


SMALL = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64, torch.half, torch.bfloat16]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", [lambda v: v, Sum, Mean, lambda v: Mean(v, v)], ids=["plain", "Sum", "Mean", "weight"])
def test_many_narrow_values_are_merged_in_a_type_that_holds_them(dtype, kind):
    """Bools, small integers and halves neither overflow nor are rounded when 300 batches become one step."""
    value = torch.tensor(1 if dtype == torch.bool else 100).to(dtype)
    merged = {"x": kind(value)}
    for _ in range(299):
        merged = join_metrics(merged, {"x": kind(value)})
    total = merged["x"].value if kind is Sum else merged["x"].total
    assert float(total) == 300 * float(value)
    assert float(merged["x"]) == (
        300 * float(value) if kind is Sum else 1.0 if isinstance(kind(value), Mean) and kind is not Mean else float(value)
    )


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_accumulation_gives_the_metrics_of_one_batch_at_a_time(dtype):
    """The same data, and the same means over the epoch, whether a step has one batch or many."""

    def train_step(model, batch):
        value = torch.tensor(1).to(dtype)
        return mse(model, batch), {"plain": value, "sum": Sum(value), "mean": Mean(value, 1), "max": Max(value), "min": Min(value)}

    data = DATA * 50
    one, many = (trained(train_step, data, accumulate=n).history[-1].metrics for n in (1, 150))
    assert one == pytest.approx(many, rel=1e-6)
    assert (one["train/plain"], one["train/sum"]) == (1.0, 150.0)


def test_large_integers_are_not_rounded():
    """float32 cannot tell 2**24 from 2**24 + 1: beside a float, or where a step may be left out, an integer becomes float64."""
    big = torch.tensor(2**24 + 1)
    assert int(Sum(big).merge(Sum(0.0)).value) == 2**24 + 1
    assert int(Max(big).merge(Max.empty()).value) == 2**24 + 1
    step = fl.pipe(lambda m, b: (mse(m, b), {"n": Sum(big), "most": Max(big)}), fl.grad(), fl.skip_nonfinite(), fl.apply())
    _, metrics = step(fl.TrainState.create(fl.Task(nn.Linear(4, 1), mse, configure_optimizers=sgd)), DATA[0])
    assert int(metrics["n"].value) == int(metrics["most"].value) == 2**24 + 1


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, {"microbatch": 3}, {"nonfinite": "skip"}, {"compile": "trace"}], ids=str)
def test_a_batch_mean_becomes_the_exact_mean_over_the_data(accumulate, more):
    """In means over an epoch a plain number counts with the samples of its batch, the loss too, however a step is put together."""
    state = trained(lambda m, b: (mse(m, b), {"mae": F.l1_loss(m(b[0]), b[1])}), accumulate=accumulate, **more)
    found = state.history[-1].metrics
    with torch.no_grad():
        out = state.module()(X)
    assert found["train/loss"] == pytest.approx(float(F.mse_loss(out, Y)), rel=1e-5)
    assert found["train/mae"] == pytest.approx(float(F.l1_loss(out, Y)), rel=1e-5)


def test_the_gradient_counts_every_batch_once():
    """Samples count in what is reported; a plain loss still counts once a batch in the gradient of a group."""
    step = fl.pipe(mse, fl.grad(), fl.accumulate(3), fl.apply())
    torch.manual_seed(0)
    task = fl.Task(nn.Linear(4, 1), mse, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    state = fl.TrainState.create(task)
    model = state.module()
    (sum(mse(model, batch) for batch in DATA) / 3).backward()
    after, metrics = next(fl.run(step, state, DATA))
    assert torch.allclose(after.params["weight"], (model.weight - model.weight.grad).detach(), atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(sum(mse(model, batch).detach() for batch in DATA) / 3))


def test_names_must_be_those_of_every_batch_of_a_step():
    """With and without accumulation a name that appears in only some batches is an error that says which."""

    def train_step(model, batch):
        return mse(model, batch), ({"rare": torch.tensor(1.0)} if len(batch[0]) < 8 else {})

    for accumulate in (1, 3):
        with pytest.raises(StepError, match=r"missing now: \[\], new: \['rare'\].*Mean\(0.0, 0\)"):
            trained(train_step, accumulate=accumulate)
    with pytest.raises(StepError, match=r"metric 'x' must be of one kind.*as Sum and as Max"):
        join_metrics({"x": Sum(1)}, {"x": Max(1)})


@attrs.frozen(eq=False)
class Own:
    """A metric of the user's."""

    value: torch.Tensor

    def merge(self, other):
        return Own(self.value + other.value)

    def compute(self):
        return self.value


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Kept:
    """What the graph of a step holds."""


@pytest.mark.parametrize(
    "metric", [Mean, Max, Min, Sum, Last, Own, Cat, Histogram, lambda v: v, lambda v: Mean(1.0, v), lambda v: Cat((v[None], v[None]), max)]
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_no_metric_keeps_the_graph_of_its_step(metric, by_hand):
    """Every leaf of a metric is detached, so activations are freed at the end of their step, not at the next log."""
    alive = weakref.WeakSet()

    def loss_of(model, batch):
        kept = _Kept()
        alive.add(kept)
        return F.mse_loss(_Marked.apply(model(batch[0]), kept), batch[1])

    def train_step(model, batch):
        loss = loss_of(model, batch)
        return loss, {"m": metric(loss)}

    def kernel(store, batches, key):
        loss = loss_of(store.module, batches[0])
        loss.backward()
        return {"m": metric(loss)}

    start = (kernel, fl.manual()) if by_hand else (train_step, fl.grad(), fl.apply())
    step = fl.pipe(*start, fl.log_to(lambda record: None, every=fl.steps(50)), fl.stop_when(fl.max_steps(9)))
    task = fl.Task(nn.Linear(4, 1), step if by_hand else train_step, configure_optimizers=sgd)
    seen = [len(alive) for _ in zip(range(8), fl.run(step, fl.TrainState.create(task), DATA), strict=False)]
    assert max(seen) <= 1


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Sum(torch.ones(2, 2)), r"metric 'x' must be one number, but has shape \[2, 2\]"),
        (Mean(torch.tensor(1.0), torch.ones(1)), r"metric 'x' must be one number, but has shape \[1\]"),
        (Max(torch.ones(3)), r"metric 'x' must be one number, but has shape \[3\]"),
        (torch.tensor(1j), r"metric 'x' must be one real number, but is complex"),
        (Sum("many"), r"metric 'x' must be a number or a scalar tensor, but is str"),
    ],
)
def test_what_is_not_one_number_is_refused_with_its_name(metric, message):
    """In a train step, in an eval step, and where only a later batch has another shape."""
    with pytest.raises(StepError, match=message):
        trained(lambda m, b: (mse(m, b), {"x": metric}))
    task = fl.Task(nn.Linear(4, 1), mse, lambda m, b: {"x": metric if len(b[0]) < 8 else type(metric)(torch.tensor(1.0))})
    late = fl.Task(nn.Linear(4, 1), mse, lambda m, b: {"x": metric})
    with pytest.raises(StepError, match=message):
        fl.evaluate(fl.TrainState.create(late), DATA)
    if not isinstance(metric, torch.Tensor):
        with pytest.raises(StepError, match=message):
            fl.evaluate(fl.TrainState.create(task), DATA)


def test_a_weight_that_depends_on_the_parameters_is_refused():
    """Gradients are divided by the weight as by a number, so its own gradient would be lost without a word."""
    with pytest.raises(StepError, match=r"weight of a loss Mean\(total, weight\) must not depend on the parameters.*detach\(\)"):
        trained(lambda m, b: Mean(mse(m, b), m.weight.sum()))
    with pytest.raises(StepError, match=r"weight of a loss Mean\(total, weight\) must be one number, but its shape is \[8\]"):
        trained(lambda m, b: Mean(mse(m, b), torch.ones(8)))


def test_merging_keeps_what_counts_by_samples():
    """Beside a part that counts nothing the samples stay known; beside a mean with a weight of its own they do not."""
    one = per_sample({"x": torch.tensor(2.0)}, 4)["x"]
    assert one.merge(Mean.empty())._exact == one._exact
    assert one.merge(Mean(1.0, 1))._exact is None
