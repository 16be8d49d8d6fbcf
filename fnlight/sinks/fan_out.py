"""Several sinks as one."""

from contextlib import ExitStack
from typing import Any

import attrs

from fnlight.errors import ConfigError


@attrs.frozen(repr=False)
class FanOut:
    """A sink that hands each record to several sinks; see `fan_out`.

    Args:
        sinks: Functions of a record, with or without ``flush()`` and ``close()``.

    Example:
        >>> FanOut((print,))
        fan_out(print)
    """

    sinks: tuple[Any, ...]

    def __call__(self, record: Any) -> None:
        """Hand a record to every sink, in order; one that fails does not keep it from the others."""
        _all([(sink, (record,)) for sink in self.sinks])

    def flush(self) -> None:
        """Flush those that can be flushed."""
        _all([(getattr(sink, "flush", _nothing), ()) for sink in self.sinks])

    def close(self) -> None:
        """Close those that can be closed."""
        _all([(getattr(sink, "close", _nothing), ()) for sink in self.sinks])

    def __repr__(self) -> str:
        return f"fan_out({', '.join(getattr(sink, '__name__', repr(sink)) for sink in self.sinks)})"


def fan_out(*sinks: Any) -> FanOut:
    """Make one sink of several.

    Args:
        *sinks: Functions of a record, with or without ``flush()`` and ``close()``.

    Returns:
        A sink. Every sink gets every record even if another one fails; the error is raised afterwards.

    Raises:
        ConfigError: If one is not callable.

    Example:
        >>> from fnlight.state import Record
        >>> steps, losses = [], []
        >>> both = fan_out(lambda record: steps.append(record.step), lambda record: losses.append(record.metrics["loss"]))
        >>> both(Record(10, 0, {"loss": 0.5}))
        >>> steps, losses
        ([10], [0.5])
    """
    for sink in sinks:
        if not callable(sink):
            raise ConfigError(f"fan_out takes functions of a record, but got {type(sink).__name__}: {sink!r:.60}")
    return FanOut(sinks)


def _all(calls: list[tuple[Any, tuple[Any, ...]]]) -> None:
    with ExitStack() as stack:  # makes all its calls, last one first, whatever any of them raises
        for call, args in reversed(calls):
            stack.callback(call, *args)


def _nothing() -> None:
    return None
