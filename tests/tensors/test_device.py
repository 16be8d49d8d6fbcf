"""Devices: which device is chosen, how a module is moved to it, and which functions of a lazy device are called."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fnlight import FitConfig, TrainState, apply, evaluate, fit, grad, pipe, predict, run
from fnlight.compile import shadow
from fnlight.data import Source
from fnlight.errors import ConfigError
from fnlight.fit.fit import _placed
from fnlight.tensors import default_device, end_step_on, is_lazy, move, spread_on
from fnlight.tensors.device import module_of
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.laws.tasks import TASKS


def test_the_accelerator_is_the_default(monkeypatch):
    """Whatever kind torch names, also one that it learns of from others; without any it is the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mtia", 3))
    assert default_device() == torch.device("mtia")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_refused_in_one_sentence():
    """torch's own error may be a page long, or an AssertionError; ours comes before any work, and says what there is."""
    for make in (
        lambda name: TrainState.create(tiny_task(), device=name),
        lambda name: TrainState.create(tiny_task()).to(name),
        lambda name: fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_steps=1, device=name, progress=False)),
    ):
        for name in ("cuda", "mps"):
            with pytest.raises(ConfigError, match=f"^there is no device '{name}' here: [^\\n]{{10,150}}; give 'cpu', or leave it out$"):
                make(name)


def test_a_device_that_torch_knows_no_module_of_is_refused(monkeypatch):
    """The error names the device, and for XLA what to write."""

    def unknown(device):
        raise RuntimeError(f"no module for {device}")

    monkeypatch.setattr(torch, "get_device_module", unknown)
    with pytest.raises(ConfigError, match=r"torch has no module for the device 'xla:0', .*place=fl\.parallel\.xla\(\)"):
        module_of(torch.device("xla", 0))
    with pytest.raises(ConfigError, match=r"for the device 'mtia', so its random numbers cannot be seeded$"):
        module_of(torch.device("mtia"))
    assert (module_of(torch.device("cpu")), module_of(torch.device("meta"))) == (None, None)


def test_a_device_says_by_its_module_that_it_is_lazy(monkeypatch):
    """Functions that the module has are found; where there are none, nothing is called."""
    lazy = SimpleNamespace(end_step=print, spread=abs)
    monkeypatch.setattr(torch, "get_device_module", lambda device: lazy if device.type == "mtia" else torch.cuda)
    assert (is_lazy(torch.device("mtia")), end_step_on(torch.device("mtia")), spread_on(torch.device("mtia"))) == (True, print, abs)
    assert (is_lazy(torch.device("cuda")), end_step_on(torch.device("cuda"))(), spread_on(torch.device("cuda"))) == (False, None, None)


@pytest.fixture
def ends(monkeypatch):
    """The CPU as a lazy device: a list that grows each time it is told that a step has ended."""
    calls = []
    monkeypatch.setattr("fnlight.state.store.end_step_on", lambda device: lambda: calls.append(device.type))
    monkeypatch.setattr(shadow, "is_lazy", lambda device: True)
    return calls


@pytest.mark.parametrize("name", ["mlp with BatchNorm and dropout", "two optimizers", "a step by hand"])
def test_a_lazy_device_is_told_of_the_end_of_every_step(name, ends):
    """One optimizer, several, or a step by hand: once a step, however many batches it has; and once behind a copy of a state."""
    case = TASKS[name]
    task = case.make()
    step = task.train_step if case.kind == "whole" else pipe(task.train_step, grad(), apply())
    for state, _ in run(step, TrainState.create(task), case.batches(), donate=True):
        assert ends == ["cpu"] * state.progress.step
        if state.progress.step == 4:
            break
    state.copy()
    assert len(ends) == 5


def test_a_lazy_device_is_told_of_the_end_of_every_batch_of_an_evaluation(ends):
    """And of a prediction, before its output is handed out."""
    state = TrainState.create(tiny_task())
    evaluate(state, tiny_batches(num_batches=3))
    assert len(ends) == 3
    assert [len(ends) for _ in predict(state, tiny_batches(num_batches=2))] == [4, 5]


def test_a_lazy_device_compiles_by_itself(ends):
    """Asking for a graph besides is answered with a warning, and the run goes on without."""
    config = FitConfig(max_steps=3, compile="trace", device="cpu", progress=False)
    with pytest.warns(match="no graph at level 'trace': the device 'cpu' compiles steps itself; continuing without a graph"):
        fit(TrainState.create(tiny_task("convnet")), tiny_batches("convnet"), config)


def test_batches_are_spread_once_they_are_moved(monkeypatch):
    """Every tensor of a batch is handed to the device's `spread`, and nothing else of it is."""
    monkeypatch.setattr("fnlight.data.transfer.spread_on", lambda device: lambda tensor: tensor[None])
    source = Source([{"x": torch.ones(2), "n": (3, torch.zeros(()))}], device="meta")
    ((batch, _, _),) = source.epoch(seed=0, epoch=0)
    assert (batch["x"].shape, batch["x"].device.type, batch["n"][0], batch["n"][1].shape) == ((1, 2), "meta", 3, (1,))


@pytest.fixture
def replacing():
    """A device on which `Module.to` makes new parameters, as on XLA."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_tied_parameters_stay_tied_where_new_ones_are_made(replacing):
    """What was one parameter is one afterwards, and `move` says which."""
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    model, before = nn.Sequential(a, b), id(a.weight)
    new = move(model, torch.device("cpu"))
    assert id(a.weight) != before
    assert a.weight is b.weight is new[before]


@pytest.mark.parametrize("name", ["tied weights", "two optimizers", "frozen parts"])
def test_the_optimizer_follows_parameters_that_are_made_anew(name, replacing):
    """A state that was moved goes on bitwise as one that was not."""
    case = TASKS[name]
    task = case.make()
    step = pipe(task.train_step, grad(), apply())
    states = run(step, TrainState.create(task), case.batches())
    next(states)
    state = next(states)[0].copy()
    moved = state.to("cpu")
    held = {id(p) for optim in moved.store.optims.values() for group in optim.optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in moved.store.module.parameters()}
    batch = case.batches()[0]
    assert_trees_equal(step(moved, batch)[0], step(state, batch)[0])


@pytest.mark.parametrize(("options", "fused"), [({}, None), ({"fused": True}, True), ({"foreach": True}, None), ({"fused": False}, False)])
def test_kernels_are_chosen_where_a_state_goes(options, fused):
    """fnlight's choice is made anew on each device; what the user chose stays."""
    task = tiny_task("convnet")
    optimizers = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    state = TrainState.create(type(task)(task.model, task.train_step, configure_optimizers=optimizers))
    here = state.store.optim.optimizer.param_groups[0]["fused"]
    away = state.moved("meta")
    assert away.store.optim.optimizer.param_groups[0]["fused"] is fused
    assert here is (True if not options else fused)


def test_a_state_on_an_accelerator_stays_there(monkeypatch):
    """`device="auto"` takes a state off the CPU, and nothing off another device, whatever the accelerator is."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    state = TrainState.create(tiny_task("convnet"), device="meta")
    assert _placed(state, FitConfig(max_steps=1)) is state
