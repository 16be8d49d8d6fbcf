"""Text becomes a trigger, rule, retention or sink, and never code that runs."""

import pytest

from fnlight.checkpoint import best, last
from fnlight.errors import ConfigError
from fnlight.fit import parse
from fnlight.sinks import JSONL
from fnlight.triggers import at_end, epochs, max_steps, patience, steps


@pytest.mark.parametrize(
    "value",
    [
        steps(50) | at_end,
        epochs(1) & ~steps(3),
        patience("val/loss", 3, min_delta=0.1) | max_steps(9),
        last(2) | best("val/acc", 3, "max"),
        JSONL("a.jsonl"),
    ],
)
def test_what_prints_as_its_source_is_read_back(value):
    """``parse(repr(value))`` is the value, whatever it is joined of."""
    assert repr(parse(repr(value))) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "steps(__import__('os').getpid())",
        "steps.__class__",
        "(lambda: 1)()",
        "open('x')",
        "steps(5) + steps(3)",
        "[steps(5)]",
        "steps(5",
        "steps('x', y=3)",
        "~" * 100_000 + "at_end",
    ],
)
def test_only_known_names_with_plain_values_are_read(text):
    """A configuration is data: anything else is refused with its text, and never run."""
    with pytest.raises(ConfigError, match="cannot read|must be a whole number"):
        parse(text)
