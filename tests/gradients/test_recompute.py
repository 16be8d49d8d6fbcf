"""Recomputing activations changes how much is kept, and no number."""

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
    """A block with dropout, and a buffer that it reads, writes in place and puts another one in the place of."""

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
    """The state some steps on, and the metrics of all of them."""
    found = list(islice(run(pipe(task.train_step, *parts), TrainState.create(task, seed=1), batches), steps))
    return found[-1][0], [metrics for _, metrics in found]


@pytest.mark.filterwarnings("ignore:AdamW holds no spare")
@pytest.mark.parametrize("patterns", [("blocks",), ("blocks.*",), ("blocks.0", "blocks.2.inner"), ("*.inner.0", "head"), ("*",)], ids=str)
def test_dropout_buffers_and_gradients_are_bitwise_the_same(patterns):
    """Whatever is recomputed: random numbers are drawn as the first time, and buffers are seen as then and written once."""
    batches = TASKS["mlp with BatchNorm and dropout"].batches()
    expected, others = trained(task(), batches, grad(), apply())[0], trained(task(), batches, recompute(*patterns), grad(), apply())[0]
    assert expected.buffers["blocks.0.seen"] == 10
    assert_trees_equal(others, expected)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("before", [(), (autocast(torch.bfloat16),)], ids=["fp32", "bf16"])
def test_every_task_is_trained_the_same(name, before):
    """On every task of the laws, also under autocast and over several batches: states and metrics are bitwise what they are without."""
    case = TASKS[name]
    parts = (*before, grad(), accumulate(2), apply())
    expected = trained(case.make(), case.batches(4), *parts)
    assert_trees_equal(trained(case.make(), case.batches(4), recompute("*"), *parts), expected)


def test_what_lies_within_is_not_kept():
    """Of a block that is recomputed, only its input is saved for the backward pass."""
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


def test_the_model_is_as_it_was_and_checkpoints_know_nothing_of_it(tmp_path):
    """Names stay; a checkpoint of one kind goes on as the other, bitwise; forward functions are put back even if a step fails."""
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


def test_a_forward_function_of_the_users_own_is_kept():
    """What a user has put in the place of a forward function is what is recomputed, and it is there afterwards."""
    given, calls = tiny_task(), []
    state = TrainState.create(given)
    first = state.store.module[0]
    plain = first.forward
    first.forward = own = lambda x: calls.append(random.random()) or plain(x)
    state, _ = pipe(given.train_step, recompute("0"), grad(), apply())(state, TASKS["mlp with BatchNorm and dropout"].batches()[0])
    assert state.store.module[0].forward is own
    assert len(calls) == 2


def test_a_block_may_be_run_backward_twice():
    """Gradients of gradients, which go through the blocks again, are what they are without."""
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
    """`FitConfig(recompute=...)` puts it in front, and reads back from JSON."""
    given, batches = tiny_task(), TASKS["mlp with BatchNorm and dropout"].batches()
    config = FitConfig(max_epochs=2, recompute=("0", "4"), device="cpu", progress=False)
    assert FitConfig.from_json(config.to_json()) == config
    found = fit(TrainState.create(given), batches, config)
    assert_trees_equal(found, fit(TrainState.create(given), batches, attrs.evolve(config, recompute=())))
    with pytest.raises(
        ConfigError, match=r"recompute means 'layers', but the model has no such module; near to it are \['0', '1', '2', '3'\]"
    ):
        fit(TrainState.create(given), batches, FitConfig(max_epochs=1, recompute="layers", progress=False))


@pytest.mark.parametrize("patterns", [(), ("",), (3,)], ids=str)
def test_patterns_that_mean_nothing_are_refused(patterns):
    """There must be one, and each is a text."""
    with pytest.raises(ConfigError, match=r"recompute takes patterns of names of modules, as in recompute\('blocks'\)"):
        recompute(*patterns)


@pytest.mark.filterwarnings("ignore:AdamW holds no spare")
def test_modules_that_are_not_there_or_never_called_are_told():
    """Nothing that was asked for is left out silently: close names are shown, and a part that the model does not call is an error."""
    step = pipe(task().train_step, recompute("block"), grad(), apply())
    batch = TASKS["mlp with BatchNorm and dropout"].batches()[0]
    with pytest.raises(ConfigError, match=r"recompute means 'block', but the model has no such module; near to it are \['blocks'"):
        next(run(step, TrainState.create(task()), [batch]))
    with pytest.raises(StepError, match=r"recompute\('spare'\) means spare, but the model calls none of them"):
        pipe(task().train_step, recompute("spare"), grad(), apply())(TrainState.create(task()), batch)


def test_a_step_holds_less_at_its_peak():
    """What torch's allocator hands out during a step, to the byte: of every block the input is kept."""
    usual, less = (peak(512, adamw, *parts, grad(), apply()) for parts in ((), (recompute("0.*"),)))
    assert less < usual / 1.8
