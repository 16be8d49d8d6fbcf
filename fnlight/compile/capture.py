"""CUDA graphs: a graph is captured once and then launched as a whole; batches are copied to the same addresses every time."""

from collections.abc import Callable, Sequence
from operator import is_

import attrs
import torch
from torch import Tensor

from fnlight.errors import CompileWarning, warn


def _capture_on_cuda(fn: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Capture the kernels that a function launches: a function that launches them again, and the tensors into which they write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fn()
    return graph.replay, found


@attrs.define(eq=False, repr=False)
class Captured:
    """A function of a list of tensors that is captured at its second call; the first call warms up, and is a real update too.

    The tensors of a store keep their addresses between steps. Those of batches change, so batches are copied into static buffers; on CUDA,
    `fnlight.Source` has copied them to the device already, through two sets of pinned buffers. If the addresses of the store's tensors
    change, the graph is captured again.

    Args:
        fn: The graph.
        fixed: How many of the tensors keep their addresses; they come first.
        capture: Maps a function to one that launches it again, and to the tensors that it returned.

    Example:
        >>> weight, places = torch.zeros(2), []
        >>> def capture(fn):
        ...     found = fn()
        ...     return (lambda: [old.copy_(new) for old, new in zip(found, fn())]), found
        >>> captured = Captured(lambda w, x: [w + x], 1, capture)
        >>> [captured([weight, torch.full((2,), float(i))])[0].tolist() for i in range(4)]
        [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    """

    fn: Callable[..., Sequence[Tensor]]
    fixed: int
    capture: Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]] = _capture_on_cuda
    _static: list[Tensor] = attrs.field(factory=list, init=False)
    _places: list[Tensor] = attrs.field(factory=list, init=False)
    _launch: Callable[[], None] | None = attrs.field(default=None, init=False)
    _found: Sequence[Tensor] = attrs.field(default=(), init=False)
    _warm: bool = attrs.field(default=False, init=False)
    _refused: bool = attrs.field(default=False, init=False)

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Run the graph; the returned tensors are copies."""
        static, batches = inputs[: self.fixed], inputs[self.fixed :]
        if self._refused or not self._warm:
            self._warm = True
            return self.fn(*inputs)
        if self._launch is None or not self._same(static):
            self._captured(static, batches)
        if self._launch is None:
            return self.fn(*inputs)
        for place, batch in zip(self._places, batches, strict=True):
            place.copy_(batch, non_blocking=True)
        self._launch()
        return [tensor.clone() for tensor in self._found]

    def _same(self, static: list[Tensor]) -> bool:
        """Whether the tensors of the store have the same addresses as before."""
        if all(map(is_, static, self._static)):
            return True
        same = [t.data_ptr() for t in static] == [t.data_ptr() for t in self._static]
        self._static = static if same else self._static
        return same

    def _captured(self, static: list[Tensor], batches: list[Tensor]) -> None:
        self._launch, self._found, self._static = None, (), static
        self._places = [torch.empty_like(batch, device=static[0].device).copy_(batch) for batch in batches]
        try:
            self._launch, self._found = self.capture(lambda: self.fn(*self._static, *self._places))
        except RuntimeError as error:
            self._refused = True
            text = str(error).strip().splitlines()[0]
            warn(f"compile: no graph at level 'graph': {text:.200}; continuing with the uncaptured graph", CompileWarning)
