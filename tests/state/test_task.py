"""A task pairs a module with functions, and refuses what is neither."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from torch import nn

from fnlight.pipe import Phase
from fnlight.state import Task


def train_step(model: nn.Module, batch: Any) -> Any:
    """A loss."""
    return model(batch).mean()


def test_a_task_holds_what_it_is_given_and_never_changes() -> None:
    """The very module and functions, and None for what is left out."""
    model = nn.Linear(1, 1)
    task = Task(model, train_step)
    assert task.model is model
    assert task.train_step is train_step
    assert (task.eval_step, task.predict_step, task.configure_optimizers) == (None, None, None)
    with pytest.raises(attrs.exceptions.FrozenInstanceError, match="can't set attribute"):
        task.model = nn.Linear(2, 2)  # pyright: ignore[reportAttributeAccessIssue]  # what is tested


def test_a_task_takes_phases_by_name() -> None:
    """Functions and `Phase`s may stand side by side."""
    assert list(Task(nn.Linear(1, 1), {"gen": train_step, "disc": Phase(train_step)}).train_step) == ["gen", "disc"]


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Task(nn.Linear, train_step), r"Task\(model=...\) must be an nn.Module, but got type; pass an instance of a module"),  # pyright: ignore[reportArgumentType]
    (lambda: Task(nn.Linear(1, 1), None), r"Task\(train_step=...\) must be a function, but got NoneType"),
    (lambda: Task(nn.Linear(1, 1), train_step, eval_step=3), r"Task\(eval_step=...\) must be a function, but got int"),  # pyright: ignore[reportArgumentType]
    (
        lambda: Task(nn.Linear(1, 1), train_step, configure_optimizers="adam"),
        r"Task\(configure_optimizers=...\) must be a function, but got str",
    ),  # pyright: ignore[reportArgumentType]
    (lambda: Task(nn.Linear(1, 1), {}), r"Task\(train_step=\{\}\) has no phases"),
    (lambda: Task(nn.Linear(1, 1), {"a/b": train_step}), "strings without a slash, but got the name 'a/b'"),
    (lambda: Task(nn.Linear(1, 1), {"gen": 3}), r"Task\(train_step=\{'gen': ...\}\) must be a function or a Phase, but got int"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_a_task_that_cannot_work_is_refused(make: Callable[[], Any], message: str) -> None:
    """What is wrong is said before any work, with what was expected and what came."""
    with pytest.raises(TypeError, match=message):
        make()
