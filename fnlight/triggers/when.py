"""Triggers such as ``steps(50) | at_end``: pure functions of the progress before and after a tick.

A trigger has no counters, so in a resumed run it fires at the same steps as in the uninterrupted one. Triggers that count time read
``progress.seconds``, which comes from the clock given to `run`. No trigger reads a clock itself, so all processes that train together
decide the same. Only `continuous` depends on the speed of the disk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import attrs

from fnlight.errors import ConfigError, check_type
from fnlight.state import Progress
from fnlight.triggers.form import Form


class Tick(NamedTuple):
    """The argument of a trigger.

    Args:
        before: The progress before the step.
        after: The progress after it.
        end: True once, after the last step of a run.
        idle: False during a save in the background; only `checkpoint_every` sets it.

    Example:
        >>> Tick(Progress(step=1), Progress(step=2)).after.step
        2
    """

    before: Progress
    after: Progress
    end: bool = False
    idle: bool = True


@attrs.frozen(repr=False)
class Trigger:
    """A `When` that joins with ``|``, ``&`` and ``~``, also with any function of a tick, and is compared by value.

    Args:
        form: Its structure and source text.
        fn: Maps a `Tick` to a bool.
        earliest: Steps and epochs before which it cannot fire; 0 if unknown.

    Example:
        >>> steps(50) | at_end
        steps(50) | at_end
        >>> steps(50) | at_end == steps(50) | at_end
        True
    """

    form: Form
    fn: Callable[[Tick], bool] = attrs.field(eq=False)
    earliest: tuple[int, int] = attrs.field(default=(0, 0), eq=False)

    def __call__(self, tick: Tick) -> bool:
        """Whether it fires."""
        return self.fn(tick)

    def __or__(self, other: Any) -> "Trigger":
        a, b = self, trigger(other)
        earliest = (min(a.earliest[0], b.earliest[0]), min(a.earliest[1], b.earliest[1]))
        return Trigger(a.form | b.form, lambda tick: a.fn(tick) or b.fn(tick), earliest)

    def __ror__(self, other: Any) -> "Trigger":
        return trigger(other) | self

    def __and__(self, other: Any) -> "Trigger":
        a, b = self, trigger(other)
        earliest = (max(a.earliest[0], b.earliest[0]), max(a.earliest[1], b.earliest[1]))
        return Trigger(a.form & b.form, lambda tick: a.fn(tick) and b.fn(tick), earliest)

    def __rand__(self, other: Any) -> "Trigger":
        return trigger(other) & self

    def __invert__(self) -> "Trigger":
        return Trigger(~self.form, lambda tick: not self.fn(tick))

    def __repr__(self) -> str:
        return self.form.text


def trigger(given: Any) -> Trigger:
    """Return a trigger unchanged; turn a function of a tick into one.

    Args:
        given: Either.

    Returns:
        A trigger.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> trigger(max)
        max
    """
    if isinstance(given, Trigger):
        return given
    if not callable(given):
        raise ConfigError(
            f"a trigger joins with another one or with a function of a tick, but got {given!r}; write e.g. steps(50) | epochs(1)"
        )
    return Trigger(Form.of(given), given)  # pyright: ignore[reportArgumentType]  # callable() knows no more


def condition(when: Callable[[Tick], bool], what: str = "a trigger") -> Callable[[Tick], bool]:
    """The bare function of a trigger: one call less at every step.

    Args:
        when: A trigger, or any function of a tick.
        what: The name of the argument, for errors.

    Returns:
        A function of a tick that gives the same.

    Raises:
        TypeError: If it is neither, such as a number of steps.

    Example:
        >>> condition(at_end)(Tick(Progress(), Progress(), end=True))
        True
    """
    given: Any = when
    advice = f"write fl.steps({given})" if type(given) is int else ""
    check_type(what, given, Callable, "a trigger such as fl.steps(100) or fl.epochs(1), or a function of a tick", advice=advice)
    return when.fn if isinstance(when, Trigger) else when


def steps(n: int) -> Trigger:
    """Fire every n completed steps; if a tick completes several steps, at the first tick that reaches the number.

    Args:
        n: At least 1.

    Returns:
        A trigger.

    Raises:
        ConfigError: If n is not a whole number of at least 1.

    Example:
        >>> [k for k in range(1, 7) if steps(3)(Tick(Progress(step=k - 1), Progress(step=k)))]
        [3, 6]
    """
    _whole("steps", n)
    return Trigger(Form("steps", (n,), f"steps({n})"), lambda tick: tick.after.step // n > tick.before.step // n, (n, 0))


def epochs(n: int) -> Trigger:
    """Fire at the end of every n-th epoch.

    Args:
        n: At least 1.

    Returns:
        A trigger.

    Raises:
        ConfigError: If n is not a whole number of at least 1.

    Example:
        >>> epochs(1)(Tick(Progress(step=9, epoch=0, batch=9), Progress(step=10, epoch=1, batch=0)))
        True
    """
    _whole("epochs", n)
    return Trigger(
        Form("epochs", (n,), f"epochs({n})"), lambda tick: tick.after.epoch != tick.before.epoch and tick.after.epoch % n == 0, (0, n)
    )


def seconds(s: float) -> Trigger:
    """Fire each time another s seconds of training have passed.

    Args:
        s: Above 0; counted on ``progress.seconds``, so a resumed run continues counting.

    Returns:
        A trigger.

    Raises:
        ConfigError: If s is not above 0.

    Example:
        >>> seconds(10)(Tick(Progress(step=1, seconds=9.5), Progress(step=2, seconds=10.5)))
        True
    """
    return _timed("seconds", s, 1.0)


def minutes(m: float) -> Trigger:
    """Fire each time another m minutes of training have passed.

    Args:
        m: Above 0; counted on ``progress.seconds``, so a resumed run continues counting.

    Returns:
        A trigger.

    Raises:
        ConfigError: If m is not above 0.

    Example:
        >>> minutes(1)(Tick(Progress(step=1, seconds=59.0), Progress(step=2, seconds=61.0)))
        True
    """
    return _timed("minutes", m, 60.0)


def _timed(name: str, given: float, unit: float) -> Trigger:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given < float("inf"):
        raise ConfigError(f"{name}(...) must be a number above 0, but got {given!r}")
    period = given * unit
    form = Form(name, (given,), f"{name}({given})")
    return Trigger(form, lambda tick: tick.after.seconds // period != tick.before.seconds // period)


def _whole(name: str, n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"{name}(...) must be a whole number of at least 1, but got {n!r}; to switch it off, leave it out")


continuous = Trigger(Form("continuous", (), "continuous"), lambda tick: tick.idle)
"""Fire as soon as the previous save has ended; with several ranks, at the next step at which they agree, about twice per second.
The disk decides *when* it fires; *what* is saved does not depend on it."""

at_end = Trigger(Form("at_end", (), "at_end"), lambda tick: tick.end)
"""Fire once, after the last step of a run."""
