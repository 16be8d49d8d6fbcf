"""Lookahead: slow weights that follow the fast ones of any other optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fnlight.errors import OptimizerError
from fnlight.tensors import foreach_copy_, foreach_lerp_

SLOW = "slow"  # the slot of a parameter that holds its slow weight


class Lookahead(Optimizer):
    """An optimizer around another one: every `k` steps its slow weights go a part of the way to the fast ones, which begin again from there.

    Groups and memory are those of the optimizer inside, with the slow weight of each parameter beside its slots and a counter beside
    the options, so that all of it is saved by parameter name.

    Args:
        base: The optimizer inside, which nobody else steps.
        k: Steps of the fast weights from one synchronisation to the next.
        alpha: What part of the way the slow weights go, above 0 and at most 1.

    Raises:
        OptimizerError: If `base` is no optimizer, or an argument is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([8.0]))
        >>> slowed = Lookahead(torch.optim.SGD([weight], lr=1.0), k=2, alpha=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     slowed.step()
        >>> weight.item()
        7.0

    References:
        Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back" (2019).
    """

    def __init__(self, base: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(base, Optimizer):
            raise OptimizerError(f"Lookahead(base) must be an optimizer, but got {type(base).__name__}: {base!r:.60}")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise OptimizerError(f"Lookahead(k) must be a whole number of at least 1, but got {k!r}")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= 1:
            raise OptimizerError(f"Lookahead(alpha) must be a number above 0 and at most 1, but got {alpha!r}")
        Optimizer.__init__(self, [{"params": group["params"]} for group in base.param_groups], {})
        self.base, self.k, self.alpha = base, k, alpha
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults  # one and the same
        for group in self.param_groups:
            group["lookahead_step"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer inside step; at every k-th time bring slow and fast weights together."""
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        slow = [self.state.get(p, {}).pop(SLOW, None) for p in params]  # optimizers take an empty memory for the first step
        slow = [p.clone() if held is None else held for p, held in zip(params, slow, strict=True)]
        loss = self.base.step(closure) if closure is not None else self.base.step()
        count = self.param_groups[0]["lookahead_step"] + 1
        if count % self.k == 0:
            foreach_lerp_(slow, params, self.alpha)
            foreach_copy_(params, slow)
        for group in self.param_groups:
            group["lookahead_step"] = count
        for p, held in zip(params, slow, strict=True):
            self.state[p][SLOW] = held
        return loss
