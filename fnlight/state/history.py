"""The history of a training: recorded metrics by step. Stop rules, retentions and plateau schedules are functions of it."""

from collections.abc import Mapping
from typing import Any, SupportsIndex, overload

import attrs


@attrs.frozen
class Record:
    """Metrics at a step.

    Args:
        step: Completed optimizer updates when the metrics were recorded.
        epoch: Completed epochs at that time.
        metrics: Names such as ``val/loss`` to floats; sinks also get media.

    Example:
        >>> Record(10, 1, {"val/loss": 0.5}).metrics["val/loss"]
        0.5
    """

    step: int
    epoch: int
    metrics: Mapping[str, Any]


class History(tuple[Record, ...]):
    """Every evaluation so far, oldest first: a tuple of `Record`s that prints as a table.

    Example:
        >>> print(History().add(Record(10, 1, {"val/loss": 0.5})).add(Record(20, 2, {"val/loss": 0.25})))
        step  epoch  val/loss
          10      1       0.5
          20      2      0.25
    """

    __slots__ = ()

    def add(self, record: Record) -> "History":
        """A history with one more record; records of the same step are merged."""
        if self and self[-1].step == record.step:
            last = tuple.__getitem__(self, -1)
            return History((*self[:-1], Record(record.step, record.epoch, {**last.metrics, **record.metrics})))
        return History((*self, record))

    @overload
    def __getitem__(self, key: SupportsIndex) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> "History": ...
    def __getitem__(self, key: Any) -> Any:
        found = tuple.__getitem__(self, key)
        return History(found) if isinstance(key, slice) else found

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for record in self for name in record.metrics))
        rows = [["step", "epoch", *names]]
        rows += [[str(r.step), str(r.epoch), *(f"{r.metrics[n]:.4g}" if n in r.metrics else "" for n in names)] for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
