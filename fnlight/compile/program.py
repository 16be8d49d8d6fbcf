"""Graphs with their calling code: inputs are collected from a store, results become metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.compile.bound import Bound
from fnlight.compile.capture import Captured
from fnlight.compile.lower import lower
from fnlight.compile.trace import Traced
from fnlight.state import Progress, Store
from fnlight.tensors import fold_in, set_grad_enabled


@attrs.define(eq=False, repr=False)
class Program:
    """A graph with its calling code.

    Args:
        traced: The graph.
        takes: By update, one per group: whether its learning rate is an input.
        lowers: Whether it is for a compiler: then it is seeded once per call.

    Example:
        >>> from torch import fx
        >>> graph = fx.symbolic_trace(lambda x: [x + 1])
        >>> program = Program(Traced(graph, {}), [], lowers=False)
        >>> program.fn(torch.zeros(1))
        [tensor([1.])]
    """

    traced: Traced
    takes: list[list[bool]]
    lowers: bool
    fn: Callable[..., Any] = attrs.field(init=False, default=attrs.Factory(lambda self: self.traced.graph.forward, takes_self=True))
    conditions: list[Callable[[Store], bool]] = attrs.field(init=False)
    _listed: bool = attrs.field(init=False, default=False)  # whether it takes a list, as compiled code does
    _numbers: list[Any] = attrs.field(init=False)
    _looks: list[Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        duties = self.traced.duties
        self._numbers = [each.numbers for each in duties] if any(each.numbers for each in duties) else []
        self._looks = [look for each in duties for look in each.looks]
        self.conditions = [condition for each in duties for condition in each.conditions]

    def compile(self, inputs: list[Tensor], cache_dir: str | None) -> None:
        """Replace the graph by machine code."""
        self.fn, self._listed = lower(self.traced.graph, inputs, cache_dir), True

    def capture(self, inputs: list[Tensor], batches: int) -> None:
        """Replace the graph's operations by a captured CUDA graph."""
        self.fn, self._listed = Captured(self.traced.graph.forward, len(inputs) - batches), True

    def inputs(
        self, bound: Bound, rates: Sequence[Sequence[Any]], batches: Sequence[Tensor], ahead: Sequence[Progress] = ()
    ) -> list[Tensor]:
        """The inputs of the graph: the tensors of the store, learning rates, numbers of stages, and the tensors of the batches."""
        found = [*bound.flat, *bound.rates(self.takes, rates)]
        if self._numbers:
            found += self._given(bound, ahead)
        found += batches
        return found

    def _given(self, bound: Bound, ahead: Sequence[Progress]) -> list[Tensor]:
        store, found = bound.store, list[Tensor]()
        before = store.step.progress
        for update, fns in enumerate(self._numbers):
            store.step.progress = ahead[update] if ahead else before
            found += [bound.number((update, "number", i), float(fn(store))) for i, fn in enumerate(fns)]
        store.step.progress = before
        return found

    def __call__(
        self, bound: Bound, keys: Sequence[int], rates: Sequence[Sequence[Any]], batches: Sequence[Tensor], ahead: Sequence[Progress] = ()
    ) -> Mapping[str, Any]:
        """Make the updates; their metrics are merged."""
        inputs, traced = self.inputs(bound, rates, batches, ahead), self.traced
        before = torch.is_grad_enabled()
        set_grad_enabled(False)  # a context manager would cost as much as the rest of this function
        try:
            if traced.draws and self.lowers:
                bound.store.seed(fold_in(keys[0], 0))
            given = (inputs,) if self._listed else (*inputs, keys) if traced.draws and not self.lowers else inputs
            tensors = self.fn(*given)
        finally:
            set_grad_enabled(before)
        for look in self._looks:
            look(bound.store)
        return traced.results(tensors)
