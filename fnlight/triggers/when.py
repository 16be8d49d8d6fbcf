"""When something is due: triggers such as ``steps(50) | at_end``, pure functions of the progress before and after a tick.

A trigger remembers nothing, so a resumed run fires exactly where the uninterrupted one does. Those that count time read
``progress.seconds``, which comes from the clock that `run` was given: no trigger looks at a clock of its own, so where several
processes train together, whoever owns the progress decides for all of them. `continuous` alone depends on the disk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import attrs

from fnlight.errors import ConfigError, check_type
from fnlight.state import Progress
from fnlight.triggers.form import Form


class Tick(NamedTuple):
    """What a trigger sees.

    Args:
        before: The progress before the step.
        after: The progress after it.
        end: True once, after the last step of a run.
        idle: False while a save is under way in the background; only `checkpoint_every` knows.

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
    """A `When` that joins with ``|``, ``&`` and ``~``, also with any function of a tick, and is compared by what it is made of.

    Args:
        form: What it is made of, and its source text.
        fn: Maps a `Tick` to a bool.
        earliest: Steps and epochs before which it cannot fire; 0 where nothing is known.

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
        """Say whether it is due."""
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
    """A trigger as it is; a function of a tick as a trigger.

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
        what: What the error calls it.

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
    """Fire every n completed steps; where a tick counts several, at the first one that has come so far.

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
        s: Above 0; counted on ``progress.seconds``, so a resumed run goes on counting.

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
        m: Above 0; counted on ``progress.seconds``, so a resumed run goes on counting.

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
"""Fire as soon as the save before has ended; on several ranks, at the next of the steps at which they agree, about two a second.
*When* that is depends on the disk; *what* is saved is exact as ever."""

at_end = Trigger(Form("at_end", (), "at_end"), lambda tick: tick.end)
"""Fire once, after the last step of a run."""
