"""A copy of a model has all that the model has: hooks, attributes, shared memory; what cannot be copied is named."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnlight.checkpoint import load, restore, save
from fnlight.state import Task, TrainState, copied
from fnlight.step import update


def train_step(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss."""
    return model(batch).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def copies(model: nn.Module, folder: Path) -> dict[str, nn.Module]:
    """The model of every way to get a state or a module of a task."""
    state = TrainState.create(Task(model, train_step, configure_optimizers=sgd))
    path = save(state, folder / "state")
    found = {"create": state, "copy": state.copy(), "load": load(path, state.task), "restore": restore(path, like=state)}
    return {**{name: each.store.module for name, each in found.items()}, "module": state.module(), "copied": copied(model)}


class Masked(nn.Module):
    """A hook that is a method, one that is a function, and an attribute, all of them of parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(2, 2)
        self.factor = 0.0
        self.layer.weight.register_hook(self.masked)
        self.layer.bias.register_post_accumulate_grad_hook(_doubled)
        self.layer.bias._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]

    def masked(self, grad: Tensor) -> Tensor:
        """The gradient times what the module says."""
        return grad * self.factor

    def forward(self, x: Tensor) -> Tensor:
        """A layer."""
        return self.layer(x)


def _doubled(p: Tensor) -> None:
    assert p.grad is not None
    p.grad *= 2


def test_every_copy_has_the_hooks_and_the_attributes_of_parameters(tmp_path: Path) -> None:
    """Also after loading; a hook that is a method is a method of the copy."""
    model = Masked()
    for name, twin in copies(model, tmp_path).items():
        assert isinstance(twin, Masked), name
        assert vars(twin.layer.bias) == {"_no_weight_decay": True}, name
        assert twin is not model, name
        twin.factor = 3.0
        twin(torch.ones(1, 2)).sum().backward()
        assert [p.grad.unique().item() for p in twin.layer.parameters() if p.grad is not None] == [3.0, 2.0], name


def test_parameters_that_share_memory_do_so_in_every_copy(tmp_path: Path) -> None:
    """Without being the same Parameter, whole or in part; what they share is not that of the model."""
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)])
    first, second, part = model.parameters()
    second.data, part.data = first.data, first.data[1:]
    for name, twin in copies(model, tmp_path).items():
        a, b, c = twin.parameters()
        a.data.fill_(7.0)
        assert (b.unique().item(), c.unique().item(), c.shape) == (7.0, 7.0, (1, 2)), name
        assert 7.0 not in first, name


class Keeping(nn.Module):
    """A model that keeps the result of its last forward, also in a list."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(2, 2)
        self.last: Tensor | None = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """A layer."""
        out = self.layer(x)
        self.last, self.all = out, [out * 2]
        return out


@pytest.mark.parametrize("model", [Keeping(), nn.utils.spectral_norm(nn.Linear(2, 2))], ids=["attribute", "spectral_norm"])
def test_a_model_that_keeps_what_it_computed_is_copied_after_a_step(model: nn.Module, tmp_path: Path) -> None:
    """The values come along, their graph does not."""
    state = TrainState.create(Task(model, train_step, configure_optimizers=sgd))
    for _ in range(2):
        state, _ = update(state, torch.ones(1, 2))
    module = copied(state.copy().store.module)
    if isinstance(module, Keeping):
        assert module.last is not None
        assert not module.last.requires_grad
        assert torch.equal(module.all[0], module.last * 2)
    assert torch.isfinite(module(torch.ones(1, 2))).all()


UNCOPYABLE: list[tuple[str, Callable[[], Any], str]] = [
    ("lock", threading.Lock, r"its attribute 0.lock, of type lock: cannot pickle '_thread.lock' object"),
    ("stream", lambda: (i for i in range(3)), "its attribute 0.stream, of type generator"),
    ("table", lambda: {"a": [1, threading.Lock()]}, r"its attribute 0.table\['a'\]\[1\], of type lock"),
]


@pytest.mark.parametrize("name, make, message", UNCOPYABLE, ids=[case[0] for case in UNCOPYABLE])
def test_what_cannot_be_copied_is_named(name: str, make: Callable[[], Any], message: str) -> None:
    """The error has the path of the attribute, also within containers, and says what to do."""
    model = nn.Sequential(nn.Linear(2, 2))
    setattr(model[0], name, make())
    model[0].above = [model]  # a way back to the whole model is not what is wrong  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=message + ".*make this object where it is used"):
        TrainState.create(Task(model, train_step, configure_optimizers=sgd))


def test_an_open_file_is_named(tmp_path: Path) -> None:
    """As a lock is."""
    model = nn.Sequential(nn.Linear(2, 2))
    with (tmp_path / "log").open("w") as file:
        model[0].log = file  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"its attribute 0.log, of type TextIOWrapper"):
            TrainState.create(Task(model, train_step, configure_optimizers=sgd))


class Saved(nn.Linear):
    """A layer that saves its generator."""

    def get_extra_state(self) -> Tensor:
        """The place of the generator."""
        return vars(self)["noise"].get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go there."""
        vars(self)["noise"].set_state(state)


@pytest.mark.parametrize("generator", [torch.Generator(), random.Random(0)], ids=["torch", "python"])
def test_a_generator_of_the_model_is_refused_unless_it_is_saved(generator: Any) -> None:
    """A resumed run would draw other numbers; a module that saves it in its extra state may have one."""
    model = nn.Sequential(nn.Linear(2, 2))
    vars(model[0])["noise"] = generator
    with pytest.raises(TypeError, match=r"a random generator of its own, 0.noise \((Generator|Random)\), which no checkpoint holds"):
        TrainState.create(Task(model, train_step, configure_optimizers=sgd))
    model[0] = Saved(2, 2)
    vars(model[0])["noise"] = generator
    TrainState.create(Task(model, train_step, configure_optimizers=sgd))
