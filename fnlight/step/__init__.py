"""From gradients to a step: `apply` runs the optimizer and counts the step, `update` is the pure standard step, `ema` and `swa` average weights.

Read `update` first.
"""

from fnlight.step.averages import average_checkpoints, averaged, ema, ema_warmup, refresh_batch_norm, swa
from fnlight.step.manual import ByHand, manual
from fnlight.step.optimizer_in_backward import apply_in_backward
from fnlight.step.update import MultiOptimizerStep, Update, apply, pure, update

__all__ = [
    "Update",
    "apply",
    "apply_in_backward",
    "average_checkpoints",
    "averaged",
    "ema",
    "ema_warmup",
    "manual",
    "pure",
    "refresh_batch_norm",
    "swa",
    "update",
]
