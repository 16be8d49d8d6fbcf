"""An optimizer that steps on the host computes what it computes where its parameters are, and its memory is nowhere else."""

from itertools import islice

import attrs
import pytest
import torch
from torch import nn

from fnlight import Optim, TrainState, apply, clip_norm, ema, grad, load, optimizer, pipe, run, save, skip_nonfinite
from fnlight.errors import OptimizerError
from fnlight.optim import take_step_on_host, to_device
from fnlight.step import apply_in_backward
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.laws.tasks import TASKS
from tests.optim.table import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # what torch_optimizer calls
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer"),
]


def on_host(task):
    """The task, its optimizer with its memory on the host."""

    def configure(model):
        made = task.configure_optimizers(model)
        return attrs.evolve(made, offload=True) if isinstance(made, Optim) else Optim(made, offload=True)

    return attrs.evolve(task, configure_optimizers=configure)


def trained(task, batches, *parts, steps=4):
    """The state some steps on, and all metrics."""
    found = list(islice(run(pipe(task.train_step, *parts), TrainState.create(task, seed=1), batches), steps))
    return found[-1][0], [metrics for _, metrics in found]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("torch")])
def test_every_optimizer_steps_bitwise_the_same_or_is_refused(name):
    """Every class of torch.optim and torch_optimizer; what wants a closure or second gradients says so at once."""
    case = CASES[name]
    task = on_host(case.task())
    if name in ("torch.optim.LBFGS", "torch_optimizer.Adahessian"):
        with pytest.raises(OptimizerError, match=r"cannot step on the host: it (computes the loss itself|differentiates the gradients)"):
            TrainState.create(task)
        return
    expected = trained(case.task(), case.batches(4), grad(), apply())
    assert_trees_equal(trained(task, case.batches(4), grad(), apply()), expected)


@pytest.mark.parametrize("name", [name for name, case in TASKS.items() if case.kind == "loss" and case.trains])
@pytest.mark.parametrize(
    "parts", [(clip_norm(0.1), apply()), (skip_nonfinite(), apply()), (apply_in_backward(),)], ids=lambda parts: parts[0].name
)
def test_every_task_is_trained_bitwise_the_same(name, parts):
    """With clipping, steps that may be left out, averages, and updates in the backward pass."""
    case = TASKS[name]
    expected = trained(case.make(), case.batches(), grad(), *parts, ema(0.9))
    assert_trees_equal(trained(on_host(case.make()), case.batches(), grad(), *parts, ema(0.9)), expected)


def test_a_step_that_is_not_finite_is_left_out():
    """Weights and memory stay as they are."""
    task, batches = on_host(tiny_task()), tiny_batches()
    state = trained(task, batches, grad(), skip_nonfinite(), apply())[0]
    before = state.copy()
    broken = (batches[0][0] * float("nan"), batches[0][1])
    after, _ = pipe(task.train_step, grad(), skip_nonfinite(), apply())(state, broken)
    assert_trees_equal([after.params, after.opt_state], [before.params, before.opt_state])


class Elsewhere(nn.Parameter):
    """A parameter that says that it lies on an accelerator, and whose copy on the host is its own."""

    @property
    def device(self):
        return torch.device("meta")


def test_memory_lies_on_the_host_wherever_the_parameters_are(tmp_path):
    """Moved, saved, loaded and copied: the memory of such an optimizer is never brought to where its parameters are."""
    task, batches = on_host(tiny_task()), tiny_batches()
    state = trained(task, batches, grad(), apply())[0]
    optim = state.store.optim
    for p in state.store.params:
        p.__class__ = Elsewhere
    assert {p.device.type for p in state.store.params} == {"meta"}
    to_device(optim)
    assert {v.device.type for slots in optim.optimizer.state.values() for v in slots.values()} == {"cpu"}
    for p in state.store.params:
        p.__class__ = nn.Parameter
    found = load(save(state, tmp_path / "a"), task)
    assert found.store.optim.offload
    assert_trees_equal(found, state)
    assert found.copy().store.optim.offload
    plain = load(tmp_path / "a", tiny_task())  # which goes on without, bitwise
    ends = [list(islice(run(pipe(t.train_step, grad(), apply()), s, batches), 2))[-1][0] for t, s in ((task, found), (tiny_task(), plain))]
    assert_trees_equal(*ends)


def test_the_optimizer_sees_copies_and_leaves_none_behind():
    """During the step groups and memory are those of copies; afterwards, and after an error, those of the parameters."""
    model = nn.Linear(2, 1)
    seen = []

    class Watching(torch.optim.AdamW):
        def step(self, closure=None):
            seen.extend(id(p) for group in self.param_groups for p in group["params"])
            if len(seen) > 4:
                raise ValueError("enough")
            return torch.optim.AdamW.step(self, closure)

    made = Watching(model.parameters(), lr=0.1)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        take_step_on_host(made)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="enough"):
        take_step_on_host(made)
    own = [id(p) for p in model.parameters()]
    assert not set(seen) & set(own)
    assert [id(p) for p in made.param_groups[0]["params"]] == own
    assert [id(p) for p in made.state] == own


def test_what_has_no_gradient_keeps_its_memory():
    """A parameter that a step leaves out is not copied, and what is remembered of it stays."""
    model = nn.Linear(2, 1)
    made = torch.optim.Adam(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    take_step_on_host(made)
    model.weight.grad, kept = None, model.weight.detach().clone()
    take_step_on_host(made)
    assert torch.equal(model.weight, kept)
    assert [made.state[p]["step"].item() for p in model.parameters()] == [1, 2]


@pytest.mark.parametrize("given", [1, "cpu", None])
def test_only_a_switch_is_taken(given):
    """The host is the host."""
    with pytest.raises(OptimizerError, match="offload must be True or False"):
        Optim(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), offload=given)


def test_schedule_free_optimizers_are_refused():
    """They keep other weights to evaluate, which would have to be in two places."""
    task = attrs.evolve(tiny_task(), configure_optimizers=lambda m: Optim(optimizer("schedulefree.AdamWScheduleFree", m), offload=True))
    with pytest.raises(OptimizerError, match="cannot step on the host: it keeps other weights beside those that are trained"):
        TrainState.create(task)
