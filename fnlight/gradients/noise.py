"""Noise in the gradients, from the keys of the run: a combinator between `accumulate` and `apply`."""

import math
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError, StepError
from fnlight.pipe import Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.tensors import NOISE, fold_in, foreach_add_, foreach_mul_, is_sharded, listed, local_parts, own_part, sparse_names


def grad_noise(eta: float = 0.3, gamma: float = 0.55) -> Combinator:
    """Add noise to the gradients that is annealed: Gaussian, of variance ``eta / (1 + t) ** gamma`` where t steps are completed.

    Args:
        eta: The variance at first, above 0.
        gamma: How fast it falls, at least 0.

    Returns:
        A combinator from `GradFn` to `GradFn`; its random numbers follow from the seed and the step.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(grad_noise(0.01))
        grad_noise(0.01, gamma=0.55)

    References:
        Neelakantan et al., "Adding gradient noise improves learning for very deep networks" (2015).
    """
    if not isinstance(eta, int | float) or isinstance(eta, bool) or not 0 < eta < math.inf:
        raise ConfigError(f"grad_noise must be a finite number above 0, but got {eta!r}; leave it out to switch it off")
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
    """Noise for the part of a gradient that lies here, cut from that of the whole, so that it is the same however it is cut."""
    if not is_sharded(like):
        return torch.randn_like(like)
    return own_part(torch.randn(like.shape, dtype=like.dtype, device=like.device), like)
