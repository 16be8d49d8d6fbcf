"""Graphs that can be called, and the tensors of a store as they take them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.compile.lower import lower
from fnlight.compile.trace import Traced
from fnlight.rng import fold_in
from fnlight.state import Store
from fnlight.tree import leaves


@attrs.define(eq=False)
class Bound:
    """The tensors of one store, as graphs take them.

    Args:
        store: The store.
        tensors: What `held` gave.
        version: The version of the store behind which they are valid.
        rates: Learning rates as tensors, with the numbers that are in them.

    Example:
        >>> from fnlight.optim import Optim
        >>> bound = Bound(Store(torch.nn.Linear(1, 1), Optim(None), {}), [])
        >>> bound.rate(0, 0, 0.5) is bound.rate(0, 0, 0.25), bound.rate(0, 0, 0.25).item()
        (True, 0.25)
    """

    store: Store
    tensors: list[Tensor]
    version: int = -1
    rates: dict[tuple[int, int], tuple[Tensor, list[float]]] = attrs.field(factory=dict, init=False)
    flat: list[Tensor] = attrs.field(init=False, default=attrs.Factory(lambda self: [t.detach() for t in self.tensors], takes_self=True))

    def rate(self, update: int, group: int, value: float) -> Tensor:
        """A learning rate as a tensor that is written only when it changes."""
        found = self.rates.get((update, group))
        if found is None:
            found = self.rates[update, group] = (torch.tensor(value, dtype=torch.float64), [value])
        if found[1][0] != value:
            found[0].fill_(value)
            found[1][0] = value
        return found[0]


@attrs.define(eq=False)
class Program:
    """A graph that can be called.

    Args:
        traced: The graph.
        takes: By update, one a group: whether its learning rate is an input.
        lowers: Whether it is compiled.

    Example:
        >>> from torch import fx
        >>> graph = fx.symbolic_trace(lambda x, keys: [x + 1])
        >>> program = Program(Traced(graph, {}), [], lowers=False)
        >>> program.fn(torch.zeros(1), [0])
        [tensor([1.])]
    """

    traced: Traced
    takes: list[list[bool]]
    lowers: bool
    fn: Callable[..., Any] = attrs.field(init=False, default=attrs.Factory(lambda self: self.traced.graph.forward, takes_self=True))

    def compile(self, inputs: list[Tensor], cache_dir: str | None) -> None:
        """Put machine code in the place of the graph."""
        self.fn = lower(self.traced.graph, inputs, cache_dir)

    def inputs(self, bound: Bound, rates: Sequence[Sequence[Any]], updates: Sequence[Any]) -> list[Tensor]:
        """What the graph takes: the tensors of the store, learning rates, and the tensors of the batches."""
        found = list(bound.flat)
        for update, (takes, values) in enumerate(zip(self.takes, rates, strict=True)):
            found += [bound.rate(update, group, lr) for group, (take, lr) in enumerate(zip(takes, values, strict=True)) if take]
        for batches in updates:
            found += _tensors(batches)
        return found

    def __call__(self, bound: Bound, keys: list[int], rates: Sequence[Sequence[Any]], updates: Sequence[Any]) -> Mapping[str, Any]:
        """Take the updates; their metrics are merged."""
        inputs = self.inputs(bound, rates, updates)
        with torch.no_grad():
            if self.lowers:
                bound.store.seed(fold_in(keys[0], 0))
                return self.traced.results(self.fn(inputs))
            return self.traced.results(self.fn(*inputs, keys))


def _tensors(node: Any) -> list[Tensor]:
    kind = node.__class__
    if kind is Tensor:
        return [node]
    if kind is tuple or kind is list:
        return [tensor for each in node for tensor in _tensors(each)]
    return [leaf for _, leaf in leaves(node) if isinstance(leaf, Tensor)]
