"""The type of stop rules: how they are joined, and what a function of a state may answer as one.

Not part of ``rules``, which has the rules of fnlight: any function of a state becomes a `StopRule` here, without them.
"""

from collections.abc import Callable
from typing import Any

import attrs

from fnlight.errors import ConfigError, StepError, described
from fnlight.triggers.form import Form


@attrs.frozen(repr=False)
class StopRule:
    """A `Rule` that joins with ``|``, ``&`` and ``~``, also with any function of a state, and is compared by value.

    Args:
        form: Its structure and source text.
        fn: Maps a state to the reason to stop, or None; or to True, whose reason is the text, or False.
        monitors: Names in the history that it needs.
        until: The number of completed steps after which it always stops; None if unknown.

    Example:
        >>> from fnlight.triggers import max_epochs, patience
        >>> patience("val/loss", 3) | max_epochs(10)
        patience('val/loss', 3) | max_epochs(10)
        >>> patience("val/loss", 3) == patience("val/loss", 3, mode="min")
        True
    """

    form: Form
    fn: Callable[[Any], str | bool | None] = attrs.field(eq=False)
    monitors: tuple[str, ...] = attrs.field(default=(), eq=False)
    until: int | None = attrs.field(default=None, eq=False)

    def __call__(self, state: Any) -> str | None:
        """Give the reason to stop, or None."""
        answer = self.fn(state)
        return None if answer is None else reason_of(self.fn, answer, self.form.text)

    def __or__(self, other: Any) -> "StopRule":
        a, b = self, stop_rule(other)

        def either(state: Any) -> str | None:
            found = a(state)
            return b(state) if found is None else found

        until = min([n for n in (a.until, b.until) if n is not None], default=None)
        return StopRule(a.form | b.form, either, a.monitors + b.monitors, until)

    def __ror__(self, other: Any) -> "StopRule":
        return stop_rule(other) | self

    def __and__(self, other: Any) -> "StopRule":
        a, b = self, stop_rule(other)

        def both(state: Any) -> str | None:
            one = a(state)
            two = None if one is None else b(state)
            return None if one is None or two is None else f"{one} and {two}"

        return StopRule(a.form & b.form, both, a.monitors + b.monitors)

    def __rand__(self, other: Any) -> "StopRule":
        return stop_rule(other) & self

    def __invert__(self) -> "StopRule":
        form = ~self.form
        return StopRule(form, lambda state: form.text if self(state) is None else None, self.monitors)

    def __repr__(self) -> str:
        return self.form.text


def reason_of(rule: Any, answer: Any, name: str | None = None) -> str | None:
    """The answer of a stop rule as the reason to stop.

    Args:
        rule: The rule, for its name.
        answer: What it gave: None or False to continue, a reason, or True, whose reason is the name of the rule.
        name: The name; None takes that of the function.

    Returns:
        The reason, or None to continue.

    Raises:
        StepError: If the answer is something else.

    Example:
        >>> def enough(state): return True
        >>> reason_of(enough, True), reason_of(enough, False), reason_of(enough, "done")
        ('enough', None, 'done')
    """
    if answer is None or answer is False:
        return None
    if isinstance(answer, str) and answer:
        return answer
    code = getattr(rule, "__code__", None)
    name = name or getattr(rule, "__qualname__", repr(rule))
    if answer is True:
        return name
    where = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
    raise StepError(
        f"the stop rule {name}{where} must answer None or False to continue, and a reason to stop (a string) or True, but answered "
        f"{described(answer) if answer != '' else 'an empty string'}; a tensor or an array becomes a bool with bool(...)"
    )


def stop_rule(given: Any) -> StopRule:
    """Return a stop rule unchanged; turn a function of a state into one.

    Args:
        given: Either.

    Returns:
        A stop rule.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> stop_rule(max)
        max
    """
    if isinstance(given, StopRule):
        return given
    if not callable(given):
        raise ConfigError(
            f'a stop rule joins with another one or with a function of a state, but got {given!r}; write e.g. patience("val/loss", 3)'
        )
    return StopRule(Form.of(given), given)  # pyright: ignore[reportArgumentType]  # callable() does not check the signature
