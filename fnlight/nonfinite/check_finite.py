"""Combinators that look at the metrics of every step: exact means over an epoch, and losses that are no numbers.

Both put off their work: a step appends to a list, and what was put off is done where it is due.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fnlight.data import Item
from fnlight.errors import NonFiniteError, StepError
from fnlight.metrics import Mean
from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.tensors import listed, not_finite
from fnlight.triggers import Tick, condition, steps

Metrics = Mapping[str, Any]


Place = tuple[int, int, int] | tuple[int, int, int, str]
"""A step, its epoch, the batches of the epoch up to it, and what was noted where it is not the loss."""

_STACK = 256  # losses after which they become one tensor: bounded memory without a host sync


def check_finite(every: Callable[[Tick], bool] = steps(50)) -> Combinator:
    """Raise when a loss was NaN or infinite; looked at when it is due, so that no step waits for the device.

    Args:
        every: When it is due; make it fire wherever a checkpoint is saved, so that none is saved after the fact.

    Returns:
        A combinator from `Step` to `Step`, whose error names the first such step.

    Example:
        >>> print(check_finite(every=steps(10)))
        check_finite(every=steps(10))
    """
    due = condition(every, "check_finite(every=...)")

    def checked(state: TrainState, *_: Any) -> TrainState:
        tree = state.store.memory["check_finite"]
        place = first_bad(tree)
        if place is not None:
            raise NonFiniteError(_says(state, place))
        tree["losses"], tree["chunks"], tree["places"] = [], [], []
        return state

    def wrap(step: Any) -> Any:
        def guarded(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            before = state.progress
            state, metrics = step(state, batch)
            place = (state.progress.step, before.epoch, batch.batch if batch.__class__ is Item else before.batch + 1)
            note(state.store.memory["check_finite"], place, metrics, state.store.place is None)
            return (checked(state) if due(Tick(before, state.progress)) else state), metrics

        return guarded

    return Combinator(
        "check_finite", wrap, "step", "step", args=f"every={every}",
        init=lambda store: no_losses(), phase="update",
        finish=checked,
    )  # fmt: skip


def no_losses() -> dict[str, Any]:
    """Memory in which `note` keeps losses until `first_bad` looks at them.

    Returns:
        A tree that can be saved.

    Example:
        >>> first_bad(no_losses()) is None
        True
    """
    return {"losses": [], "chunks": [], "places": []}


def note(tree: dict[str, Any], place: tuple[int, int, int], metrics: Metrics, alone: bool = True) -> None:
    """Keep the loss of a step, and the norm of its gradients where a stage has computed it.

    Args:
        tree: What `no_losses` gave; changed in place.
        place: The step, its epoch, and the batches of the epoch up to it.
        metrics: Of the step; the loss is ``loss``, or the sum of ``NAME/loss`` where several optimizers take turns.
        alone: Whether this process computes the whole loss; where it is False, a `Mean` of weight 0 may be the part of one rank.

    Raises:
        StepError: If there is no loss among them.

    Example:
        >>> tree = no_losses()
        >>> note(tree, (1, 0, 1), {"loss": torch.tensor(float("inf"))})
        >>> first_bad(tree)
        (1, 0, 1)
    """
    one = "loss" in metrics
    looked_at = [_number(metrics["loss"], alone and "skipped" not in metrics) if one else _loss_of_phases(metrics)]
    if "grad_norm" in metrics and "skipped" not in metrics:  # of a step that was left out the norm may be anything
        looked_at.append(metrics["grad_norm"])
    tree["losses"] += looked_at
    tree["places"] += [place, (*place, "norm of the gradients")][: len(looked_at)]
    if len(tree["losses"]) >= _STACK:
        tree["chunks"], tree["losses"] = [_stacked(tree)], []


def first_bad(tree: Mapping[str, Any]) -> Place | None:
    """Where the first of the noted losses and norms is that was NaN or infinite; here the host waits for the device.

    Args:
        tree: What `note` was given.

    Returns:
        The place as it was noted; None if all are finite.

    Example:
        >>> first_bad({"losses": [torch.tensor(1.0)], "chunks": [], "places": [(1, 0, 1)]}) is None
        True
    """
    if not tree["losses"] and not tree["chunks"]:
        return None
    fine = torch.isfinite(_stacked(tree))
    return None if bool(fine.all()) else tuple(tree["places"][int(fine.logical_not().nonzero()[0])])


def _number(loss: Any, whole: bool) -> Any:
    if loss.__class__ is not Mean:
        return loss
    return loss.compute() if whole else loss.total  # 0 / 0 is found like any other NaN


def _loss_of_phases(metrics: Metrics) -> Any:
    """The losses of the phases that had their turn, added up: a sum is finite where all of its terms are."""
    losses = [value.total if value.__class__ is Mean else value for name, value in metrics.items() if name.endswith("/loss")]
    if not losses and any("/" not in name for name in metrics):
        raise StepError(
            f"check_finite watches the loss, but the step gives no metric called 'loss', only {list(metrics)}; let it give one, or leave "
            'check_finite out (FitConfig(nonfinite="ignore"))'
        )
    return sum(losses, 0.0)


def said(place: Place, more: str = "") -> str:
    """What `first_bad` has found, in words.

    Args:
        place: What it gave.
        more: What to add to the place.

    Returns:
        Text.

    Example:
        >>> said((7, 0, 3)), said((7, 0, 3, "norm of the gradients"))[:30]
        ('the loss was NaN or infinite at step 7 (in epoch 0, up to its batch 3)', 'the norm of the gradients was ')
    """
    step, epoch, batch, *what = place
    return f"the {what[0] if what else 'loss'} was NaN or infinite at step {step} (in epoch {epoch}, up to its batch {batch}{more})"


def _says(state: TrainState, place: Place) -> str:
    at = state.progress
    found = listed(not_finite(state.store.named)) or "none of the parameters"
    return (
        f"{said(place, f'; noticed at step {at.step}')}; "
        f"by now NaN or infinite: {found}. Lower the learning rate, clip with clip_norm, look into that batch, leave such steps out with "
        'FitConfig(nonfinite="skip"), go back to a checkpoint with "rollback", or allow them with "ignore"'
    )


def _stacked(tree: Mapping[str, list[Any]]) -> Tensor:
    """The losses since the last check, oldest first, shape [steps]."""
    losses = [loss if isinstance(loss, Tensor) else torch.tensor(float(loss)) for loss in tree["losses"]]
    return torch.cat([*tree["chunks"], torch.stack(losses)]) if losses else torch.cat(tree["chunks"])
