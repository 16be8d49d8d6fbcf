"""The wall time of a training: seconds by cause, added up over all of its runs.

A run measures start-up, waiting for batches, evaluation, logging and saving. The rest is the time of the steps. Time is measured on the
host. On an asynchronous device, the wait for the device counts for the host operation that waits.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

CAUSES = ("start", "data", "evaluate", "log", "save", "stall", "lost")
"""The causes other than steps, as fields of `WallTime`."""

_NUMBERS = ("total", *CAUSES)


@attrs.define(eq=False)
class WallTime:
    """Seconds of wall time by cause; changed in place by a run, and saved with its state.

    Args:
        total: The total time. The time between two runs counts only if the first one did not end normally.
        start: From the start of each run to the end of its first step: reading a checkpoint, starting workers, compiling.
        data: Waiting for batches.
        evaluate: Evaluations.
        log: Giving records to sinks.
        save: Saving while the steps wait: copying the state, or writing it in the foreground.
        stall: Waiting for a background save that was not finished when the next one was due.
        lost: After a run that did not end normally: from its last save to its resume. This includes the work that is repeated.
        runs: Number of runs.

    Example:
        >>> times = iter([0.0, 1.0, 1.0, 5.0, 6.0])
        >>> spent = WallTime()
        >>> spent.begin(lambda: next(times))
        >>> spent.started()
        >>> with spent.taken("evaluate"):
        ...     pass
        >>> spent.end()
        >>> spent.total, spent.start, spent.evaluate, spent.step, spent.goodput
        (6.0, 1.0, 4.0, 1.0, 0.16666666666666666)
    """

    total: float = 0.0
    start: float = 0.0
    data: float = 0.0
    evaluate: float = 0.0
    log: float = 0.0
    save: float = 0.0
    stall: float = 0.0
    lost: float = 0.0
    runs: int = 0
    clock: Callable[[], float] = attrs.field(default=time.perf_counter, init=False, repr=False)
    _since: float | None = attrs.field(default=None, init=False, repr=False)  # `total` counts up to here; None: no run is active
    _begun: tuple[float, float] | None = attrs.field(default=None, init=False, repr=False)  # the start of a run before its first step
    _marks: dict[str, tuple[int, list[float]]] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def step(self) -> float:
        """The time of no other cause: the steps, and the user's code between them in a manual loop."""
        return max(0.0, self.total - self._others())

    @property
    def goodput(self) -> float:
        """The fraction of the total that the steps took, in 0..1; 0 if the total is 0."""
        return self.step / self.total if self.total else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds by cause, the steps first; they add up to the total."""
        self.settle()
        return {"step": self.step, **{name: getattr(self, name) for name in CAUSES}}

    def _others(self) -> float:
        return self.start + self.data + self.evaluate + self.log + self.save + self.stall + self.lost

    def begin(self, clock: Callable[[], float], at: float | None = None) -> None:
        """Start a run; does nothing if it has already started.

        Args:
            clock: Returns the time in seconds; used for all measurements of the run.
            at: The start time, in seconds of this clock; None is now.
        """
        if self._since is None:
            self.clock, self.runs = clock, self.runs + 1
            self._since = clock() if at is None else at
            self._begun = (self._since, self._others())
            self._marks.clear()

    def started(self) -> None:
        """End the start-up of a run after its first step: all time without another cause counts as ``start``."""
        self.settle()
        if self._begun is not None and self._since is not None:
            (began, others), self._begun = self._begun, None
            self.start += max(0.0, self._since - began - (self._others() - others))

    def settle(self) -> None:
        """Add the time up to now to the total."""
        if self._since is not None:
            now = self.clock()
            self.total += max(0.0, now - self._since)
            self._since = now

    def end(self) -> None:
        """End a run."""
        self.started()
        self._since = None

    @contextmanager
    def taken(self, cause: str) -> Iterator[None]:
        """Count the time inside this context for a cause, if a run is active.

        Args:
            cause: A name in `CAUSES`.
        """
        began = self.clock()
        try:
            yield
        finally:
            if self._since is not None:
                setattr(self, cause, getattr(self, cause) + max(0.0, self.clock() - began))

    def mark(self, name: str, samples: int) -> None:
        """Start a window.

        Args:
            name: The name of the window.
            samples: Number of samples seen so far.
        """
        self.settle()
        self._marks[name] = (samples, [getattr(self, each) for each in _NUMBERS])

    def window(self, name: str, samples: int) -> dict[str, float]:
        """Rates and fractions of time since the window started; the window is then restarted.

        Args:
            name: The name of the window; without a `mark` it started at 0.
            samples: Number of samples seen so far.

        Returns:
            ``samples/s``, and the fractions ``time/step``, ``time/data`` and so on, which add up to 1.
        """
        seen, before = self._marks.get(name, (0, [0.0] * len(_NUMBERS)))
        self.mark(name, samples)
        passed, *others = (now - then for now, then in zip(self._marks[name][1], before, strict=True))
        shares = [other / passed if passed else 0.0 for other in others]
        found = {f"time/{cause}": share for cause, share in zip(CAUSES, shares, strict=True) if cause != "lost"}
        return {"samples/s": (samples - seen) / passed if passed else 0.0, "time/step": max(0.0, 1.0 - sum(shares)), **found}

    def lose(self, seconds: float) -> None:
        """Count the time between the last save of a run that did not end normally and its resume.

        Args:
            seconds: From the save until now; a negative value counts as 0.
        """
        gap = max(0.0, seconds)
        self.lost, self.total = self.lost + gap, self.total + gap

    def copy(self) -> "WallTime":
        """A copy of the seconds, without an active run."""
        self.settle()
        return attrs.evolve(self)  # copies the arguments only

    def to_json(self) -> dict[str, Any]:
        """The form in which a checkpoint stores it."""
        self.settle()
        return {**{name: getattr(self, name) for name in _NUMBERS}, "runs": self.runs}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "WallTime":
        """Read the result of `to_json`; an older checkpoint has an empty mapping.

        Args:
            found: Untrusted data.

        Raises:
            ValueError: If `to_json` cannot have written it.
        """
        numbers = {name: found.get(name, 0.0) for name in _NUMBERS}
        runs = found.get("runs", 0)
        if type(runs) is not int or not all(type(n) in (int, float) and 0 <= n < math.inf for n in (*numbers.values(), runs)):
            raise ValueError(f"the wall times of a run must be finite seconds of at least 0, but are {dict(found)!r:.80}")
        return cls(**numbers, runs=runs)
