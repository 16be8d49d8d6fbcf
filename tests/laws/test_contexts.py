"""Law 11: inside a context of the caller, a function does what it does outside of it, or refuses in one sentence."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch

import fnlight as fl
from fnlight.errors import ConfigError, StepError
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task


@contextlib.contextmanager
def changed(get: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A global setting of torch's."""
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "default device meta": lambda: changed(lambda: None, torch.set_default_device, "meta"),
    "within a device": lambda: torch.device("meta"),
    "float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "float16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "deterministic": lambda: changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, value=True),
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
}
BATCHES = tiny_batches()


def fitted(state: fl.TrainState) -> fl.TrainState:
    """Two steps."""
    return fl.fit(state, BATCHES, fl.FitConfig(max_steps=2, device="cpu", progress=False))


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_changes_nothing(name: str, tmp_path: Any) -> None:
    """`create`, `fit`, `evaluate`, `save`, `load`, `restore` and `update` give the same within it as outside."""
    task = tiny_task()
    state = fitted(fl.TrainState.create(task))
    numbers, after = fl.evaluate(state, BATCHES), fl.update(state, BATCHES[0])[0]
    with CONTEXTS[name]():
        again = fitted(fl.TrainState.create(task))
        assert fl.evaluate(state, BATCHES) == numbers
        path = fl.save(state, tmp_path / "a")
        read = [fl.load(path, task), fl.restore(path, state)]
        problems, step = fl.verify(path), fl.update(state, BATCHES[0])[0]
    assert problems == []
    for found, expected in ((again, state), (read[0], state), (read[1], state), (step, after)):
        assert_trees_equal(dict(found.params), dict(expected.params))
        assert_trees_equal({k: dict(v) for k, v in found.opt_state.items()}, {k: dict(v) for k, v in expected.opt_state.items()})


REFUSED: list[tuple[Callable[[], Any], Callable[[fl.TrainState], Any], str]] = [
    (torch.inference_mode, fitted, r"fit\(...\) is called within torch\.inference_mode\(\), .*; call it outside"),
    (torch.inference_mode, lambda state: fl.TrainState.create(state.task), r"a state is made within torch\.inference_mode\(\)"),
    (torch.no_grad, fitted, r"fit\(...\) trains, but is called within torch\.no_grad\(\), .*; call it outside"),
    (lambda: torch.autocast("cpu", torch.bfloat16), fitted, r"fit\(...\) is called within torch\.autocast\(\), .*precision"),
    (
        lambda: torch.autocast("cpu", torch.bfloat16), lambda state: fl.evaluate(state, BATCHES),
        r"evaluate\(...\) is called within torch\.autocast\(\), .* call it outside",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("context", "call", "says"), REFUSED, ids=[says[:60] for _, _, says in REFUSED])
def test_a_context_that_would_change_numbers_is_refused(context: Any, call: Any, says: str) -> None:
    """In one sentence that says what to do."""
    state = fl.TrainState.create(tiny_task())
    with context(), pytest.raises(ConfigError, match=says):
        call(state)


def test_an_evaluation_within_inference_mode_is_that_outside() -> None:
    """It needs no gradients."""
    state = fl.TrainState.create(tiny_task())
    expected = fl.evaluate(state, BATCHES)
    with torch.inference_mode():
        assert fl.evaluate(state, BATCHES) == expected


@pytest.mark.parametrize("where", ["train_step", "eval_step"])
def test_stop_iteration_of_a_user_is_reported(where: str) -> None:
    """It neither ends the run nor becomes an error of Python's about generators."""
    task = tiny_task()

    def empty(model: Any, batch: Any) -> Any:
        return next(iter(()))

    task = attrs.evolve(task, **{where: empty})
    config = fl.FitConfig(max_steps=2, sanity_batches=0, eval_every=fl.steps(1), device="cpu", progress=False)
    with pytest.raises(
        StepError, match=r"raised StopIteration\(None\) in step 1; an iterator in it has no more items: give next\(\) a default"
    ):
        fl.fit(fl.TrainState.create(task), fl.Loaders(train=BATCHES, val=BATCHES), config)


@pytest.mark.parametrize(("where", "step"), [("train_step", 3), ("eval_step", 4), ("rule", 3)])
def test_an_error_of_a_user_says_in_which_step_it_happened(where: str, step: int) -> None:
    """Its note names the step that was under way."""
    task, calls = tiny_task(), []

    def failing(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) > (2 if where == "train_step" else len(BATCHES)):
            raise KeyError("mine")
        return getattr(tiny_task(), where)(model, batch)

    def rule(state: fl.TrainState) -> str | None:
        if state.progress.step == 3:
            raise KeyError("mine")
        return None

    if where != "rule":
        task = attrs.evolve(task, **{where: failing})
    config = fl.FitConfig(
        max_steps=9, sanity_batches=0, eval_every=fl.steps(2), stop=rule if where == "rule" else None, device="cpu", progress=False
    )
    with pytest.raises(KeyError, match="mine") as caught:
        fl.fit(fl.TrainState.create(task), fl.Loaders(train=BATCHES, val=BATCHES), config)
    assert f"This happened in step {step}, after {step - 1} steps were completed." in caught.value.__notes__
