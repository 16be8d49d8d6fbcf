"""Progress for people: a bar on a terminal, plain lines elsewhere. It keeps its own time and starts no thread."""

import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import attrs

from fnlight.errors import ConfigError
from fnlight.sinks._files import scalars

_BROKEN = (OSError, ValueError, AttributeError)  # what a stream raises that broke, was closed, or is None
_FRAME = 0.1  # seconds between two drawings of the bar
_USUAL = ("train/loss", "val/loss")
_OTHERS = 3  # further metrics that are shown if none were chosen
_TRAINING = ("train/", "train_epoch/", "lr/", "time/", "samples/")  # any other name with a slash is that of an evaluation


class _View(NamedTuple):
    """What is shown at one moment."""

    step: int
    total: int | None
    epoch: int
    elapsed: float
    rate: float | None
    left: float | None
    samples: float | None
    waited: float | None
    values: dict[str, float | None]

    def times(self) -> list[str]:
        parts = [] if self.rate is None else [f"{_short(self.rate)} steps/s"]
        parts += [] if self.samples is None else [f"{_short(self.samples)} samples/s"]
        parts += [] if self.waited is None else [f"data {self.waited:.0%}"]
        parts.append(f"{_clock(self.elapsed)} elapsed")
        return parts if self.left is None else [*parts, f"{_clock(self.left)} left"]

    def metrics(self) -> list[str]:
        return [f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in self.values.items()]


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class _Stream:
    """A stream that takes any text and never fails: once it is broken or closed, what is written to it is lost."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(*_BROKEN):
            self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(*_BROKEN):
            self.stream.flush()

    def isatty(self) -> bool:
        return _is_terminal(self.stream)

    def fileno(self) -> int:
        return self.stream.fileno()


class _Lines:
    """Plain lines."""

    def __init__(self, stream: Any) -> None:
        self.stream = _Stream(stream)

    def show(self, view: _View, own: dict[str, float]) -> None:
        total = "" if view.total is None else f"/{view.total}"
        metrics = view._replace(values={name: value for name, value in view.values.items() if name in own}).metrics()
        line = "  ".join([f"step {view.step}{total}", f"epoch {view.epoch}", *metrics, *view.times()])
        self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Nothing is held."""


class _Bar:
    """A bar that is drawn by hand, so that nothing runs beside the training."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console as Screen  # heavy, for terminals only
        from rich.live import Live

        shared = stream in (sys.stdout, sys.stderr)  # then prints that go to the terminal are put above the bar
        file: Any = _Stream(stream)
        self.live = Live(
            console=Screen(file=file, force_terminal=True),
            auto_refresh=False,
            redirect_stdout=shared and _is_terminal(sys.stdout),
            redirect_stderr=shared and _is_terminal(sys.stderr),
        )
        self.live.start()

    def show(self, view: _View, own: dict[str, float]) -> None:  # noqa: ARG002  # a bar shows the newest value of each name
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counted = f"{view.step}/{view.total}" if view.total is not None else f"{view.step} steps"
        cells: list[Any] = [Text(text) for text in (f"epoch {view.epoch}", counted, *view.times())]
        if view.total is not None:
            cells.insert(1, ProgressBar(total=max(view.total, 1), completed=view.step if view.total else 1))
        row = Table.grid(padding=(0, 1))
        for cell in cells:
            is_bar = isinstance(cell, ProgressBar)  # the bar gives way first where the terminal is narrow
            row.add_column(no_wrap=not is_bar, overflow="ellipsis", max_width=24 if is_bar else None)
        row.add_row(*cells)
        metrics = Text("  ".join(view.metrics()), no_wrap=True, overflow="ellipsis")
        self.live.update(Group(row, metrics) if view.values else row, refresh=True)

    def close(self) -> None:
        self.live.stop()


@attrs.define(eq=False, repr=False)
class _Run:
    """What the console knows between opening and closing."""

    display: Any
    ends: Callable[[], Any]
    first_step: int
    first_time: float
    step: int
    shown: float = -math.inf
    late: Any = None  # a record that came too early to be shown
    timed: float = 0.0  # seconds of which it is known what they went to
    last: float = 0.0  # when a record came that knew
    seen: float = 0.0  # samples in them
    waited: float = 0.0  # seconds of them in which a step waited for data
    values: dict[str, float | None] = attrs.Factory(dict)

    def count(self, own: dict[str, float], now: float) -> None:
        """Note what a record says of the time since the one before."""
        if "samples/s" in own and "time/data" in own:
            passed = now - self.last
            self.timed, self.last = self.timed + passed, now
            self.seen, self.waited = self.seen + own["samples/s"] * passed, self.waited + own["time/data"] * passed


def _names(value: Any) -> tuple[str, ...] | None:
    names = value if value is None else (value,) if isinstance(value, str) else tuple(value)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise ConfigError(f"Console(metrics=...) must be names such as 'val/loss', or None, but got {value!r}")
    return names


def _total(_: Any, __: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"Console(total_steps=...) must be a number of steps, or None where it is unknown, but got {value!r}")


def _interval(_: Any, __: Any, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ConfigError(f"Console(interval=...) must be seconds, at least 0, but got {value!r}")


@attrs.define(repr=False, unsafe_hash=True)
class Console:
    """A sink that shows progress: a bar on a terminal, else a line every few seconds and at every evaluation.

    It shows steps, rate, elapsed and remaining time, the newest metrics and, where records tell, samples a second and how much of the time
    steps waited for data. Rate and remaining time count the steps seen since it was
    opened, so a resumed run is not flattered. A stream that breaks or is closed ends the display, never the training.

    Args:
        total_steps: Steps at which the run ends; None where it is unknown, and then no remaining time is shown.
        metrics: Names to show; None shows train/loss, val/loss and the first three others.
        interval: Seconds between two plain lines; records of evaluations are shown at once, and the last record always.
        stream: Where to; None is ``sys.stderr`` as it is at the first record, so that a program's output stays its own.
        clock: Gives the time in seconds.
        force_terminal: True draws the bar on any stream, False writes lines on any; None asks the stream. A dumb terminal
            (``TERM=dumb``) always gets lines.

    Raises:
        ConfigError: If an argument cannot mean anything.

    Example:
        >>> import sys
        >>> from fnlight.state import Record
        >>> times = iter([0.0, 2.0])
        >>> console = Console(total_steps=30, interval=0, stream=sys.stdout, clock=lambda: next(times), force_terminal=False)
        >>> console(Record(10, 0, {"train/loss": 0.5}))
        step 10/30  epoch 0  train/loss 0.5  0:00 elapsed
        >>> console(Record(20, 1, {"val/loss": 0.25}))
        step 20/30  epoch 1  val/loss 0.25  5 steps/s  0:02 elapsed  0:02 left
    """

    total_steps: int | None = attrs.field(default=None, validator=_total)
    metrics: Sequence[str] | None = attrs.field(default=None, converter=_names)
    interval: float = attrs.field(default=5.0, validator=_interval)
    stream: Any = None
    clock: Callable[[], float] = time.monotonic
    force_terminal: bool | None = None
    _run: _Run | None = attrs.field(default=None, init=False, eq=False)

    def __call__(self, record: Any) -> None:
        """Take a record; show it if it is time."""
        now, own = self.clock(), scalars(record)
        if self._run is None or record.step < self._run.step:
            self.close()
            self._run = self._opened(int(record.step), now)
        run = self._run
        run.step = record.step
        self._note(run, own)
        run.count(own, now)
        pace = _FRAME if isinstance(run.display, _Bar) else self.interval
        if now - run.shown >= pace or any(_is_evaluation(name) for name in own):
            self._show(run, record, own, now)
        else:
            run.late = record

    def _opened(self, step: int, now: float) -> _Run:
        stream = sys.stderr if self.stream is None else self.stream
        terminal = _is_terminal(stream) if self.force_terminal is None else self.force_terminal
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        display: Any = _Bar(stream) if terminal and not dumb else _Lines(stream)
        ends = weakref.finalize(self, display.close)  # a bar that nobody closes hides the cursor: close it at the latest at exit
        return _Run(
            display=display, ends=ends, first_step=step, first_time=now, step=step, last=now, values=dict.fromkeys(self.metrics or ())
        )

    def _note(self, run: _Run, own: dict[str, float]) -> None:
        for name, value in own.items():
            if name in run.values or (self.metrics is None and _is_shown(name, run.values)):
                run.values[name] = value

    def _show(self, run: _Run, record: Any, own: dict[str, float], now: float) -> None:
        run.shown, run.late = now, None
        elapsed, done = now - run.first_time, record.step - run.first_step
        rate = done / elapsed if done and elapsed > 0 else None
        left = max(self.total_steps - record.step, 0) / rate if rate and self.total_steps is not None else None
        samples, waited = (run.seen / run.timed, run.waited / run.timed) if run.timed else (None, None)
        view = _View(
            step=record.step,
            total=self.total_steps,
            epoch=record.epoch,
            elapsed=elapsed,
            rate=rate,
            left=left,
            samples=samples,
            waited=waited,
            values=_ordered(run.values),
        )
        run.display.show(view, own)

    def flush(self) -> None:
        """Nothing waits: what is shown is written at once."""

    def close(self) -> None:
        """Show the last record if it was not, and end the bar; the next record begins another one."""
        run, self._run = self._run, None
        if run is None:
            return
        if run.late is not None:
            self._show(run, run.late, scalars(run.late), self.clock())
        run.ends()

    def __repr__(self) -> str:
        fields = [field for field in attrs.fields(type(self)) if field.init]
        changed = [(field.name, getattr(self, field.name)) for field in fields if getattr(self, field.name) != field.default]
        return f"Console({', '.join(f'{name}={value!r}' for name, value in changed)})"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False


def _is_evaluation(name: str) -> bool:
    return "/" in name and not name.startswith(_TRAINING)


def _is_shown(name: str, shown: dict[str, Any]) -> bool:
    others = sum(other not in _USUAL for other in shown)
    return name in _USUAL or (others < _OTHERS and not name.startswith(("train_epoch/", "time/", "samples/")))


def _ordered(values: dict[str, float | None]) -> dict[str, float | None]:
    first = {name: values[name] for name in _USUAL if name in values}
    return {**first, **values}
