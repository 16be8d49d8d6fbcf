"""Records handed to sinks that may fail: training goes on, and the state says what was missed."""

import re
from collections.abc import Sequence
from typing import Any

from fnlight.errors import FaultWarning, FnlightError, warn
from fnlight.runtime import worker_death

FAILED = "failed_sinks"
"""Where the memory of a state says which sinks failed."""


def deliver(sinks: Sequence[Any], record: Any, memory: dict[str, Any], told: set[str]) -> None:
    """Hand a record to every sink; one that fails keeps neither the others nor the training from going on.

    A sink that failed is given the next record all the same, since a full disk or a lost connection may come back. The first failure of a run
    is a `FaultWarning`; each one is counted in ``memory["failed_sinks"]``, which is saved with the state: the first and last step that was
    missed, how many records, and the first error. What is not the sink's fault is raised: an error of fnlight's own, such as a metric that is
    no number, and the death of a loader's worker, of which torch tells in whatever runs at that moment.

    Args:
        sinks: Functions of a record.
        record: What they are given.
        memory: The memory of the state.
        told: The sinks that this run has warned of; changed in place.

    Example:
        >>> from fnlight.state import Record
        >>> memory = {FAILED: {}}
        >>> deliver([print], Record(1, 0, {}), memory, set())
        Record(step=1, epoch=0, metrics={})
        >>> memory
        {'failed_sinks': {}}
    """
    for sink in sinks:
        try:
            sink(record)
        except FnlightError:
            raise
        except Exception as error:  # whatever a sink of the user's raises, hours of training outweigh it
            if worker_death(error) is not None:
                raise
            name, text = name_of(sink), f"{type(error).__name__}: {error}"[:300]
            new = {"first": record.step, "last": record.step, "records": 0, "error": text}
            entry = memory.setdefault(FAILED, {}).setdefault(name, new)
            entry["last"], entry["records"] = record.step, entry["records"] + 1
            if name not in told:
                told.add(name)
                _warn(
                    f"the sink {name} failed at step {record.step} and misses that record: {text}. Training goes on, and the sink is given the next "
                    f'record; what it misses is counted in state.memory["{FAILED}"]'
                )


def let_go(sinks: Sequence[Any]) -> None:
    """Flush and close every sink that can be; one that fails is a `FaultWarning`.

    Args:
        sinks: Functions of a record, with or without ``flush()`` and ``close()``.

    Example:
        >>> let_go([print])
    """
    for sink in sinks:
        for method in ("flush", "close"):
            try:
                getattr(sink, method, _nothing)()
            except Exception as error:  # noqa: BLE001  # as above
                _warn(
                    f"the sink {name_of(sink)} failed in {method}(): {type(error).__name__}: {error}; what it was given last may be missing"
                )


def name_of(sink: Any) -> str:
    """What a sink is called.

    Args:
        sink: A function of a record.

    Returns:
        Its name, or its text.

    Example:
        >>> name_of(print)
        'print'
    """
    return re.sub(" at 0x[0-9a-f]+", "", getattr(sink, "__name__", repr(sink)))  # the same in every process


def _warn(text: str) -> None:
    warn(text, FaultWarning)


def _nothing() -> None:
    return None
