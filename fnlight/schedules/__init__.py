"""Schedules: pure functions from completed steps (or epochs, or samples) to a factor of the base learning rate.

A schedule counts nothing itself, so there is nothing to save and nothing that could drift: ``schedule(count)`` is the factor of the step
that comes after `count` completed ones. Past its end a schedule holds its last value. Each prints as the code that makes it.

What depends on a metric, and any scheduler of ``torch.optim.lr_scheduler``, stands in `fnlight.schedules.replay`.
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
