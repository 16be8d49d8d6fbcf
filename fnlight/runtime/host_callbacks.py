"""Host callbacks around a step that may be a compiled graph: numbers that Python computes before it, and checks that run after it.

A stage uses `HostCallbacks` if it needs a number that changes from step to step, or if it reads a tensor. In an eager step the callback
runs at once. While a kernel is traced, `fnlight.compile` replaces this class: a number becomes an input of the graph, and a check runs
after the graph.
"""

from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen(eq=False, repr=False)
class HostCallbacks:
    """The callbacks of eager steps; `fnlight.compile` replaces them while it traces.

    Args:
        traced: True while a kernel is traced; Python cannot read the values of tensors then.

    Example:
        >>> HostCallbacks().traced
        False
    """

    traced: bool = False

    def number(self, store: Any, fn: Callable[[Any], float]) -> Any:
        """A number that may change at every step.

        Args:
            store: The store that the kernel works on.
            fn: Maps the live store, with the ``progress`` before the step, to a number.

        Returns:
            A float; in a graph, a traced number whose value Python cannot read.

        Example:
            >>> from types import SimpleNamespace
            >>> HostCallbacks().number(SimpleNamespace(progress=3), lambda store: 0.5**store.progress)
            0.125
        """
        return fn(store)

    def later(self, store: Any, fn: Callable[[Any], None]) -> None:
        """Run a check after the kernel; with a graph of several updates, once for each update.

        Args:
            store: The store that the kernel works on.
            fn: Called with the live store; it must not change tensors.
        """
        fn(store)

    def only_if(self, store: Any, fn: Callable[[Any], bool]) -> None:
        """Add a condition for the graph of this kernel; if it is false, the step runs without the graph.

        Args:
            store: The store that the kernel works on.
            fn: Maps the live store to a bool.
        """

    def refuse(self, why: str) -> None:
        """Declare that this kernel cannot be compiled as one graph.

        Args:
            why: The reason; it becomes a part of the error message.
        """
