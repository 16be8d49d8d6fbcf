"""What wraps a loss or a gradient: forward and backward, accumulation, clipping, noise, micro-batches, frozen parts, composed losses.

Read `grad` first.
"""

from fnlight.gradients.accumulate import accumulate
from fnlight.gradients.clip import clip_adaptive, clip_each, clip_norm, clip_quantile, clip_value
from fnlight.gradients.first_look import begin, taken
from fnlight.gradients.freezing import freeze, unfreeze_at
from fnlight.gradients.grad import grad, weight_of
from fnlight.gradients.losses import carry, grad_cache, weighted
from fnlight.gradients.microbatch import microbatch
from fnlight.gradients.noise import grad_noise
from fnlight.gradients.recompute import recompute

__all__ = [
    "accumulate",
    "carry",
    "clip_adaptive",
    "clip_each",
    "clip_norm",
    "clip_quantile",
    "clip_value",
    "freeze",
    "grad",
    "grad_cache",
    "grad_noise",
    "microbatch",
    "recompute",
    "unfreeze_at",
    "weighted",
]
