"""Recomputing activations changes the memory use, and no result."""

import random
from itertools import islice

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnlight import FitConfig, TrainState, accumulate, apply, autocast, fit, grad, load, pipe, run, save
from fnlight.errors import ConfigError, StepError
from fnlight.gradients import recompute
from fnlight.testing import assert_trees_equal, tiny_task
from tests.benchmarks.savings import adamw, peak
from tests.laws.tasks import TASKS

TRAINED = [name for name, case in TASKS.items() if case.kind == "loss" and case.trains]


class Block(nn.Module):
    """A block with dropout, and a buffer that it reads, writes in place and replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen += 1
        out = x + scale * self.inner(x * self.mask) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out


class Net(nn.Module):
    """Blocks, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 3)
        self.spare = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, scale=0.5)
        return self.head(x)


def task():
    torch.manual_seed(0)
    return attrs.evolve(
        tiny_task(), model=Net(), configure_optimizers=lambda m: torch.optim.AdamW([*m.blocks.parameters(), *m.head.parameters()], lr=0.01)
    )


def trained(task, batches, *parts, steps=5):
    """The state after some steps, and the metrics of all steps."""
    found = list(islice(run(pipe(task.train_step, *parts), TrainState.create(task, seed=1), batches), steps))
    return found[-1][0], [metrics for _, metrics in found]


@pytest.mark.filterwarnings("ignore:AdamW does not hold spare")
@pytest.mark.parametrize("patterns", [("blocks",), ("blocks.*",), ("blocks.0", "blocks.2.inner"), ("*.inner.0", "head"), ("*",)], ids=str)
def test_dropout_buffers_and_gradients_are_bit_identical(patterns):
    """For any modules: the second pass draws the same random numbers and reads the same buffers, which are written once."""
    batches = TASKS["mlp with BatchNorm and dropout"].batches()
    expected, others = trained(task(), batches, grad(), apply())[0], trained(task(), batches, recompute(*patterns), grad(), apply())[0]
    assert expected.buffers["blocks.0.seen"] == 10
    assert_trees_equal(others, expected)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("before", [(), (autocast(torch.bfloat16),)], ids=["fp32", "bf16"])
def test_every_task_is_trained_the_same(name, before):
    """On every task of the laws, also with autocast and over several batches, states and metrics are bit-identical to those without it."""
    case = TASKS[name]
    parts = (*before, grad(), accumulate(2), apply())
    expected = trained(case.make(), case.batches(4), *parts)
    assert_trees_equal(trained(case.make(), case.batches(4), recompute("*"), *parts), expected)


def test_inner_activations_are_not_kept():
    """Only the input of a recomputed block is saved for the backward pass."""
    held = []

    def train_step(model, batch):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            return model(batch).square().mean()

    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4)) for _ in range(8)))
    given = attrs.evolve(tiny_task(), model=model)
    found = []
    for parts in ((), (recompute("*"),)):
        held.clear()
        pipe(train_step, *parts, grad())(TrainState.create(given).store, torch.ones(32, 4), 0)
        found.append(sum(held))
    assert found[1] < found[0] / 10


def test_the_model_and_its_checkpoints_do_not_depend_on_recompute(tmp_path):
    """Names stay; a run with it can resume one without it bit-identically; forward functions are restored even if a step fails."""
    given, batches = tiny_task(), TASKS["mlp with BatchNorm and dropout"].batches()
    with_it, without = (recompute("*"), grad(), apply()), (grad(), apply())
    state = trained(given, batches, *with_it, steps=2)[0]
    assert list(state.store.module.state_dict()) == list(given.model.state_dict())
    assert not any("forward" in vars(m) for m in state.store.module.modules())
    path = save(state, tmp_path / "a")
    ends = [list(islice(run(pipe(given.train_step, *parts), load(path, given), batches), 3))[-1][0] for parts in (with_it, without)]
    assert_trees_equal(*ends)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pipe(given.train_step, *with_it)(ends[0], (torch.zeros(2, 9), torch.zeros(2).long()))
    assert not any("forward" in vars(m) for m in ends[0].store.module.modules())


def test_a_users_forward_function_is_kept():
    """If a user has replaced a forward function, the replacement is recomputed, and it is still there afterwards."""
    given, calls = tiny_task(), []
    state = TrainState.create(given)
    first = state.store.module[0]
    plain = first.forward
    first.forward = own = lambda x: calls.append(random.random()) or plain(x)
    state, _ = pipe(given.train_step, recompute("0"), grad(), apply())(state, TASKS["mlp with BatchNorm and dropout"].batches()[0])
    assert state.store.module[0].forward is own
    assert len(calls) == 2


def test_second_order_gradients_work():
    """Gradients of gradients through the blocks equal those without it."""
    given = TASKS["mlp with BatchNorm and dropout"]
    make = lambda: attrs.evolve(given.make(), train_step=penalised)

    def penalised(model, batch):
        x = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(model(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    expected = trained(make(), given.batches(), grad(), apply())[0]
    found = trained(make(), given.batches(), recompute("*"), grad(), apply())[0]
    assert_trees_equal(found, expected)


def test_fit_recomputes():
    """`FitConfig(recompute=...)` adds it before `grad`, and can be read back from JSON."""
    given, batches = tiny_task(), TASKS["mlp with BatchNorm and dropout"].batches()
    config = FitConfig(max_epochs=2, recompute=("0", "4"), device="cpu", progress=False)
    assert FitConfig.from_json(config.to_json()) == config
    found = fit(TrainState.create(given), batches, config)
    assert_trees_equal(found, fit(TrainState.create(given), batches, attrs.evolve(config, recompute=())))
    with pytest.raises(
        ConfigError,
        match=r"recompute has the pattern 'layers', but no module of the model matches it; the closest names are \['0', '1', '2', '3'\]",
    ):
        fit(TrainState.create(given), batches, FitConfig(max_epochs=1, recompute="layers", progress=False))


@pytest.mark.parametrize("patterns", [(), ("",), (3,)], ids=str)
def test_wrong_patterns_are_refused(patterns):
    """There must be at least one pattern, and each must be a string."""
    with pytest.raises(ConfigError, match=r"recompute takes patterns of module names, as in recompute\('blocks'\)"):
        recompute(*patterns)


@pytest.mark.filterwarnings("ignore:AdamW does not hold spare")
def test_missing_and_uncalled_modules_are_errors():
    """A pattern without a match shows the closest names; a module that the model does not call is an error, too."""
    step = pipe(task().train_step, recompute("block"), grad(), apply())
    batch = TASKS["mlp with BatchNorm and dropout"].batches()[0]
    with pytest.raises(
        ConfigError, match=r"recompute has the pattern 'block', but no module of the model matches it; the closest names are \['blocks'"
    ):
        next(run(step, TrainState.create(task()), [batch]))
    with pytest.raises(StepError, match=r"recompute\('spare'\) matches spare, but the model calls none of them"):
        pipe(task().train_step, recompute("spare"), grad(), apply())(TrainState.create(task()), batch)


def test_the_peak_memory_of_a_step_is_lower():
    """The bytes that torch's allocator gives during a step; only the input of every block is kept."""
    usual, less = (peak(512, adamw, *parts, grad(), apply()) for parts in ((), (recompute("0.*"),)))
    assert less < usual / 1.8
