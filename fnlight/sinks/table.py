"""One row per record, for spreadsheets and data frames. Called `table` because ``csv`` is the name of a standard module."""

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any

from fnlight.errors import ConfigError
from fnlight.sinks._files import append, explained, kept, local_path, opened, scalars, sync

_FIRST = ("step", "epoch")


class CSV:
    """A sink that writes one CSV row per record below the header ``step,epoch,NAMES...``, without media.

    If a new metric appears later, the file is rewritten with one more column. Cells without a value are empty. Numbers are written with
    all digits, NaN and infinities as ``nan``, ``inf`` and ``-inf``. When the file is opened again, an incomplete last row of a killed run
    and the rows of steps that are trained again are dropped.

    Args:
        path: The file; parent directories are created.

    Raises:
        ConfigError: If it is not a local path, or (at the first record) if the file exists and is not such a table.
        OSError: If a record cannot be written.

    Example:
        >>> import tempfile
        >>> from fnlight.state import Record
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = CSV(f"{folder}/log.csv")
        ...     sink(Record(10, 0, {"train/loss": 0.5}))
        ...     sink(Record(20, 1, {"val/loss": 0.25}))
        ...     sink.close()
        ...     print(Path(sink.path).read_text(), end="")
        step,epoch,train/loss,val/loss
        10,0,0.5,
        20,1,,0.25
    """

    def __init__(self, path: Any) -> None:
        self.path = local_path("CSV", path)
        self._file: Any = None
        self._step = 0
        self._names: list[str] = []

    def __call__(self, record: Any) -> None:
        """Write one row; new metrics first add columns."""
        values = scalars(record)
        _check(self, values)
        with explained(self, self.path):
            if self._file is None or record.step < self._step:
                self.close()
                self._names = _repair(self.path, record.step)
            new = [name for name in values if name not in self._names]
            if new or not self._names:
                self.close()
                names = [*(self._names or _FIRST), *new]
                _widen(self.path, self._names, names)
                self._names = names
            if self._file is None:
                self._file = opened(self.path)
            cells = [int(record.step), int(record.epoch), *(values.get(name, "") for name in self._names[len(_FIRST) :])]
            append(self._file, _row(cells))
        self._step = record.step

    def flush(self) -> None:
        """Write the data to the disk itself (``fsync``)."""
        if self._file is not None:
            sync(self._file)

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CSV) and self.path == other.path

    def __hash__(self) -> int:
        return hash((CSV, self.path))

    def __repr__(self) -> str:
        return f"CSV({self.path!r})"


def _check(sink: CSV, values: dict[str, float]) -> None:
    for name in values:
        if name in _FIRST or name.splitlines() != [name]:
            raise ConfigError(
                f"{sink!r}: a metric cannot be called {name!r}, because a column needs a unique name on one line; rename the metric"
            )


def _row(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _repair(path: str, step: int) -> list[str]:
    """Drop an incomplete last row and rows of steps that are trained again; return the column names, [] without a header."""
    file = Path(path)
    if not file.is_file():
        return []
    data = file.read_bytes().rstrip(b"\0")  # a file system may leave zeros after the end after a power failure
    header, newline, _ = data.partition(b"\n")
    if not newline and (b"step,epoch".startswith(data) or data.startswith(b"step,epoch,")):  # empty, or an incomplete header
        os.truncate(file, 0)
        return []
    try:
        names = next(csv.reader([header.decode()], strict=True))
        if tuple(names[:2]) != _FIRST or not newline:
            raise ValueError
        end = kept(data, len(header) + 1, step, lambda line: int(line.split(b",", 1)[0]))
    except (ValueError, StopIteration, csv.Error) as error:
        raise ConfigError(
            f"CSV({path!r}): this file is not a table with columns step,epoch,..., so it was not changed; give the path of a new file"
        ) from error
    if end < file.stat().st_size:
        os.truncate(file, end)
    return names


def _widen(path: str, old: list[str], names: list[str]) -> None:
    """Write a copy with a wider header in the same directory, then replace the file by it in one operation."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not old:
        with opened(target) as file:
            append(file, _row(names))
        return
    beside = target.with_name(f".{target.name}.wider")
    try:
        with target.open("rb") as source, beside.open("wb") as wider:
            next(source)
            wider.write(_row(names))
            for line in source:
                wider.write(line[:-1] + b"," * (len(names) - len(old)) + b"\n")
            wider.flush()
            os.fsync(wider.fileno())
        shutil.copymode(target, beside)
        beside.replace(target)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
