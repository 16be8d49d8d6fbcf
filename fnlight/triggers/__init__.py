"""Triggers, which say when something happens (`steps(50)`, `epochs(1)`), and stop rules (`patience`, `max_epochs`).

Read `when` first for triggers, then `stop_rule` and `rules` for stop rules. Both are pure functions, joined with ``|``, ``&`` and ``~``.
"""

from fnlight.triggers.rules import (
    diverged,
    max_epochs,
    max_steps,
    max_time,
    min_epochs,
    min_steps,
    nonfinite,
    patience,
    reached,
)
from fnlight.triggers.stop_rule import StopRule, reason_of, stop_rule
from fnlight.triggers.when import Tick, at_end, condition, continuous, epochs, minutes, seconds, steps

__all__ = [
    "StopRule",
    "Tick",
    "at_end",
    "continuous",
    "diverged",
    "epochs",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "minutes",
    "nonfinite",
    "patience",
    "reached",
    "seconds",
    "steps",
]
