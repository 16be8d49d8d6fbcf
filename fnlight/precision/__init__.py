"""What numbers a step computes in: autocast and casts, loss scaling for fp16, and linear layers in fp8.

Read `precision` first.
"""

from fnlight.precision.fp8 import to_fp8
from fnlight.precision.loss_scale import loss_scale
from fnlight.precision.precision import autocast, cast, casts, to_dtype

__all__ = [
    "autocast",
    "cast",
    "loss_scale",
    "to_dtype",
    "to_fp8",
]
