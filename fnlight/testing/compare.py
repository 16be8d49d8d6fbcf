"""Comparison of trees and states bit by bit, and a check that a step is pure."""

import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fnlight.metrics import Tally
from fnlight.optim import named_groups
from fnlight.state import TrainState
from fnlight.step import pure
from fnlight.tensors import differences, isolated, map_tensors, seed_generators


def trees_equal(a: Any, b: Any) -> bool:
    """Whether two trees are bit-identical; trees may hold states, modules, metrics and arrays.

    Args:
        a: A tree. Of a `TrainState`, its parameters, buffers, optimizer, memory, progress (without seconds), history and seed are compared.
        b: Another tree.

    Returns:
        True if nothing differs; NaN equals NaN.

    Example:
        >>> from fnlight.testing import tiny_task
        >>> state = TrainState.create(tiny_task())
        >>> trees_equal(state, state.copy())
        True
    """
    return next(differences(plain(a), plain(b)), None) is None


def assert_trees_equal(a: Any, b: Any) -> None:
    """Fail if two trees are not bit-identical, with the first places that differ; see `trees_equal`.

    Args:
        a: A tree.
        b: Another tree.

    Raises:
        AssertionError: If anything differs.

    Example:
        >>> assert_trees_equal({"x": torch.zeros(2)}, {"x": torch.zeros(2)})
    """
    places = list(differences(plain(a), plain(b)))
    assert not places, f"{len(places)} places differ, expected none:{listed(places)}"


def plain(tree: Any) -> Any:
    """Turn a tree into dicts, lists and leaves that `fnlight.tensors.differences` can compare.

    Args:
        tree: Any tree, state or module.

    Returns:
        A tree that shares its tensors.

    Example:
        >>> from fnlight.testing import tiny_task
        >>> plain(TrainState.create(tiny_task()))["progress"]
        {'step': 0, 'epoch': 0, 'batch': 0, 'samples': 0}
    """
    if isinstance(tree, TrainState):
        return plain(_parts(tree))
    if isinstance(tree, nn.Module):
        return {"params": dict(tree.named_parameters()), "buffers": dict(tree.named_buffers())}
    if isinstance(tree, Tally):
        tree.settle()
        return {"totals": tree.totals, "bad": tree.bad}
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return torch.tensor(tree.tolist()) if type(tree).__module__ == "numpy" else tree


def _parts(state: TrainState) -> dict[str, Any]:
    at = state.progress
    groups = {name: named_groups(optim, state.live.module) for name, optim in state.live.optims.items()}
    return {
        "params": state.params,
        "buffers": state.buffers,
        "opt_state": state.opt_state,
        "groups": groups if state.live.phases else groups[""],
        "memory": state.memory,
        "progress": {
            "step": at.step,
            "epoch": at.epoch,
            "batch": at.batch,
            "samples": at.samples,
            **({"updates": at.updates} if at.updates else {}),
        },
        "history": [{"step": r.step, "epoch": r.epoch, "metrics": r.metrics} for r in state.history],
        "seed": state.seed,
    }


def snapshot(tree: Any) -> Any:
    """Copy a tree, so that later changes of its tensors do not matter.

    Args:
        tree: Any tree, state or module.

    Returns:
        A tree of dicts, lists and leaves, its tensors cloned.

    Example:
        >>> x = torch.zeros(2)
        >>> kept, _ = snapshot([x]), x.add_(1)
        >>> kept
        [tensor([0., 0.])]
    """
    return map_tensors(lambda t: t.detach().clone(), plain(tree))


def listed(places: Iterable[str]) -> str:
    """The first lines of a list, for an error message.

    Args:
        places: Lines.

    Returns:
        The first eight, each on a line of its own.

    Example:
        >>> print("in" + listed(["weight"]))
        in
          weight
    """
    shown = list(places)
    return "".join(f"\n  {line}" for line in shown[:8]) + (f"\n  and {len(shown) - 8} more" if len(shown) > 8 else "")


def next_numbers() -> dict[str, Any]:
    """The next numbers of the global generators, without advancing them: equal numbers mean equal generators.

    Returns:
        One number each for torch, random and, if it is imported, numpy.

    Example:
        >>> next_numbers() == next_numbers()
        True
    """
    numpy: Any = sys.modules.get("numpy")
    with isolated():
        drawn = {"torch": int(torch.randint(1 << 62, ())), "random": random.random()}
        return drawn if numpy is None else {**drawn, "numpy": float(numpy.random.random())}


def assert_pure(step: Any, state: TrainState, batch: Any) -> None:
    """Fail if a step is not a pure function of state and batch.

    Called twice, on copies and with different global generators, it must give bit-identical results; and `fnlight.pure` of it must not
    change the state, the batch or the global generators.

    Args:
        step: Any `Step`.
        state: The state to test with; it is not changed.
        batch: One batch, or an `Item`.

    Raises:
        AssertionError: If one of these does not hold; the message names the place.

    Example:
        >>> from fnlight.testing import tiny_batches, tiny_task
        >>> from fnlight.step import update
        >>> assert_pure(update, TrainState.create(tiny_task()), tiny_batches()[0])
    """
    before, given, drawn = snapshot(state), snapshot(batch), next_numbers()
    results = list[Any]()
    with isolated(state.device):
        for key in (1, 2):
            seed_generators(key, state.device)
            results.append(snapshot(step(state.copy(), batch)))
            _assert_kept(before, state, given, batch)
    places = list(differences(*results))
    assert not places, (
        f"the step gives another result when called again on the same state and batch (0: state, 1: metrics):{listed(places)}"
    )
    pure(step)(state, batch)
    _assert_kept(before, state, given, batch)
    moved = [name for name, number in next_numbers().items() if number != drawn[name]]
    assert not moved, f"the step moves the global generators of {moved} although it was made pure; draw within the step only"


def _assert_kept(before: Any, state: TrainState, given: Any, batch: Any) -> None:
    for what, old, new in (("state", before, state), ("batch", given, batch)):
        places = list(differences(old, plain(new)))
        assert not places, f"the step changes the {what} that it was given:{listed(places)}"
