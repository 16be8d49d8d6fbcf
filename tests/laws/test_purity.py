"""Law 1: a step is a function of state and batch, and whoever calls fnlight finds everything as it was."""

import warnings
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fnlight import FitConfig, Loaders, TrainState, evaluate, fit, predict, pure, run, update
from fnlight.data import Item
from fnlight.errors import MemoryWarning
from fnlight.testing import assert_pure, assert_trees_equal, trees_equal
from fnlight.testing.compare import next_numbers, snapshot
from tests.laws.combinators import PAIRS, pipe_with
from tests.laws.tasks import TASKS


def stepped(step, state, loader, count):
    """The state some steps on."""
    return list(islice(run(step, state, loader), count))[-1][0]


@pytest.mark.parametrize(("name", "choice"), PAIRS)
def test_a_step_twice_from_one_state_gives_bitwise_the_same(name, choice, tmp_path):
    """With every combinator and on every task: the same result, from an input that stays as it was, and generators that stay too."""
    case = TASKS[name]
    step = pipe_with(choice, case.make(), tmp_path, case.batches(2))
    state = stepped(step, TrainState.create(case.make(), seed=3), case.batches(), 2)
    at, batches = state.progress, case.batches(1 if choice == "apply_in_backward" else 2)  # which takes one batch a step
    assert_pure(step, state, Item(tuple(batches), at.epoch, 3, last=True, samples=10))


@pytest.mark.parametrize("name", TASKS)
def test_another_seed_is_another_training(name):
    """All randomness comes from the seed: where a step draws, another seed gives another state."""
    case = TASKS[name]
    draws = name in ("mlp with BatchNorm and dropout", "transformer", "buffers only", "two optimizers", "a step by hand")
    found = [update(TrainState.create(case.make(), seed=seed), case.batches()[0])[0] for seed in (0, 1)]
    assert trees_equal([found[0].params, found[0].buffers], [found[1].params, found[1].buffers]) == (not draws)


def boundary(case, task, state, tmp_path):
    """Everything at fnlight's boundary, as functions of nothing."""
    x, y = (torch.cat(parts) for parts in zip(*case.batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    config = FitConfig(max_epochs=2, ema=0.5, dir=tmp_path / "run", progress=False)
    step = pipe_with("evaluate_every", task, tmp_path, case.batches())
    return {
        "update": lambda: update(state, case.batches()[0]),
        "pure": lambda: pure(step)(state, case.batches()[0]),
        "run": lambda: stepped(step, state, loader, 4),
        "fit": lambda: fit(state, Loaders(train=loader, val=case.batches()), config),
        "evaluate": lambda: evaluate(state, case.batches()),
        "predict": lambda: list(predict(state, case.batches())),
        "create": lambda: TrainState.create(task),
    }


@pytest.mark.filterwarnings("ignore:the model is in eval mode")
@pytest.mark.parametrize("function", ["update", "pure", "run", "fit", "evaluate", "predict", "create"])
@pytest.mark.parametrize("name", TASKS)
def test_the_caller_finds_everything_as_it_was(name, function, tmp_path):
    """State, module, modes, global generators, grad mode and default dtype are untouched, and calling again gives the same."""
    case = TASKS[name]
    task = case.make()
    state = TrainState.create(task, seed=5)
    state.store.module.eval()
    before, drawn = snapshot([state, task.model]), next_numbers()
    call = boundary(case, task, state, tmp_path)[function]
    call()
    assert_trees_equal(before, [state, task.model])
    assert next_numbers() == drawn
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (True, torch.float32)
    assert (state.store.module.training, task.model.training) == (False, True)
    assert all(p.grad is None for p in (*state.store.params, *task.model.parameters()))


def test_a_loop_of_ones_own_may_break_off_anywhere(tmp_path):
    """Leaving `run` by `break`, by an error in the loop, or by an error in the step puts the generators back."""
    case = TASKS["mlp with BatchNorm and dropout"]
    state, drawn = TrainState.create(case.make()), next_numbers()
    step = pipe_with("ema", case.make(), tmp_path, None)
    for _ in run(step, state, case.batches()):
        break
    assert next_numbers() == drawn
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stepped(step, state, [(torch.zeros(2, 9), torch.zeros(2).long())], 1)
    assert next_numbers() == drawn


def test_one_state_may_be_used_twice(tmp_path):
    """Two runs from one state do not see each other: neither through the state nor through a step that both use.

    Two that save into one directory at a time are refused, which is tested with the lock.
    """
    case = TASKS["mlp with BatchNorm and dropout"]
    task = case.make()
    state, step = TrainState.create(task), pipe_with("all of them", task, tmp_path, case.batches(), without="save")
    one, two = run(step, state, case.batches()), run(step, state, case.batches())
    a, b = [], []
    for (first, _), (second, _) in islice(zip(one, two, strict=True), 4):
        a.append(snapshot(first.params))
        b.append(snapshot(second.params))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryWarning)
        alone = stepped(step, state, case.batches(), 4)
    assert_trees_equal(a, b)
    assert_trees_equal(a[-1], alone.params)
