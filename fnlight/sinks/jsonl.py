"""One JSON object a line, which pandas, jq and any JSON reader understand."""

import json
import math
import os
from pathlib import Path
from typing import Any

from fnlight.errors import ConfigError
from fnlight.sinks._files import append, explained, kept, local_path, opened, scalars, sync


class JSONL:
    """A sink that writes one line a record: ``{"step": 10, "epoch": 1, "metrics": {"train/loss": 0.5}}``; media are left out.

    JSON has no numbers for them, so NaN and infinities are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which Python's
    ``float`` and JavaScript's ``Number`` read. A line is there as soon as the record was taken. A torn last line of a killed run, and
    lines of steps that are trained again, are dropped when the file is opened.

    Args:
        path: The file; parent directories are made.

    Raises:
        ConfigError: If it is no local path, or (at the first record) a file that is no such log.
        OSError: At a record, if the file cannot be written.

    Example:
        >>> import tempfile
        >>> from fnlight.state import Record
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JSONL(f"{folder}/log.jsonl")
        ...     sink(Record(10, 1, {"val/loss": 0.5}))
        ...     sink.close()
        ...     print(Path(sink.path).read_text(), end="")
        {"step": 10, "epoch": 1, "metrics": {"val/loss": 0.5}}
    """

    def __init__(self, path: Any) -> None:
        self.path = local_path("JSONL", path)
        self._file: Any = None
        self._step = 0

    def __call__(self, record: Any) -> None:
        """Write one line."""
        metrics = {name: _readable(value) for name, value in scalars(record).items()}
        row = {"step": int(record.step), "epoch": int(record.epoch), "metrics": metrics}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with explained(self, self.path):
            if self._file is None or record.step < self._step:
                self.close()
                _repair(self.path, record.step)
                self._file = opened(self.path)
            append(self._file, line)
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
        return isinstance(other, JSONL) and self.path == other.path

    def __hash__(self) -> int:
        return hash((JSONL, self.path))

    def __repr__(self) -> str:
        return f"JSONL({self.path!r})"


def _readable(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _repair(path: str, step: int) -> None:
    file = Path(path)
    if not file.is_file():
        return
    data = file.read_bytes().rstrip(b"\0")  # what a file system may leave behind the end after a power failure
    try:
        end = kept(data, 0, step, _step_of)
        if b"\n" not in data and not data.startswith(b'{"step"'[: len(data)]):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"JSONL({path!r}): this file holds lines that are no records, so it is left alone; give the path of a new file"
        ) from error
    if end < file.stat().st_size:
        os.truncate(file, end)


def _step_of(line: bytes) -> int:
    row = json.loads(line)
    if not isinstance(row, dict) or row.keys() != {"step", "epoch", "metrics"}:
        raise ValueError
    return int(row["step"])
