"""Event files for TensorBoard, with scalars, pictures, histograms, texts and hyperparameters."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fnlight.errors import ConfigError
from fnlight.metrics import MEDIA
from fnlight.sinks._events import file_name, head, hparams_begin, hparams_end, metrics_event
from fnlight.sinks._files import append, explained, local_path, opened, scalars, sync


class TensorBoard:
    """A sink that writes TensorBoard's event files: numbers, `Image`, `Histogram`, `Figure` and `Text`.

    Events are in the file as soon as the record was taken. Each opening begins a new file in the directory, and from its first step on
    TensorBoard no longer shows what earlier files hold: a resumed run has no zigzags. A `Figure` is drawn, not closed.

    Args:
        dir: The directory of the run; it is made. Give each run its own.
        hparams: Names to numbers, bools and texts, or nested mappings of them, for the HParams tab; the last value of each scalar
            stands beside them.

    Raises:
        ConfigError: If it is no local path, or the hyperparameters are no mapping.
        OSError: At a record, if the directory cannot be written.

    Example:
        >>> import tempfile
        >>> from fnlight.state import Record
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = TensorBoard(f"{folder}/a", hparams={"lr": 0.1})
        ...     sink(Record(10, 1, {"val/loss": 0.5}))
        ...     sink.close()
        ...     len(list(Path(sink.dir).glob("events.out.tfevents.*")))
        1
    """

    def __init__(self, dir: Any, *, hparams: Mapping[str, Any] | None = None) -> None:
        if hparams is not None and not isinstance(hparams, Mapping):
            raise ConfigError(f"TensorBoard(hparams=...) must be a mapping of names to values, but got {type(hparams).__name__}")
        self.dir, self.hparams = local_path("TensorBoard", dir), dict(hparams or {})
        self._file: Any = None
        self._step = 0

    def __call__(self, record: Any) -> None:
        """Write one event with all metrics of the record."""
        numbers = scalars(record)
        media = {name: value for name, value in record.metrics.items() if isinstance(value, MEDIA)}
        data = metrics_event(time.time(), int(record.step), numbers, media)
        with explained(self, self.dir):
            if self._file is None or record.step < self._step:
                self.close()
                self._open(int(record.step))
            append(self._file, data)
        self._step = record.step

    def _open(self, step: int) -> None:
        folder, now = Path(self.dir), time.time()
        folder.mkdir(parents=True, exist_ok=True)
        file = opened(folder / file_name(folder, now, socket.gethostname()))
        try:
            append(file, head(now, step) + (hparams_begin(now, self.hparams) if self.hparams else b""))
        except OSError:
            file.close()
            raise
        self._file = file

    def flush(self) -> None:
        """Bring what was written to the disk itself."""
        if self._file is not None:
            sync(self._file)

    def close(self) -> None:
        """Close the file; the next record begins another one."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self.hparams:
                with explained(self, self.dir):
                    append(file, hparams_end(time.time()))
        finally:
            file.close()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorBoard) and self.dir == other.dir and self.hparams == other.hparams

    def __hash__(self) -> int:
        return hash((TensorBoard, self.dir))

    def __repr__(self) -> str:
        return f"TensorBoard({self.dir!r}{f', hparams={self.hparams!r}' if self.hparams else ''})"
