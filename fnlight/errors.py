"""Exceptions and warnings, in one module so that every package can raise them.

::

    FnlightError
    ├── SeamError(TypeError)                two functions of a pipe do not fit together
    ├── StepError(ValueError)               a user's step returned a value of the wrong kind
    │   └── NonFiniteError                  ... a loss that is NaN or infinite
    ├── ConfigError(ValueError)             an invalid or contradictory configuration
    │   └── MonitorError                    ... a monitored metric that is not recorded
    ├── OptimizerError(ValueError)          an optimizer that does not fit its model
    ├── LoaderError(ValueError)             data that cannot be trained or evaluated on
    ├── ParallelError(RuntimeError)         processes that differ, or cannot connect
    ├── Interrupted(RuntimeError)           an evaluation or a prediction that a signal ended
    ├── DonatedStateError(RuntimeError)     a read of tensors that a later step has overwritten
    ├── TaskCheckError(AssertionError)      a task that breaks one of the laws that `check_task` checks
    ├── LoaderCheckError(AssertionError)    a loader that breaks one of the laws that `check_loader` checks
    └── CheckpointError(ValueError)         files that cannot be written or read
        ├── BrokenCheckpointError           ... torn, altered or incomplete files
        ├── LockedError                     ... a run's directory that another run uses
        └── MismatchError                   ... files of another task: names and shapes are listed

Every message says what was expected, what was found, where, and what to do next. Warnings point to the line of the user's code.
Bugs of fnlight itself are ``AssertionError``.
"""

import inspect
import warnings
from types import FrameType, FunctionType
from typing import Any

_INNER = {"fnlight", "torch", "attr", "contextlib", ""}


class FnlightError(Exception):
    """The root: ``except FnlightError`` catches what fnlight raises on purpose."""


class SeamError(FnlightError, TypeError):
    """Two neighbours in a pipe do not fit together; the message says what to move where."""


class StepError(FnlightError, ValueError):
    """A user's step function returned a value of the wrong kind."""


class NonFiniteError(StepError):
    """A loss or a metric is NaN or infinite; the message names the step."""


class ConfigError(FnlightError, ValueError):
    """A configuration that is invalid or contradicts itself."""


class MonitorError(ConfigError):
    """A monitored metric that is not recorded; the message lists those that are."""


class OptimizerError(FnlightError, ValueError):
    """An optimizer that holds parameters of another model, or none, or that made a step too early."""


class LoaderError(FnlightError, ValueError):
    """A loader that is empty, exhausted or has no length where one is needed."""


class ParallelError(FnlightError, RuntimeError):
    """Processes that train together have different models, data or settings, or cannot connect."""


class Interrupted(FnlightError, RuntimeError):  # noqa: N818  # like KeyboardInterrupt, it is not an error
    """A signal ended an evaluation or a prediction early; ``args[0]`` is its name, such as ``"SIGTERM"``."""

    def __str__(self) -> str:
        return f"{self.args[0]} came before all batches were done; the partial result is discarded"


class DonatedStateError(FnlightError, RuntimeError):
    """The tensors of this state were overwritten by a later step."""


class TaskCheckError(FnlightError, AssertionError):
    """A task breaks a law of `fnlight.testing.check_task`; the message names the check, the place and what to do."""


class LoaderCheckError(FnlightError, AssertionError):
    """A loader breaks a law of `fnlight.testing.check_loader`; the message names the loader, the check and the way out."""


class CheckpointError(FnlightError, ValueError):
    """A checkpoint that cannot be written or read."""


class BrokenCheckpointError(CheckpointError):
    """Files that are torn, altered or incomplete."""


class LockedError(CheckpointError):
    """A run's directory is in use by another run; the message names its process."""


class MismatchError(CheckpointError):
    """A checkpoint or weights file of another model; names and shapes are listed."""


class MemoryWarning(UserWarning):
    """A combinator was added or removed since the state was saved: its memory is new or unused."""


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped, or loaded with differences."""


class LoaderWarning(UserWarning):
    """Data is read in a slow way."""


class OptimizerWarning(UserWarning):
    """A trainable parameter that no optimizer holds."""


class TaskWarning(UserWarning):
    """A task that trains, but probably not as intended."""


class FaultWarning(UserWarning):
    """A failure that does not end the run: a sink that fails, or a batch that did not fit into memory."""


class CompileWarning(UserWarning):
    """A part of a step that cannot be compiled; the message says which one and why."""


def in_step(error: BaseException, step: int) -> BaseException:
    """An error that ended a run, with a note that says in which step; Python would take a `StopIteration` for the end of the run itself.

    Args:
        error: What was raised.
        step: Completed steps.

    Returns:
        The same, or what is raised in its place.

    Example:
        >>> in_step(KeyError("x"), 6).__notes__
        ['This happened in step 7, after 6 steps were completed.']
    """
    if isinstance(error, StopIteration):
        return StepError(
            f"a function of the run raised StopIteration({error.value!r:.60}) in step {step + 1}; an iterator in it has no more items: give "
            "next() a default"
        )
    if isinstance(error, Exception) and not isinstance(error, FnlightError):  # these say themselves where they come from
        error.add_note(f"This happened in step {step + 1}, after {step} steps were completed.")
    return error


def check_type(what: str, value: Any, kind: Any, expected: str, advice: str = "") -> None:
    """Refuse an argument of the wrong type, before any work starts.

    Args:
        what: The argument, written as in a call.
        value: Its value.
        kind: The class that it must be an instance of, or several.
        expected: The same in words.
        advice: What to do next, if it is not obvious.

    Raises:
        TypeError: If it has the wrong type.

    Example:
        >>> check_type("save(path)", 3, str, "a path")
        Traceback (most recent call last):
        TypeError: save(path) must be a path, but got int: 3
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {expected}, but got {described(value)}" + (f"; {advice}" if advice else ""))


def described(value: Any) -> str:
    """A value in a few words: its type, and its text if that is short.

    Args:
        value: Anything.

    Returns:
        The text.

    Example:
        >>> described(3), described([1, 2]), described(int), described(None)
        ('int: 3', 'list', 'the class int', 'None')
    """
    if value is None:
        return "None"
    if isinstance(value, type | FunctionType):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    return type(value).__name__ + (f": {value!r:.80}" if isinstance(value, bool | int | float | str) else "")


def warn(text: str, kind: type[Warning]) -> None:
    """Warn at the line of the user's code that led here, at any depth of calls.

    Args:
        text: What was found, and what to do next.
        kind: One of the classes above.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("a metric is new", MemoryWarning)
        >>> caught[0].category.__name__
        'MemoryWarning'
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_inner(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, kind, stacklevel=level if frame is not None else 2)  # 2 is the caller


def _is_inner(frame: FrameType) -> bool:
    """Whether a frame belongs to fnlight or to a library that calls it; code generated by attrs has no module."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _INNER
