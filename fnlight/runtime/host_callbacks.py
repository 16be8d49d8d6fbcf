"""The host's part of a step whose kernel may be one graph: what Python has to say before it, and what it looks at behind it.

A stage that needs a number which changes from step to step, or that looks at a tensor, does so through `HostCallbacks`. In an eager step that
happens on the spot. While a kernel is traced, another host stands in its place, which makes a number an input of the graph, and a look
something that is done behind it.
"""

from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen(eq=False, repr=False)
class HostCallbacks:
    """The host of eager steps; `fnlight.compile` puts its own there.

    Args:
        traced: Whether a kernel is being traced, so that no tensor has a value that Python could read.

    Example:
        >>> HostCallbacks().traced
        False
    """

    traced: bool = False

    def number(self, store: Any, fn: Callable[[Any], float]) -> Any:
        """A number that may be another one at every step.

        Args:
            store: The store that the kernel works on.
            fn: Maps the live store, whose ``progress`` is that before the step, to a number.

        Returns:
            A float; in a graph, something to compute with that Python cannot look into.

        Example:
            >>> from types import SimpleNamespace
            >>> HostCallbacks().number(SimpleNamespace(progress=3), lambda store: 0.5**store.progress)
            0.125
        """
        return fn(store)

    def later(self, store: Any, fn: Callable[[Any], None]) -> None:
        """Look at what the kernel has made; behind a graph, once for each of its updates.

        Args:
            store: The store that the kernel works on.
            fn: Called with the live store; it changes no tensors.
        """
        fn(store)

    def only_if(self, store: Any, fn: Callable[[Any], bool]) -> None:
        """Say when a graph of this kernel holds; where it does not, the step is taken without one.

        Args:
            store: The store that the kernel works on.
            fn: Maps the live store to a bool.
        """

    def refuse(self, why: str) -> None:
        """Say that this kernel cannot be one graph.

        Args:
            why: The reason, as it completes a sentence.
        """
