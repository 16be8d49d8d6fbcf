"""The types that everything else is made of; each contract stands in the docstring of its ``__call__``.

A user writes a ``LossFn`` (``train_step``), an ``EvalFn`` (``eval_step``) and a ``PredictFn`` (``predict_step``).
Combinators turn a ``LossFn`` into a ``GradFn`` and that into a ``Step``; see `fnlight.pipe.pipe`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = Any
"""Any tree of tensors: a tensor, tuple, list, dict, namedtuple, dataclass or attrs object."""

Metrics = Mapping[str, Any]
"""Names to scalar tensors, numbers, monoids such as `Mean`, or media such as `Image`."""


class Gradients(NamedTuple):
    """What a `GradFn` gives: gradients as explicit values.

    Args:
        values: One a trainable parameter, in the order of the store; None where the loss does not depend on it.
        loss: The detached loss, a scalar tensor, shape []; a sum where `weight` is not 1.
        weight: What the loss was divided by: 1.0 for a plain scalar, samples or tokens for a `Mean`.
        metrics: Names to detached values, the loss among them.
        finite: Whether the update may be made; None where nobody asked. A bool tensor, shape [], is known to the device only: the update
            is masked there, and the step counts. A plain False is known here: there is no update, and no step is counted.
    """

    values: list[Tensor | None]
    loss: Tensor
    weight: Any
    metrics: dict[str, Any]
    finite: Tensor | bool | None = None


class LossFn(Protocol):
    """The user's ``train_step``."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Any:
        """Map a model and a batch to a loss.

        Returns:
            ``loss`` or ``(loss, metrics)``; the loss is a scalar tensor, or ``Mean(total, weight)`` where batches differ in
            their number of samples or tokens. Pure: nothing changes but the model's buffers.
        """
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


class GradFn(Protocol):
    """A function that computes gradients as values."""

    def __call__(self, store: Any, batch: Batch, key: int, /) -> Gradients:
        """Map the store, a batch and a key to `Gradients`.

        All randomness comes from `key`. A stage may change the values in place (by foreach kernels); it never writes parameters.
        """
        ...


class Step(Protocol):
    """One transition of the training."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics]:
        """Map ``(state, batch)`` to ``(state, metrics)``.

        The input state is donated: its tensors must not be read afterwards. `pure` gives a step that copies first.
        """
        ...


class When(Protocol):
    """A trigger, such as ``steps(50)``."""

    def __call__(self, tick: Any, /) -> bool:
        """Say whether something is due at this tick, a pure function of the progress before and after it."""
        ...


class Rule(Protocol):
    """A stop rule, such as ``patience("val/loss", 3)``."""

    def __call__(self, state: Any, /) -> str | bool | None:
        """Give the reason to stop (True: the name of the rule), or None or False: a pure function of the state, asked afresh each time."""
        ...


class Sink(Protocol):
    """Where records go; optional methods: ``flush()`` and ``close()``, after which the next record opens it again."""

    def __call__(self, record: Any, /) -> None:
        """Take one `Record`. Records of steps that a resumed run trains again replace what was written of them before."""
        ...


class Schedule(Protocol):
    """The course of a learning rate."""

    def __call__(self, count: int, /) -> float:
        """Map completed optimizer steps (or epochs) to the factor of the base learning rate; a pure function."""
        ...


Parameters = Sequence[nn.Parameter]
