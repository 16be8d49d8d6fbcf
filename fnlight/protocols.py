"""The types of the functions that fnlight composes; each contract is in the docstring of its ``__call__``.

A user writes a ``LossFn``, an ``EvalFn`` and a ``PredictFn``. Combinators turn a ``LossFn`` into a ``GradFn`` and that into a ``Step``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = Any  # any tree of tensors: a tensor, tuple, list, dict, namedtuple, dataclass or attrs object
Metrics = Mapping[str, Any]  # names to scalar tensors, numbers, monoids such as `Mean`, or media such as `Image`


class Gradients(NamedTuple):
    """The result of a `GradFn`: gradients as explicit values.

    Args:
        values: One gradient per trainable parameter, in the order of the store; None if the loss does not depend on the parameter.
        loss: The detached loss, a scalar tensor, shape []; a sum if `weight` is not 1.
        weight: The divisor of the sum: for plain losses their number, a Python float; for a `Mean` its samples or tokens, never a float.
        metrics: Names to detached values, including the loss.
        finite: Whether to update; None: not checked. A bool tensor, shape [], masks the update on the device; after False no step is counted.
    """

    values: list[Tensor | None]
    loss: Tensor
    weight: Any
    metrics: dict[str, Any]
    finite: Tensor | bool | None = None

    @property
    def plain(self) -> bool:
        """Whether the losses were plain scalars, so that `weight` is their number, the same on all ranks."""
        return type(self.weight) is float


class LossFn(Protocol):
    """The user's ``train_step``."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Any:
        """Map a model and a batch to ``loss`` or ``(loss, metrics)``; only buffers may change. A loss is a scalar tensor, or a `Mean`."""
        ...


class EvalFn(Protocol):
    """The user's ``eval_step``."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Metrics:
        """Map a model (in eval mode, without gradients) and a batch to metrics; `Mean` values are exact over batches."""
        ...


class PredictFn(Protocol):
    """The user's ``predict_step``."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Any:
        """Map a model (in eval mode, without gradients) and a batch to any output."""
        ...


class StoreView(Protocol):
    """The part of a `Store` that a `GradFn` may use: it may read all of this, and write only its own tree in `memory`."""

    module: nn.Module
    params: list[nn.Parameter]  # those that are trained
    frozen: list[nn.Parameter]  # those that did not require gradients when the state was made
    named: dict[str, nn.Parameter]  # all, by qualified name
    memory: dict[str, Any]  # any tree, by the name of the combinator that owns it
    device: torch.device
    run: Any  # a `RunScope`, of which it reads `resources`
    step: Any  # a `StepScratch`, of which it reads `progress` and `scale`
    host: Any  # `fnlight.runtime.HostCallbacks`: numbers that change from step to step, and looking at tensors
    place: Any  # a `fnlight.parallel.Placement`; None in one process
    optim: Any  # a `fnlight.optim.Optim`

    def seed(self, key: int, /) -> None:
        """Seed the generators of torch, Python and NumPy from a key."""


class GradFn(Protocol):
    """A function that computes gradients as values."""

    def __call__(self, store: StoreView, batch: Batch, key: int, /) -> Gradients:
        """Map the store, a batch and a key (the source of all randomness) to `Gradients`; a stage may change their values in place."""
        ...


class Step(Protocol):
    """One step of the training."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics]:
        """Map ``(state, batch)`` to ``(state, metrics)``; the input is donated: its tensors cannot be read afterwards, see `pure`."""
        ...


class When(Protocol):
    """A trigger, such as ``steps(50)``."""

    def __call__(self, tick: Any, /) -> bool:
        """Say whether something is due at this tick, a pure function of the progress before and after it."""
        ...


class Rule(Protocol):
    """A stop rule, such as ``patience("val/loss", 3)``."""

    def __call__(self, state: Any, /) -> str | bool | None:
        """Give the reason to stop (True: the name of the rule), or None or False to continue: a pure function of the state."""
        ...


class Sink(Protocol):
    """A receiver of records; optional methods: ``flush()`` and ``close()``. The next record after ``close()`` opens it again."""

    def __call__(self, record: Any, /) -> None:
        """Take one `Record`. When a resumed run trains a step again, its record replaces the earlier one."""
        ...


class Schedule(Protocol):
    """A learning rate schedule."""

    def __call__(self, count: int, /) -> float:
        """Map completed optimizer steps (or epochs) to the factor of the base learning rate; a pure function."""
        ...
