"""Detection of non-finite losses: a step appends its loss to a list, and the list is checked when a trigger fires."""

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
"""A step, its epoch, the batches of the epoch up to it, and the name of the value if it is not the loss."""

_STACK = 256  # number of losses that are stacked into one tensor: bounded memory without a host sync


def check_finite(every: Callable[[Tick], bool] = steps(50)) -> Combinator:
    """Raise an error if a loss was NaN or infinite; losses are checked on a trigger, so other steps do not wait for the device.

    Args:
        every: When losses are checked; it should fire whenever a checkpoint is saved, so that no bad state is saved.

    Returns:
        A combinator from `Step` to `Step`; its error names the first step with a non-finite loss.

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
    """An empty list of losses: `note` adds to it, and `first_bad` checks it.

    Returns:
        A tree that can be saved.

    Example:
        >>> first_bad(no_losses()) is None
        True
    """
    return {"losses": [], "chunks": [], "places": []}


def note(tree: dict[str, Any], place: tuple[int, int, int], metrics: Metrics, alone: bool = True) -> None:
    """Add the loss of a step to the list, and the norm of its gradients if a stage computed it, without copying them from the device.

    Args:
        tree: The result of `no_losses`; changed in place.
        place: The step, its epoch, and the batches of the epoch up to it.
        metrics: The metrics of the step; the loss is ``loss``, or with several optimizers the sum of ``NAME/loss``.
        alone: Whether this process computes the whole loss; if False, a `Mean` of weight 0 can be the part of one rank.

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
    """The place of the first loss or norm that was NaN or infinite; this call waits for the device.

    Args:
        tree: The list that `note` added to.

    Returns:
        The ``place`` given to `note`; None if all losses are finite.

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
    """The sum of the losses of all phases of the step: it is finite if all of them are."""
    losses = [value.total if value.__class__ is Mean else value for name, value in metrics.items() if name.endswith("/loss")]
    if not losses and any("/" not in name for name in metrics):
        raise StepError(
            f"check_finite checks the loss, but the step gives no metric called 'loss', only {list(metrics)}; return one, or leave "
            'check_finite out (with fit: FitConfig(nonfinite="ignore"))'
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
        f"by now NaN or infinite: {found}. Lower the learning rate, clip with clip_norm, or look at that batch. To skip such steps, use "
        'skip_nonfinite() (with fit: FitConfig(nonfinite="skip")); to go back to a checkpoint, use rollback (nonfinite="rollback"); to allow '
        'them, leave check_finite out (nonfinite="ignore")'
    )


def _stacked(tree: Mapping[str, list[Any]]) -> Tensor:
    """The losses since the last check, oldest first, shape [steps]."""
    losses = [loss if isinstance(loss, Tensor) else torch.tensor(float(loss)) for loss in tree["losses"]]
    return torch.cat([*tree["chunks"], torch.stack(losses)]) if losses else torch.cat(tree["chunks"])
