"""Import the user's code for a command, as in ``--task package.module:name``: only the named modules are imported."""

import os
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import attrs

from fnlight.data import Loaders
from fnlight.errors import ConfigError, FnlightError
from fnlight.fit import FitConfig
from fnlight.pipe import Pipe
from fnlight.state import Task


@attrs.frozen(eq=False)
class Given:
    """The objects from the user's code.

    Args:
        task: The task.
        loaders: The loaders; None if there are none.
        config: The configuration; None if there is none.
        step: A pipe of the user's own; None if there is none.
        names: What else the named modules hold, by name.

    Example:
        >>> Given().task is None
        True
    """

    task: Task | None = None
    loaders: Loaders | None = None
    config: FitConfig | None = None
    step: Pipe | None = None
    names: Mapping[str, Any] = attrs.field(factory=dict)


def given(*texts: str | None) -> Given:
    """Import the named objects and recognize them: a task, loaders, a configuration, a pipe, or a tuple of them.

    Args:
        *texts: Such as ``"train:task"``; a function is called without arguments. None is left out.

    Returns:
        What was found.

    Raises:
        ConfigError: If there is no such name, it fails, or it gives something else.

    Example:
        >>> given("fnlight.testing:tiny_task").task.train_step.__name__
        '_train_step'
    """
    found: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for text in texts:
        if text is None:
            continue
        value = _resolved(text)
        names |= vars(sys.modules[text.partition(":")[0]])
        several = type(value) in (tuple, list) and any(map(_is_ours, value))
        for each in value if several else (value,):
            kind = _kind(each, text)
            found[kind] = each if _is_ours(each) else Loaders(train=each)
    return Given(**found, names=names)


def _resolved(text: str) -> Any:
    module, colon, path = text.partition(":")
    if not (module and colon and path):
        raise ConfigError(f"{text!r} is not of the form module:name; write, for example, train:task")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        value: Any = pkgutil.resolve_name(text)
        return value() if callable(value) and not isinstance(value, Task | Pipe) else value
    except FnlightError:
        raise
    except Exception as error:
        raise ConfigError(f"{text} fails: {type(error).__name__}: {error}{_where(error)}") from error


def _where(error: Exception) -> str:
    """The last place in the user's own code."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "importlib" not in f.filename and f.filename not in (__file__, pkgutil.__file__)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _is_ours(value: Any) -> bool:
    return isinstance(value, Task | Loaders | FitConfig | Pipe)


def _kind(value: Any, text: str) -> str:
    for kind, name in ((Task, "task"), (FitConfig, "config"), (Pipe, "step"), (Loaders, "loaders")):
        if isinstance(value, kind):
            return name
    if value is None or isinstance(value, str | int | float | dict):
        raise ConfigError(
            f"{text} is or returns {type(value).__name__}, but must be a Task, Loaders, a FitConfig, a pipe, or a tuple of them"
        )
    return "loaders"
