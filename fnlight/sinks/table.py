"""One row a record, for spreadsheets and data frames. Called `table` because ``csv`` is the name of a standard module."""

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
    """A sink that writes one row a record below the header ``step,epoch,NAMES...``; media are left out.

    A name that turns up later makes the file be written anew with one more column; cells without a value are empty. Numbers are
    written in full, NaN and infinities as ``nan``, ``inf`` and ``-inf``. A torn last row of a killed run, and rows of steps that are
    trained again, are dropped when the file is opened.

    Args:
        path: The file; parent directories are made.

    Raises:
        ConfigError: If it is no local path, or (at the first record) a file that is no such table.
        OSError: At a record, if the file cannot be written.

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
        """Write one row, below a wider header if there are new names."""
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
        """Bring what was written to the disk itself."""
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
                f"{sink!r}: a metric cannot be called {name!r}, as a column must have a name of its own on one line; rename it"
            )


def _row(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _repair(path: str, step: int) -> list[str]:
    """Drop what is torn or trained again; give the names of the columns, none where there is no header."""
    file = Path(path)
    if not file.is_file():
        return []
    data = file.read_bytes().rstrip(b"\0")  # what a file system may leave behind the end after a power failure
    header, newline, _ = data.partition(b"\n")
    if not newline and (b"step,epoch".startswith(data) or data.startswith(b"step,epoch,")):  # empty, or a torn header
        os.truncate(file, 0)
        return []
    try:
        names = next(csv.reader([header.decode()], strict=True))
        if tuple(names[:2]) != _FIRST or not newline:
            raise ValueError
        end = kept(data, len(header) + 1, step, lambda line: int(line.split(b",", 1)[0]))
    except (ValueError, StopIteration, csv.Error) as error:
        raise ConfigError(
            f"CSV({path!r}): this file is no table with columns step,epoch,...; it is left alone; give the path of a new file"
        ) from error
    if end < file.stat().st_size:
        os.truncate(file, end)
    return names


def _widen(path: str, old: list[str], names: list[str]) -> None:
    """Write the file anew, with a wider header, beside itself; then put it in its place at once."""
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
