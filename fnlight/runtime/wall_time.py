"""Where the time of a training went: seconds by cause, added up over all of its runs.

A run notes what does not make the model better: starting, waiting for batches, evaluating, logging, saving. What is left is the steps.
The seconds are those of the host: on a device that works behind it, a wait for the device falls to whatever on the host waits for it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

CAUSES = ("start", "data", "evaluate", "log", "save", "stall", "lost")
"""What takes time beside the steps, as fields of `WallTime`."""

_NUMBERS = ("total", *CAUSES)


@attrs.define(eq=False)
class WallTime:
    """Seconds of wall time by cause; changed in place by a run, and saved with its state.

    Args:
        total: All of it; between two runs of which the first one ended in order, nothing is counted.
        start: From the beginning of each run until its first step is done: reading a checkpoint, starting workers, compiling.
        data: Waiting for batches.
        evaluate: Evaluations.
        log: Sending records to sinks.
        save: Saving, as far as the steps wait for it: copying, or writing in the foreground.
        stall: Waiting for a save in the background that had not ended when the next was due.
        lost: From the last save of a run that did not end in order until it went on: work that is done again, and the time in between.
        runs: How many runs there were.

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
    _since: float | None = attrs.field(default=None, init=False, repr=False)  # up to when the total counts; None where no run is under way
    _begun: tuple[float, float] | None = attrs.field(default=None, init=False, repr=False)  # of a run whose first step is not done
    _marks: dict[str, tuple[int, list[float]]] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def step(self) -> float:
        """What no cause took: the steps themselves, and whatever the loop's owner does between them."""
        return max(0.0, self.total - self._others())

    @property
    def goodput(self) -> float:
        """The steps' share of all, in 0..1; 0 where nothing was counted yet."""
        return self.step / self.total if self.total else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds by cause, the steps first; they add up to the total."""
        self.settle()
        return {"step": self.step, **{name: getattr(self, name) for name in CAUSES}}

    def _others(self) -> float:
        return self.start + self.data + self.evaluate + self.log + self.save + self.stall + self.lost

    def begin(self, clock: Callable[[], float], at: float | None = None) -> None:
        """A run begins; nothing happens where it has begun already.

        Args:
            clock: Gives seconds; whatever is timed in the run asks it.
            at: When it began, in seconds of this clock; None is now.
        """
        if self._since is None:
            self.clock, self.runs = clock, self.runs + 1
            self._since = clock() if at is None else at
            self._begun = (self._since, self._others())
            self._marks.clear()

    def started(self) -> None:
        """The first step of a run is done: what no other cause took until now was the start."""
        self.settle()
        if self._begun is not None and self._since is not None:
            (began, others), self._begun = self._begun, None
            self.start += max(0.0, self._since - began - (self._others() - others))

    def settle(self) -> None:
        """Count the time up to now."""
        if self._since is not None:
            now = self.clock()
            self.total += max(0.0, now - self._since)
            self._since = now

    def end(self) -> None:
        """A run ends."""
        self.started()
        self._since = None

    @contextmanager
    def taken(self, cause: str) -> Iterator[None]:
        """Count what happens inside as taken by a cause, where a run is under way.

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
        """Begin a window.

        Args:
            name: Whose it is.
            samples: Samples seen so far.
        """
        self.settle()
        self._marks[name] = (samples, [getattr(self, each) for each in _NUMBERS])

    def window(self, name: str, samples: int) -> dict[str, float]:
        """What a log shows of the time since the window began; it begins anew.

        Args:
            name: Whose it is; what was never marked is counted from the beginning.
            samples: Samples seen so far.

        Returns:
            ``samples/s``, and the shares ``time/step``, ``time/data`` and so on, which add up to 1.
        """
        seen, before = self._marks.get(name, (0, [0.0] * len(_NUMBERS)))
        self.mark(name, samples)
        passed, *others = (now - then for now, then in zip(self._marks[name][1], before, strict=True))
        shares = [other / passed if passed else 0.0 for other in others]
        found = {f"time/{cause}": share for cause, share in zip(CAUSES, shares, strict=True) if cause != "lost"}
        return {"samples/s": (samples - seen) / passed if passed else 0.0, "time/step": max(0.0, 1.0 - sum(shares)), **found}

    def lose(self, seconds: float) -> None:
        """A run did not end in order: so long after its last save, the next one goes on from there.

        Args:
            seconds: From the save until now; below 0 counts as nothing.
        """
        gap = max(0.0, seconds)
        self.lost, self.total = self.lost + gap, self.total + gap

    def copy(self) -> "WallTime":
        """The same seconds, of which no run is under way."""
        self.settle()
        return attrs.evolve(self)  # which takes the arguments only

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        self.settle()
        return {**{name: getattr(self, name) for name in _NUMBERS}, "runs": self.runs}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "WallTime":
        """What `to_json` gave; an empty mapping is that of a checkpoint that knows nothing of it.

        Args:
            found: Untrusted.

        Raises:
            ValueError: If it is nothing that `to_json` gives.
        """
        numbers = {name: found.get(name, 0.0) for name in _NUMBERS}
        runs = found.get("runs", 0)
        if type(runs) is not int or not all(type(n) in (int, float) and 0 <= n < math.inf for n in (*numbers.values(), runs)):
            raise ValueError(f"the times of a run are {dict(found)!r:.80}")
        return cls(**numbers, runs=runs)
