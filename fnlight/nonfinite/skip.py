"""Skipped updates: steps with non-finite gradients, and steps whose loss is a spike; decided on the device."""

from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError, NonFiniteError
from fnlight.metrics import Sum, counted_where
from fnlight.optim import buffers_before
from fnlight.pipe import Combinator, loss_of_all
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.state import Store, TrainState
from fnlight.tensors import foreach_norm, stored_values


def skip_nonfinite(max_consecutive: int | None = 10) -> Combinator:
    """Skip the update if a loss or a gradient is NaN or infinite, without a host sync.

    A skipped step counts, but changes no parameter, no optimizer state, no buffer and no mean of a metric. The metrics get an additional
    ``skipped``. Fused optimizers mask the update on the device; for others the host waits, see `fnlight.optim.step_where`. A gradient whose
    2-norm is too large for fp32, about 1e19, counts as infinite.

    Args:
        max_consecutive: Training fails after this many skipped steps in a row; this is checked every so many steps. None never fails.

    Returns:
        A combinator from `GradFn` to `GradFn`; put it before all combinators that change gradients, which could hide non-finite values.

    Raises:
        ConfigError: If the number is below 1.

    Example:
        >>> print(skip_nonfinite(max_consecutive=5))
        skip_nonfinite(max_consecutive=5)
    """
    _check_most("skip_nonfinite", max_consecutive)

    def init(store: Store) -> dict[str, Any]:
        return {**_counts(store), "bad": torch.zeros(len(store.named), dtype=torch.bool, device=store.device)}

    def wrap(grad_fn: GradFn) -> GradFn:
        def guarded(store: StoreView, batches: Any, key: int) -> Gradients:
            tree = store.memory["skip_nonfinite"]
            buffers = buffers_before(store.module, tree["buffers"])
            found = grad_fn(store, batches, key)
            fine, finite = _finite_each(store, found, found.loss if store.place is None else loss_of_all(store, found))
            tree["bad"] = torch.where(finite, tree["bad"], fine.logical_not())
            left = _left_out(found, finite, tree, buffers=buffers, name="skipped")
            store.host.later(store, look)
            return left._replace(metrics={**counted_where(found.metrics, finite), "skipped": left.metrics["skipped"]})

        return guarded

    def look(store: Store) -> None:
        tree = store.memory["skip_nonfinite"]
        tree["calls"] += 1
        _look(tree, max_consecutive, lambda: _blame(store, tree))

    def finish(before: TrainState, state: TrainState) -> TrainState:
        tree = state.store.memory["skip_nonfinite"]
        _look({**tree, "calls": 0}, max_consecutive, lambda: _blame(state.store, tree))
        return state

    return Combinator(
        "skip_nonfinite", wrap, "grad", "grad", args=f"max_consecutive={max_consecutive}", init=init, finish=finish, validate=_first
    )  # fmt: skip


def skip_spikes(sigma: float = 6.0, window: int = 100, max_consecutive: int | None = 10) -> Combinator:
    """Skip the update if the loss is far above its rolling mean, without a host sync.

    A loss is a spike if it is more than `sigma` standard deviations above the mean of the last `window` losses that were not spikes. Until
    the window is full, no loss is a spike. A skipped step counts, but changes nothing; its metrics are kept, with an additional ``spikes``.

    Args:
        sigma: Standard deviations above the mean, above 0.
        window: Number of losses for the mean and the deviation, at least 2.
        max_consecutive: Training fails after this many spikes in a row, because the loss then stays high; None never fails.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If a number is out of its range.

    Example:
        >>> print(skip_spikes(sigma=4.0))
        skip_spikes(sigma=4.0, window=100)
    """
    if not isinstance(sigma, int | float) or isinstance(sigma, bool) or not 0 < sigma < float("inf"):
        raise ConfigError(f"skip_spikes(sigma=...) must be a finite number above 0, but got {sigma!r}")
    if not isinstance(window, int) or isinstance(window, bool) or window < 2:
        raise ConfigError(f"skip_spikes(window=...) must be a whole number of at least 2, but got {window!r}")
    _check_most("skip_spikes", max_consecutive)

    def init(store: Store) -> dict[str, Any]:
        losses = torch.full((window,), torch.nan, device=store.device)
        return {**_counts(store), "losses": losses, "entered": torch.zeros(1, dtype=torch.int64, device=store.device)}

    def look(store: Store) -> None:
        tree = store.memory["skip_spikes"]
        tree["calls"] += 1
        _look(tree, max_consecutive, blame)

    def blame() -> str:
        return (
            f"the loss was more than {sigma:g} standard deviations above its mean for {max_consecutive} steps in a row, so this is not a short spike; "
            "look at the data and the learning rate there, or give a larger sigma"
        )

    def wrap(grad_fn: GradFn) -> GradFn:
        def guarded(store: StoreView, batches: Any, key: int) -> Gradients:
            tree = store.memory["skip_spikes"]
            buffers = buffers_before(store.module, tree["buffers"])
            found = grad_fn(store, batches, key)
            loss = loss_of_all(store, found)
            ok = ~_enters(tree, loss.float(), sigma)
            left = _left_out(found, ok, tree, buffers=buffers, name="spikes")
            store.host.later(store, look)
            return left

        return guarded

    def finish(before: TrainState, state: TrainState) -> TrainState:
        _look({**state.store.memory["skip_spikes"], "calls": 0}, max_consecutive, blame)
        return state

    return Combinator("skip_spikes", wrap, "grad", "grad", args=f"sigma={sigma}, window={window}", init=init, finish=finish)


def _enters(tree: dict[str, Any], loss: Tensor, sigma: float) -> Tensor:
    """Whether a loss is a spike; if it is not, it is added to the window."""
    losses = tree["losses"]
    std, mean = torch.std_mean(losses)  # NaN until the window is full, and no comparison with NaN is True
    spike = loss > mean + sigma * torch.maximum(std, 1e-5 * mean.abs())  # equal losses may differ by rounding
    enters = ~spike & torch.isfinite(loss)
    place = tree["entered"] % len(losses)
    losses.scatter_(0, place, torch.where(enters, loss, losses.gather(0, place)))
    tree["entered"] += enters
    return spike


def _counts(store: Store) -> dict[str, Any]:
    zero = torch.zeros((), dtype=torch.int64, device=store.device)
    return {"skipped": zero, "row": zero.clone(), "worst": zero.clone(), "calls": 0, "buffers": None}


def _left_out(found: Gradients, ok: Tensor, tree: dict[str, Any], buffers: Any, name: str) -> Gradients:
    """The gradients, marked so that the update is skipped unless `ok`; the skip is counted and the buffers are restored."""
    if tree["buffers"] is None:
        tree["buffers"] = buffers.changing()
    buffers.put_back(ok)
    bad = ok.logical_not()
    tree["skipped"] = tree["skipped"] + bad
    tree["row"] = (tree["row"] + 1) * bad
    tree["worst"] = torch.maximum(tree["worst"], tree["row"])
    finite = False if found.finite is False else ok if found.finite is None or found.finite is True else found.finite & ok
    return found._replace(metrics={**found.metrics, name: Sum(bad.float())}, finite=finite)


def _look(tree: dict[str, Any], most: int | None, says: Any) -> None:
    """Every `most` calls, check whether too many updates in a row were skipped; only here the host waits."""
    if most is not None and tree["calls"] % most == 0 and int(tree["worst"]) >= most:
        raise NonFiniteError(says())


def _blame(store: Store, tree: dict[str, Any]) -> str:
    bad = [name for name, wrong in zip(store.named, tree["bad"].tolist(), strict=True) if wrong]
    listed = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return (
        f"{int(tree['worst'])} steps in a row were skipped because their loss or gradients were NaN or infinite; in the last one, gradients of: "
        f"{listed or 'none, only the loss'}; look at the data, lower the learning rate, or clip gradients"
    )


def _finite_each(store: StoreView, found: Gradients, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the 2-norm of each parameter's gradient is finite, shape [params], in the order of the model; True for missing gradients.

    Also whether all of them and the loss are finite, shape [].
    """
    places = [i for i, p in enumerate(store.named.values()) if p.requires_grad]
    given = [(i, stored_values(v) if v.is_sparse else v) for i, v in zip(places, found.values, strict=True) if v is not None]
    held = [v for _, v in given]
    each = list(foreach_norm(held) if store.place is None else store.place.norms(held).unbind()) if held else []
    dtype = torch.promote_types(torch.float32, loss.dtype)
    fine = torch.isfinite(torch.stack([n.to(store.device, dtype) for n in (*each, loss)]))
    every, finite = fine[:-1], fine.all()
    if len(given) != len(store.named):
        every = torch.ones(len(store.named), dtype=torch.bool, device=store.device)
        every[[i for i, _ in given]] = fine[:-1]
    return every, finite


def _first(combinators: tuple[Combinator, ...]) -> str | None:
    for c in combinators:
        if c.name == "skip_nonfinite":
            return None
        if c.takes == c.gives == "grad" and c.name not in ("microbatch", "loss_scale", "skip_spikes"):
            return f"{c} comes before skip_nonfinite and may hide non-finite gradients; move skip_nonfinite before {c}"
    return None


def _check_most(name: str, most: Any) -> None:
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ConfigError(f"{name}(max_consecutive=...) must be None or a whole number of at least 1, but got {most!r}")
