"""Schedules: pure functions from completed steps (or epochs, or samples) to a factor of the base learning rate.

A schedule has no state, so there is nothing to save: ``schedule(count)`` is the factor of the step that follows `count` completed steps.
After its end a schedule keeps its last value. The ``repr`` of a schedule is the code that makes it.

Schedules that depend on a metric, and schedulers of ``torch.optim.lr_scheduler``, are in `fnlight.schedules.replay`.
"""

from fnlight.schedules.curve import Curve
from fnlight.schedules.cycles import cosine_restarts, cyclic, one_cycle
from fnlight.schedules.replay import Plateau, TorchSchedule, from_torch, plateau
from fnlight.schedules.sequences import join, warmup, warmup_cosine, wsd
from fnlight.schedules.shapes import constant, cosine, exponential, linear, polynomial, step_decay

__all__ = [
    "Curve",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "exponential",
    "from_torch",
    "join",
    "linear",
    "one_cycle",
    "plateau",
    "polynomial",
    "step_decay",
    "warmup",
    "warmup_cosine",
    "wsd",
]
