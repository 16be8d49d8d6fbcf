"""Law 10: a value that makes no sense is refused by the very function it is given to, which says what it takes and what it got."""

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fnlight as fl


class Nonsense:
    """What no argument can be: it cannot be called, counted, compared, iterated over or opened."""


LATER = {
    ("concat", "loaders"),
    ("zip_shortest", "loaders"),
    ("zip_longest", "loaders"),
    ("sharded", "loader"),
    ("evaluate_every", "loader"),
}
"""Loaders that are only joined, or kept: whoever reads them, as `fit` does before its first step, refuses them."""

FREE = {
    ("fold_in", "key"), ("fold_in", "parts"), ("seed_generators", "key"), ("seed_generators", "device"), ("isolated", "device"),
    ("evaluate_every", "limit"), ("at_end", "tick"), ("continuous", "tick"), ("update", "batch"), ("optimizer", "params"),
    ("parallel.fsdp", "mesh"),
}  # fmt: skip
"""Arguments of functions of the loop's own, which it calls once a step, and those that others check: `limit` the loader, `params`
torch, `mesh` the ranks that have joined."""

DEVICES = {"device"}
"""Arguments that torch takes, and whose error is torch's own."""


def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """The mean of the outputs."""
    return model(batch).mean()


def state() -> fl.TrainState:
    """A state at its beginning, of a task that can do everything."""
    task = fl.Task(
        nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)),
        train_step,
        eval_step=lambda model, batch: {"loss": model(batch).mean()},
        predict_step=lambda model, batch: model(batch),
        configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )
    return fl.TrainState.create(task)


def sound(fn: str, name: str, folder: Path) -> Any:
    """A sound value for an argument that has no default, by its name; most are numbers."""
    here = state()
    known = {
        "state": here, "like": here, "task": here.task, "loaders": [torch.ones(2, 1)], "loader": [torch.ones(2, 1)], "batch": torch.ones(2, 1),
        "config": fl.FitConfig(max_steps=1, progress=False), "model": here.task.model, "module": here.task.model, "fn": train_step,
        "step": fl.update, "loss_fn": train_step, "path": folder / "saved", "paths": [folder / "saved"], "dir": folder / "run", "monitor": "val/loss",
        "dtype": torch.bfloat16, "schedules": [fl.constant(1.0)], "boundaries": [], "outputs": [], "lengths": [1], "make": lambda optimizer: None,
        "init": lambda store: {}, "patterns": ["weight"], "also": [], "weights": {"a": 1.0}, "epochs": {"weight": 1}, "then": fl.constant(1.0),
        "sinks": [print], "steps": range(1, 3), "every": fl.steps(2), "rules": [fl.max_steps(1)], "decay": 0.5, "rate": 0.5, "layers": ["0", "1"], "sigma": 5.0, "name": "adamw", "params": [],
        "final": 0.1, "total": 9, "warmup": 2,
    }  # fmt: skip
    return 2 if (fn, name) == ("wsd", "decay") else known.get(name, 2)


PARALLEL = ("ddp", "fsdp", "local_sgd", "diloco", "exact_ranks", "sync_batchnorm")


def public() -> dict[str, Any]:
    """The functions of the top level, and those that people call in `fnlight.parallel`."""
    return {name: getattr(fl, name) for name in fl.__all__} | {f"parallel.{name}": getattr(fl.parallel, name) for name in PARALLEL}


def cases() -> list[tuple[str, str]]:
    """Every public function with each of its arguments that is more than a switch."""
    found = []
    for name, fn in public().items():
        for arg in inspect.signature(fn).parameters.values() if isinstance(fn, types.FunctionType) and name != "main" else ():
            switch = arg.annotation in (bool, "bool") or arg.kind is arg.VAR_KEYWORD or arg.name in DEVICES
            if not switch and (name, arg.name) not in FREE | LATER:
                found.append((name, arg.name))
    return found


def called(name: str, bad: dict[str, Any], folder: Path) -> Any:
    """Call a public function with some arguments, and with sound ones where it needs more; an iterator is asked once."""
    fn, given, named = public()[name], [], {}
    for p in inspect.signature(fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            given += (
                [bad[p.name]]
                if p.name in bad
                else sound(name, p.name, folder)
                if p.name in ("sinks", "layers", "patterns", "rules")
                else []
            )
        elif p.name in bad or (p.default is p.empty and p.kind is not p.VAR_KEYWORD):
            value = bad[p.name] if p.name in bad else sound(name, p.name, folder)
            if p.default is p.empty and p.kind is not p.KEYWORD_ONLY:
                given.append(value)
            else:
                named[p.name] = value
    found = fn(*given, **named)
    return next(found) if isinstance(found, Iterator) else found


@pytest.mark.parametrize(("name", "arg"), cases())
def test_nonsense_is_refused_where_it_is_given(name: str, arg: str, tmp_path: Path) -> None:
    """The error comes from the call, with what was expected and what was got."""
    if name in ("load", "load_weights", "restore", "average_checkpoints", "verify"):
        fl.save(state(), tmp_path / "saved")
    with pytest.raises(
        (TypeError, ValueError, fl.errors.FnlightError), match=r"(?s)(must|takes|needs|there is|starts from|joins) .*Nonsense"
    ):
        called(name, {arg: Nonsense()}, tmp_path)


@pytest.mark.parametrize(("name", "arg"), sorted(LATER))
def test_loaders_that_are_none_are_refused_before_the_first_step(name: str, arg: str) -> None:
    """Functions that join loaders read none; `fit` and `run` look at them before they train."""
    if name == "evaluate_every":
        step = fl.pipe(train_step, fl.grad(), fl.apply(), fl.evaluate_every(Nonsense(), every=fl.steps(1)))
        with pytest.raises(TypeError, match="a loader must be an iterable of batches, such as a DataLoader or a list, but got Nonsense"):
            next(fl.run(step, state(), [torch.ones(2, 1)]))
    else:
        joined = getattr(fl, name)(Nonsense())
        with pytest.raises(TypeError, match="must be an iterable of batches, such as a DataLoader or a list, but got Nonsense"):
            fl.fit(state(), joined, fl.FitConfig(max_steps=1, progress=False))


def test_a_number_of_steps_is_no_trigger() -> None:
    """The likeliest mistake of all gets the answer, not an error in the first step."""
    with pytest.raises(TypeError, match=r"evaluate_every\(every=...\) must be a trigger such as fl.steps\(100\).*but got int: 100"):
        fl.evaluate_every([torch.ones(2, 1)], every=100)  # pyright: ignore[reportArgumentType]  # which is the point
    with pytest.raises(TypeError, match=r"checkpoint_every\(every=...\) must be a trigger.*but got int: 0"):
        fl.checkpoint_every("run", every=0)  # pyright: ignore[reportArgumentType]  # which is the point


def test_a_placement_is_called() -> None:
    """A placement that was not made, a function rather than its value, is told from one that was."""
    with pytest.raises(TypeError, match=r"place=...\) must be a placement such as fl.parallel.ddp\(\), but got the function ddp"):
        fl.TrainState.create(state().task, place=fl.parallel.ddp)


@pytest.mark.parametrize("given", [state().task, nn.Linear(1, 1), None, "model.pt"])
def test_what_is_no_state_yet_is_told_how_to_become_one(given: Any) -> None:
    """A task, a model, a path and nothing at all are what people try first."""
    with pytest.raises(
        TypeError, match=r"fit\(state, ...\) must be a TrainState, such as fl.TrainState.create\(task\) or fl.load\(path, task\) gives"
    ):
        fl.fit(given, [torch.ones(2, 1)], fl.FitConfig(max_steps=1, progress=False))
