"""Gradient noise from the random keys of the run: a combinator between `accumulate` and `apply`."""

import math
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError, StepError
from fnlight.pipe import Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.tensors import NOISE, fold_in, foreach_add_, foreach_mul_, is_sharded, listed, local_parts, own_part, sparse_names


def grad_noise(eta: float = 0.3, gamma: float = 0.55) -> Combinator:
    """Add Gaussian noise of variance ``eta / (1 + t) ** gamma`` to the gradients, where t is the number of completed steps.

    Args:
        eta: The variance at the first step, above 0.
        gamma: How fast the variance falls, at least 0.

    Returns:
        A combinator from `GradFn` to `GradFn`; its random numbers depend on the seed and the step.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(grad_noise(0.01))
        grad_noise(0.01, gamma=0.55)

    References:
        Neelakantan et al., "Adding gradient noise improves learning for very deep networks" (2015).
    """
    if not isinstance(eta, int | float) or isinstance(eta, bool) or not 0 < eta < math.inf:
        raise ConfigError(f"grad_noise must be a finite number above 0, but got {eta!r}; leave it out for no noise")
    if not isinstance(gamma, int | float) or isinstance(gamma, bool) or not 0 <= gamma < math.inf:
        raise ConfigError(f"grad_noise(gamma=...) must be a finite number of at least 0, but got {gamma!r}")

    def wrap(grad_fn: GradFn) -> GradFn:
        def noisy(store: StoreView, batches: Any, key: int) -> Gradients:
            found = grad_fn(store, batches, key)
            held = [v for v in found.values if v is not None]
            sparse = sparse_names([name for name, p in store.named.items() if p.requires_grad], found.values)
            if sparse:
                raise StepError(
                    f"grad_noise adds noise to every entry of a gradient, but the gradients of {listed(sparse)} are sparse, and would no longer be; "
                    "leave sparse=True out, or grad_noise"
                )
            sigma = store.host.number(store, lambda live: math.sqrt(eta / (1 + live.step.progress.step) ** gamma))
            store.seed(fold_in(key, NOISE))
            if held:
                noise = [_drawn(v) for v in held]
                foreach_mul_(noise, sigma)
                foreach_add_(local_parts(held), noise)
            return found

        return noisy

    return Combinator("grad_noise", wrap, "grad", "grad", args=f"{eta}, gamma={gamma}")


def _drawn(like: Tensor) -> Tensor:
    """Noise for the local part of a gradient, taken from noise for the whole, so it does not depend on the sharding."""
    if not is_sharded(like):
        return torch.randn_like(like)
    return own_part(torch.randn(like.shape, dtype=like.dtype, device=like.device), like)
