"""Laws of schedule-free optimizers: what is evaluated, used and kept are the averaged weights, and training never notices."""

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
    """How far the outputs are from 1."""
    return (model(batch) - 1).square().mean()


def measured(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """The loss as a metric."""
    return {"loss": loss(model, batch)}


def net() -> nn.Module:
    """A model, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def task(name: str) -> fl.Task:
    """A task that trains with that optimizer."""
    configure = lambda model: fl.optimizer(name, model, lr=0.05)
    return fl.Task(net(), loss, measured, lambda model, batch: model(batch), configure_optimizers=configure)


def trained(name: str, steps: int = 8) -> fl.TrainState:
    """A state after some steps."""
    state, step = fl.TrainState.create(task(name)), fl.pipe(loss, fl.grad(), fl.apply())
    for batch in BATCHES[:steps]:
        state, _ = step(state, batch)
    return state


def plain_loop(name: str, steps: int = 8) -> tuple[nn.Module, Any]:
    """A loop by hand, as the package wants it."""
    model = net()
    optimizer = optimizer_class(name)(model.parameters(), lr=0.05)
    optimizer.train()
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_what_is_evaluated_and_used_are_the_weights_of_the_mode_eval_bitwise(name: str) -> None:
    """`evaluate`, `predict` and `module` use what a loop by hand has after optimizer.eval(); `params` are what is trained."""
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
def test_training_never_notices_an_evaluation_or_a_checkpoint(name: str, tmp_path: Path) -> None:
    """A run that is evaluated and saved after every step ends in the bits of one that is neither."""
    config = fl.FitConfig(max_steps=8, eval_every=fl.steps(1), save_every=fl.steps(1), dir=tmp_path, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.errors.TaskWarning)
        watched = fl.fit(fl.TrainState.create(task(name)), fl.Loaders(train=BATCHES, val=BATCHES[:2]), config)
    alone = fl.fit(fl.TrainState.create(task(name)), BATCHES, fl.FitConfig(max_steps=8, progress=False))
    assert_trees_equal(dict(watched.params), dict(alone.params))
    assert len(watched.history) == 8


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("SPlus")])  # whose matrices come back in another order
def test_a_checkpoint_holds_the_averaged_weights_and_goes_on_from_the_trained_ones_bitwise(name: str, tmp_path: Path) -> None:
    """Any safetensors reader finds the weights to use; a state that is loaded trains on as if nothing had happened."""
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


def test_another_optimizer_goes_on_from_the_averaged_weights(tmp_path: Path) -> None:
    """Who changes the optimizer gets the weights that are in the file, with a warning that its memory starts afresh."""
    state = trained("schedulefree.AdamWScheduleFree")
    path = fl.save(state, tmp_path / "a")
    with pytest.warns(fl.errors.CheckpointWarning, match="optimizer changed"):
        other = fl.restore(path, fl.TrainState.create(task("sgd")), allow=("optimizer",))
    assert_trees_equal(dict(other.params), weights_to_use([state.live.optim], state.live.module))
