"""An update during the backward pass is the update after it, with no more than a few gradients in memory."""

from itertools import islice

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight import (
    FitConfig,
    Mean,
    Optim,
    Task,
    TrainState,
    accumulate,
    apply,
    autocast,
    carry,
    clip_norm,
    cosine,
    ema,
    fit,
    freeze,
    grad,
    load,
    loss_scale,
    microbatch,
    optimizer,
    param_groups,
    pipe,
    recompute,
    run,
    save,
    skip_nonfinite,
    weighted,
)
from fnlight.data import Item
from fnlight.errors import ConfigError, OptimizerError, SeamError, StepError
from fnlight.step import apply_in_backward
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.benchmarks.savings import adamw, peak
from tests.laws.tasks import TASKS
from tests.optim.table import CASES

OF_TORCH = [name for name in CASES if name.startswith("torch.optim") and not name.endswith("LBFGS")]
TRAINED = [name for name, case in TASKS.items() if case.kind == "loss" and case.trains]


def trained(task, batches, *parts, steps=4):
    """The state some steps on, and all metrics."""
    found = list(islice(run(pipe(task.train_step, *parts), TrainState.create(task, seed=1), batches), steps))
    return found[-1][0], [metrics for _, metrics in found]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("name", OF_TORCH)
def test_every_optimizer_of_torch_updates_bitwise_the_same(name):
    """Parameters, memory and metrics are those of `apply`, for all classes of torch.optim but LBFGS."""
    case = CASES[name]
    expected = trained(case.task(), case.batches(4), grad(), apply())
    assert_trees_equal(trained(case.task(), case.batches(4), grad(), apply_in_backward()), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_every_task_is_trained_bitwise_the_same(name):
    """Tied weights, frozen parts, losses with a weight: with averages, a schedule, groups and recomputed parts."""
    case = TASKS[name]
    make = lambda: attrs.evolve(case.make(), configure_optimizers=configure)

    def configure(model):
        first = next(n for n, p in model.named_parameters() if p.requires_grad)
        return Optim(torch.optim.AdamW(param_groups(model, {first: {"lr": 0.05, "weight_decay": 0.1}}), lr=0.01), schedule=cosine(10))

    expected = trained(make(), case.batches(), grad(), apply(), ema(0.9))
    found = trained(make(), case.batches(), recompute("*"), autocast(), grad(), apply_in_backward(), ema(0.9))
    assert_trees_equal(trained(make(), case.batches(), grad(), apply_in_backward(), ema(0.9)), expected)
    assert_trees_equal(found, trained(make(), case.batches(), autocast(), grad(), apply(), ema(0.9)))


def test_what_changes_the_loss_goes_with_it():
    """Named losses and a carried state, which stand between `grad` and the update."""

    def train_step(model, batch):
        (x, y), seen = batch
        loss = F.cross_entropy(model(x), y, reduction="sum")
        return {"main": Mean(loss, len(y)), "small": Mean(0.1 * loss * seen, len(y))}, {}, seen + 1

    between = (grad(), carry(lambda model, batch: torch.zeros(())), weighted({"main": 1.0, "small": 0.5}))
    task = attrs.evolve(tiny_task(), train_step=train_step)
    assert_trees_equal(trained(task, tiny_batches(), *between, apply_in_backward()), trained(task, tiny_batches(), *between, apply()))


def test_what_is_frozen_stays():
    """Frozen parameters get no gradient, so there is none to use up."""
    expected = trained(tiny_task(), tiny_batches(), grad(), apply(), freeze("0"))
    assert_trees_equal(trained(tiny_task(), tiny_batches(), grad(), apply_in_backward(), freeze("0")), expected)


def test_a_gradient_is_freed_before_the_next_one_is_there():
    """While a parameter gets its gradient, the gradients of those behind it are gone already; and no hook stays."""
    live = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            live.append(sum(p.grad is not None for p in params))
            return g

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = layer(Watch.apply(x))
            return x

    model = Watched()
    task = Task(model, lambda m, b: m(b).square().mean(), configure_optimizers=lambda m: torch.optim.AdamW(m.parameters()))
    for part, expected in ((apply(), [1, 2, 3, 4, 5]), (apply_in_backward(), [0, 0, 0, 0, 0])):
        state = TrainState.create(task)
        params = state.store.params
        live.clear()
        state, _ = pipe(task.train_step, grad(), part)(state, torch.ones(2, 4, requires_grad=True))
        assert live[:5] == expected
        assert not any(p._post_accumulate_grad_hooks for p in state.store.params)


def test_a_checkpoint_of_one_goes_on_as_the_other(tmp_path):
    """Nothing of it is in the state."""
    task = tiny_task()
    path = save(trained(task, tiny_batches(), grad(), apply_in_backward(), steps=2)[0], tmp_path / "a")
    ends = [
        list(islice(run(pipe(task.train_step, grad(), last), load(path, task), tiny_batches()), 3))[-1][0]
        for last in (apply(), apply_in_backward())
    ]
    assert_trees_equal(*ends)


def test_fit_updates_in_the_backward_pass():
    """`FitConfig(apply_in_backward=True)` takes the place of `apply`, and reads back from JSON."""
    config = FitConfig(max_epochs=2, apply_in_backward=True, ema=0.9, device="cpu", progress=False)
    assert FitConfig.from_json(config.to_json()) == config
    found = fit(TrainState.create(tiny_task()), tiny_batches(), config)
    assert_trees_equal(found, fit(TrainState.create(tiny_task()), tiny_batches(), attrs.evolve(config, apply_in_backward=False)))


@pytest.mark.parametrize(
    "parts",
    [(accumulate(2),), (clip_norm(1.0),), (autocast(torch.float16), loss_scale()), (skip_nonfinite(),), (microbatch(2),)],
    ids=lambda parts: parts[-1].name,
)
def test_what_needs_all_gradients_is_refused(parts):
    """The seam says where the update belongs, and why nothing fits between."""
    early = [part for part in parts if part.takes == "loss"]
    late = [part for part in parts if part.takes != "loss"]
    with pytest.raises(
        SeamError,
        match=r"move apply_in_backward directly after grad\(\) \(each parameter is updated as soon as its gradient is computed, so",
    ):
        pipe(tiny_task().train_step, *early, grad(), *late, apply_in_backward())


@pytest.mark.parametrize(
    "given", [{"clip_norm": 1.0}, {"accumulate": 2}, {"precision": "fp16"}, {"nonfinite": "skip"}, {"microbatch": 2}], ids=str
)
def test_a_configuration_that_needs_all_gradients_is_refused_before_any_work(given):
    """`fit` says the same, before the first step."""
    state = TrainState.create(tiny_task())
    with pytest.raises(SeamError, match=r"apply_in_backward takes .* \(each parameter is updated as soon as"):
        fit(state, tiny_batches(), FitConfig(max_epochs=1, apply_in_backward=True, progress=False, **given))
    assert state.progress.step == 0


@pytest.mark.parametrize("name", ["lbfgs", "torch_optimizer.MADGRAD", "lookahead"])
def test_an_optimizer_whose_parameters_share_something_is_refused(name):
    """Before the first step, with what may be done."""
    options = {"base": "adamw"} if name == "lookahead" else {}
    task = attrs.evolve(tiny_task(), configure_optimizers=lambda model: optimizer(name, model, **options))
    with pytest.raises(OptimizerError, match=r"cannot update one parameter at a time: only the classes of torch.optim except LBFGS"):
        next(run(pipe(task.train_step, grad(), apply_in_backward()), TrainState.create(task), tiny_batches()))


def test_several_optimizers_several_batches_and_none_are_refused():
    """One optimizer, one batch a step; each error says what to take instead."""
    case = TASKS["two optimizers"]
    with pytest.raises(ConfigError, match=r"apply_in_backward steps one optimizer, but the phases disc, gen have one each; use apply\(\)"):
        pipe(case.make().train_step, grad(), apply_in_backward())
    step, batches = pipe(tiny_task().train_step, grad(), apply_in_backward()), tiny_batches()
    with pytest.raises(StepError, match=r"takes one batch per step, but got 2; .* use accumulate\(\) and apply\(\)"):
        step(TrainState.create(tiny_task()), Item(tuple(batches[:2]), 0, 2, last=False, samples=12))
    with pytest.raises(OptimizerError, match=r"apply_in_backward needs an optimizer, but the task has no configure_optimizers"):
        step(TrainState.create(attrs.evolve(tiny_task(), configure_optimizers=None)), batches[0])
    state = TrainState.create(tiny_task())
    state.store.place = object()  # how tensors lie on several processes
    with pytest.raises(ConfigError, match=r"before gradients are averaged over the processes, .*use apply\(\)"):
        step.start(state)


def test_an_error_in_the_backward_pass_leaves_no_hook():
    """A step that fails takes its hooks with it."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            raise ValueError("no gradient today")

    task = attrs.evolve(tiny_task(), train_step=lambda model, batch: model[4](Fails.apply(model[:4](batch[0]))).sum())
    state = TrainState.create(task)
    with pytest.raises(ValueError, match="no gradient today"):
        pipe(task.train_step, grad(), apply_in_backward())(state, tiny_batches()[0])
    assert not any(p._post_accumulate_grad_hooks or p.grad is not None for p in state.store.params)


def test_a_step_holds_less_at_its_peak():
    """What torch's allocator hands out during a step, to the byte: gradients no longer lie side by side."""
    usual, released = (peak(16, adamw, grad(), part) for part in (apply(), apply_in_backward()))
    assert released < usual / 2
