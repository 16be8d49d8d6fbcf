"""Laws of schedule-free optimizers: evaluation, use and export take the averaged weights, and training does not change."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fnlight as fl
from fnlight.optim import optimizer_class, weights_to_use
from fnlight.testing import assert_trees_equal, trees_equal

NAMES = ["schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree", "schedulefree.RAdamScheduleFree"]
NAMES += ["schedulefree.AdamWScheduleFreeReference", "pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer.SPlus"]
BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(10)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer")


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean squared distance of the outputs from 1."""
    return (model(batch) - 1).square().mean()


def measured(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """The loss as a metric."""
    return {"loss": loss(model, batch)}


def net() -> nn.Module:
    """A model, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def task(name: str) -> fl.Task:
    """A task with that optimizer."""
    configure = lambda model: fl.optimizer(name, model, lr=0.05)
    return fl.Task(net(), loss, measured, lambda model, batch: model(batch), configure_optimizers=configure)


def trained(name: str, steps: int = 8) -> fl.TrainState:
    """A state after some steps."""
    state, step = fl.TrainState.create(task(name)), fl.pipe(loss, fl.grad(), fl.apply())
    for batch in BATCHES[:steps]:
        state, _ = step(state, batch)
    return state


def plain_loop(name: str, steps: int = 8) -> tuple[nn.Module, Any]:
    """A manual loop, as the package documents it."""
    model = net()
    optimizer = optimizer_class(name)(model.parameters(), lr=0.05)
    optimizer.train()
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_use_take_the_weights_of_the_eval_mode(name: str) -> None:
    """`evaluate`, `predict` and `module` use the weights of a manual loop after optimizer.eval(), bit-identical; `params` are the trained ones."""
    state = trained(name)
    model, optimizer = plain_loop(name)
    assert_trees_equal(dict(state.params), {n: p.detach().clone() for n, p in model.named_parameters()})
    optimizer.eval()
    averaged = {n: p.detach() for n, p in model.named_parameters()}
    assert_trees_equal(weights_to_use([state.live.optim], state.live.module), averaged)
    assert_trees_equal(dict(state.module().named_parameters()), averaged)
    assert not trees_equal(dict(state.params), averaged)
    with torch.no_grad():
        assert fl.evaluate(state, BATCHES[8:9])["loss"] == loss(model, BATCHES[8]).item()
        for donate in (False, True):
            (out,) = fl.predict(state, BATCHES[8:9], donate=donate)
            assert torch.equal(out, model(BATCHES[8]))


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_and_checkpoints_do_not_change_the_training(name: str, tmp_path: Path) -> None:
    """A run with evaluation and saving after every step is bit-identical to a run without."""
    config = fl.FitConfig(max_steps=8, eval_every=fl.steps(1), save_every=fl.steps(1), dir=tmp_path, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.errors.TaskWarning)
        watched = fl.fit(fl.TrainState.create(task(name)), fl.Loaders(train=BATCHES, val=BATCHES[:2]), config)
    alone = fl.fit(fl.TrainState.create(task(name)), BATCHES, fl.FitConfig(max_steps=8, progress=False))
    assert_trees_equal(dict(watched.params), dict(alone.params))
    assert len(watched.history) == 8


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("SPlus")])  # its matrices are loaded in another memory order
def test_a_checkpoint_has_the_averaged_weights_and_resumes_from_the_trained_ones(name: str, tmp_path: Path) -> None:
    """Any safetensors reader gets the averaged weights; the resumed run is bit-identical."""
    state = trained(name, 6)
    path = fl.save(state, tmp_path / "a")
    assert_trees_equal(load_file(f"{path}/model.safetensors"), weights_to_use([state.live.optim], state.live.module))
    loaded = fl.load(path, task(name))
    assert_trees_equal(dict(loaded.params), dict(state.params))
    assert_trees_equal({k: dict(v) for k, v in loaded.opt_state.items()}, {k: dict(v) for k, v in state.opt_state.items()})
    step = fl.pipe(loss, fl.grad(), fl.apply())
    for batch in BATCHES[6:]:
        (state, _), (loaded, _) = step(state, batch), step(loaded, batch)
    assert_trees_equal(dict(loaded.params), dict(state.params))


def test_another_optimizer_continues_from_the_averaged_weights(tmp_path: Path) -> None:
    """With another optimizer the run continues from the weights in the file, and a warning says that the optimizer state starts empty."""
    state = trained("schedulefree.AdamWScheduleFree")
    path = fl.save(state, tmp_path / "a")
    with pytest.warns(fl.errors.CheckpointWarning, match="optimizer changed"):
        other = fl.restore(path, fl.TrainState.create(task("sgd")), allow=("optimizer",))
    assert_trees_equal(dict(other.params), weights_to_use([state.live.optim], state.live.module))
