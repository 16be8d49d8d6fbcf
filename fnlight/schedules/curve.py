"""The type of a schedule: a function of a count whose ``repr`` is the code that makes it."""

from collections.abc import Callable

import attrs


@attrs.frozen(eq=False, repr=False)
class Curve:
    """A schedule whose ``repr`` is the code that makes it.

    Args:
        text: That code.
        fn: Maps a count (0 or more) to a factor.
        total: The count from which the schedule keeps its last value; None if it has no end.

    Example:
        >>> Curve("halves()", lambda count: 0.5**count)
        halves()
    """

    text: str
    fn: Callable[[int], float]
    total: int | None = None

    def __call__(self, count: int) -> float:
        """Map completed steps (or epochs, or samples) to the factor of the base learning rate."""
        return self.fn(count)

    def __repr__(self) -> str:
        return self.text
