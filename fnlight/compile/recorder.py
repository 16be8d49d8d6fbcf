"""Host callbacks while a kernel is traced: host numbers become inputs of the graph, other callbacks are run after it."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.compile.shadow import UnsettledError, UntraceableError, WantedError
from fnlight.state import Store


@attrs.frozen(eq=False, repr=False)
class Duties:
    """What the host does around one update of a graph.

    Args:
        numbers: Functions that give the inputs of the graph that stages ask for.
        looks: Called after it.
        conditions: The graph is used only if all of them hold.

    Example:
        >>> Duties().numbers
        []
    """

    numbers: list[Callable[[Store], float]] = attrs.field(factory=list)
    looks: list[Callable[[Store], None]] = attrs.field(factory=list)
    conditions: list[Callable[[Store], bool]] = attrs.field(factory=list)


@attrs.define(eq=False, repr=False)
class Recorder:
    """Replaces `fnlight.runtime.HostCallbacks` in a shadow; one for each update of a call.

    Args:
        live: The live store.
        inputs: Scalar tensors for the numbers that are known to be asked for.
        lowers: Whether the graph is for a compiler, which takes numbers as tensors.

    Example:
        >>> from fnlight.optim import Optim
        >>> recorder = Recorder(Store(torch.nn.Linear(1, 1), Optim(None), {}), [torch.tensor(0.5)], lowers=True)
        >>> recorder.number(None, lambda store: 0.5), len(recorder.duties.numbers)
        (tensor(0.5000), 1)
    """

    live: Store
    inputs: Sequence[Tensor]
    lowers: bool
    traced: bool = attrs.field(default=True, init=False)
    duties: Duties = attrs.field(factory=Duties, init=False)

    def number(self, store: Any, fn: Callable[[Store], float]) -> Any:  # noqa: ARG002  # as that of eager steps
        """The next input: for a compiler a scalar tensor, else a symbolic number, whose value Python cannot read."""
        self.duties.numbers.append(fn)
        if len(self.duties.numbers) > len(self.inputs):
            raise WantedError
        given = self.inputs[len(self.duties.numbers) - 1]
        return given.to(torch.float32) if self.lowers else given.item()

    def later(self, store: Any, fn: Callable[[Store], None]) -> None:  # noqa: ARG002  # as above
        """Run a callback after the graph."""
        self.duties.looks.append(fn)

    def only_if(self, store: Any, fn: Callable[[Store], bool]) -> None:  # noqa: ARG002  # as above
        """Record a condition, which must hold now."""
        if not fn(self.live):
            raise UnsettledError("this step cannot run as a graph")
        self.duties.conditions.append(fn)

    def refuse(self, why: str) -> None:
        """Stop the trace with a reason."""
        raise UntraceableError(why)
