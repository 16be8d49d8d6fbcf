"""Hand records to sinks that may fail: training continues, and the state counts the missed records."""

import re
from collections.abc import Sequence
from typing import Any

from fnlight.errors import FaultWarning, FnlightError, warn
from fnlight.runtime import worker_death

FAILED = "failed_sinks"
"""The key of `state.memory` that says which sinks failed."""


def deliver(sinks: Sequence[Any], record: Any, memory: dict[str, Any], told: set[str]) -> None:
    """Hand a record to every sink; a sink that fails stops neither the other sinks nor the training.

    A sink that failed still gets the next record, because a full disk or a lost connection may recover. The first failure of a sink in a
    run is a `FaultWarning`. Every failure is counted in ``memory["failed_sinks"]``, which is saved with the state: the first and last step
    that was missed, the number of records, and the first error. Errors that are not the sink's fault are raised: an error of fnlight, such
    as a metric that is not a number, and the death of a loader's worker, which torch raises in whatever code runs at that moment.

    Args:
        sinks: Functions of a record.
        record: The record.
        memory: ``state.memory``; changed in place.
        told: The sinks that this run has already warned about; changed in place.

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
        except Exception as error:  # an error of the user's sink must not end hours of training
            if worker_death(error) is not None:
                raise
            name, text = name_of(sink), f"{type(error).__name__}: {error}"[:300]
            new = {"first": record.step, "last": record.step, "records": 0, "error": text}
            entry = memory.setdefault(FAILED, {}).setdefault(name, new)
            entry["last"], entry["records"] = record.step, entry["records"] + 1
            if name not in told:
                told.add(name)
                _warn(
                    f"the sink {name} failed at step {record.step} and missed that record: {text}. Training continues, and the sink gets the next "
                    f'record. Missed records are counted in state.memory["{FAILED}"]'
                )


def close_sinks(sinks: Sequence[Any]) -> None:
    """Flush and close every sink that has these methods; a failure is a `FaultWarning`.

    Args:
        sinks: Functions of a record, with or without ``flush()`` and ``close()``.

    Example:
        >>> close_sinks([print])
    """
    for sink in sinks:
        for method in ("flush", "close"):
            try:
                getattr(sink, method, _nothing)()
            except Exception as error:  # noqa: BLE001  # as above
                _warn(f"the sink {name_of(sink)} failed in {method}(): {type(error).__name__}: {error}; its last records may be missing")


def name_of(sink: Any) -> str:
    """The name of a sink.

    Args:
        sink: A function of a record.

    Returns:
        Its ``__name__``, or its ``repr``.

    Example:
        >>> name_of(print)
        'print'
    """
    return re.sub(" at 0x[0-9a-f]+", "", getattr(sink, "__name__", repr(sink)))  # the same in every process


def _warn(text: str) -> None:
    warn(text, FaultWarning)


def _nothing() -> None:
    return None
