"""Freezing: parts of a model that are not trained, always or until some epoch.

A frozen parameter gets no gradient, so its optimizer skips it: it has no optimizer state, no weight decay and no backward pass. The frozen
parameters of a step follow from the completed epochs. Before and after a step ``requires_grad`` of every parameter is as the task set it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import attrs
from torch import nn

from fnlight.errors import ConfigError, OptimizerError
from fnlight.optim import matches, meant
from fnlight.pipe import Combinator
from fnlight.state import Store, TrainState


def freeze(*patterns: str, eval_mode: bool = False, name: str = "freeze") -> Combinator:
    """Freeze parameters by name.

    Args:
        *patterns: The first parts of qualified names, with ``*`` as a wildcard: ``"backbone"``, ``"layers.*.norm"``.
        eval_mode: True also keeps these modules in eval mode while training: BatchNorm uses its running statistics and does not update
            them, and dropout is off.
        name: The name of this combinator in a pipe, needed if the pipe has it twice.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If there is no pattern; at the start of a run, if a pattern matches no parameter.

    Example:
        >>> print(freeze("backbone", eval_mode=True))
        freeze('backbone', eval_mode=True)
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"freeze takes name patterns, as in freeze('backbone'), but got {patterns!r}")
    return _freezing("freeze", name, dict.fromkeys(patterns), eval_mode=eval_mode, label=", ".join(map(repr, patterns)))


def unfreeze_at(epochs: Mapping[str, int], eval_mode: bool = False, *, name: str = "unfreeze_at") -> Combinator:
    """Unfreeze parameters at given epochs (gradual unfreezing).

    The optimizer must hold these parameters from the start. Optimizer state is created when a parameter is unfrozen. The learning rate
    schedule counts from the start of training; give the parameters their own group for another schedule. If several patterns match a
    parameter, the latest epoch is used. Parameters that the task itself has frozen with ``requires_grad=False`` stay frozen.

    Args:
        epochs: Maps patterns, as for `freeze`, to the number of completed epochs after which the parameters are trained.
        eval_mode: True also keeps these modules in eval mode until then.
        name: The name of this combinator in a pipe, needed if the pipe has it twice.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If an epoch is not a whole number of at least 0; at the start of a run, if a pattern matches no parameter.
        OptimizerError: At the start of a run, if the optimizer does not hold a parameter that is trained later.

    Example:
        >>> print(unfreeze_at({"layer4": 2, "layer3": 4}))
        unfreeze_at({'layer4': 2, 'layer3': 4})

    References:
        Howard and Ruder, "Universal language model fine-tuning for text classification" (2018).
    """
    if not isinstance(epochs, Mapping) or not epochs:
        raise ConfigError(f"unfreeze_at takes a mapping from name patterns to epochs, as in {{'layer4': 2}}, but got {epochs!r}")
    for pattern, epoch in epochs.items():
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ConfigError(f"unfreeze_at({{{pattern!r}: ...}}) must be a number of completed epochs, at least 0, but got {epoch!r}")
    return _freezing("unfreeze_at", name, epochs, eval_mode=eval_mode, label=repr(dict(epochs)))


@attrs.frozen(eq=False, repr=False)
class _Rows:
    """Pairs of the first epoch in which parameters are trained (None: never) and their names, for the model of one store."""

    rows: Sequence[tuple[int | None, tuple[str, ...]]]

    def close(self, error: BaseException | None) -> None:
        """Nothing is open."""


def _rows(store: Store, key: str, until: Mapping[str, int | None]) -> Sequence[tuple[int | None, tuple[str, ...]]]:
    """What the patterns mean, looked up once in a run."""
    found = store.run.resources.get(key)
    if found is None:
        rows = [(epoch, tuple(n for n in store.named if matches(n, pattern))) for pattern, epoch in until.items()]
        found = store.run.resources[key] = _Rows(rows)
    return found.rows


def _freezing(who: str, key: str, until: Mapping[str, int | None], *, eval_mode: bool, label: str) -> Combinator:
    def wrap(step: Any) -> Any:
        def freezing(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            store, epoch = state.store, state.progress.epoch
            cold = [n for start, names in _rows(store, key, until) if start is None or epoch < start for n in names]
            if not cold:
                return step(state, batch)
            still = [pattern for pattern, start in until.items() if start is None or epoch < start] if eval_mode else []
            with _frozen(store, cold), _in_eval_mode(store.module, still):
                return step(state, batch)

        return freezing

    def start(state: TrainState) -> TrainState:
        _check(state, who, until)
        state.store.run.resources.pop(key, None)
        return state

    label += (", eval_mode=True" if eval_mode else "") + ("" if key == who else f", name={key!r}")
    return Combinator(who, wrap, "step", "step", args=label, key=key, phase="update", start=start)


def _check(state: TrainState, name: str, until: Mapping[str, int | None]) -> None:
    store = state.store
    optimizers = [optim.optimizer for optim in store.optims.values() if optim.optimizer is not None]
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for pattern, epoch in until.items() if store.named else ():
        try:
            names = meant(pattern, store.module, name)
        except OptimizerError as error:
            raise ConfigError(str(error)) from error
        mine = [n for n in names if store.named[n].requires_grad]
        if not mine and epoch is not None and store.params:
            raise ConfigError(
                f"{name} has the pattern {pattern!r}, but the task has already frozen all these parameters with requires_grad=False; remove one of the two"
            )
        left = [n for n in mine if epoch is not None and id(store.named[n]) not in held]
        if left:
            raise OptimizerError(
                f"{name} trains {pattern!r} from epoch {epoch} on, but the optimizer does not hold {', '.join(left[:5])}; "
                "give all parameters to the optimizer in configure_optimizers; it skips the frozen ones"
            )


@contextmanager
def _frozen(store: Store, names: Iterable[str]) -> Iterator[None]:
    stores = (store, *store.phases.values())
    params, changed = [each.params for each in stores], [p for p in map(store.named.__getitem__, names) if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    for each in stores:
        each.params = [p for p in each.params if p.requires_grad]
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
        for each, before in zip(stores, params, strict=True):
            each.params = before


@contextmanager
def _in_eval_mode(module: nn.Module, patterns: list[str]) -> Iterator[None]:
    """Put modules in eval mode that match a pattern, or that directly hold a parameter that matches one."""
    meant = [m for n, m in module.named_modules() if any(matches(n, p) or fnmatchcase(f"{n}.", p) for p in patterns)] if patterns else []
    before = [(m, m.training) for m in meant]
    for m in meant:
        m.training = False
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
