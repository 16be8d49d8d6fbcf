"""Signals: SIGTERM, SIGUSR1 and Ctrl-C end a run at a step boundary rather than in the middle of one.

A handler only takes a note. `run`, `evaluate` and `predict` read it between two steps, and while they wait for a batch they are woken.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from fnlight.errors import ConfigError, Interrupted, LoaderError

A_SIGNALS = "fl.Signals, open in a with block, or None"
"""What the errors of those that listen say."""

_USUAL = ("SIGTERM", "SIGUSR1", "SIGINT")
_PASSIVE = (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, None)
_HINT = b"\nSIGINT: the run ends after this step and saves; press Ctrl-C again to stop at once\n"


class _Wake(BaseException):
    """Raised by a handler while nothing but a batch is waited for."""


class Signals:
    """Listens for signals while it is open, as in ``with Signals() as signals:``, and remembers the first that came.

    Handlers that were installed before are called as well, and are back in place afterwards; a signal that was ignored stays ignored.
    A second Ctrl-C raises ``KeyboardInterrupt`` at once. One that is opened within another begins with what that one has received.

    Args:
        *names: Names of signals; those that schedulers send, and Ctrl-C, if left out.
        deadline: Seconds after the first signal at which the process is ended, whatever it does, as by ``kill -9`` but with a
            message and the exit code of the signal; None waits as long as it takes.

    Raises:
        ConfigError: If there is no such signal, or the deadline is no number above 0.

    Example:
        >>> with Signals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.received
        'SIGTERM'
    """

    __slots__ = ("_pid", "_pipe", "_previous", "_waiting", "_watcher", "deadline", "names", "noted", "received", "shared")

    def __init__(self, *names: str, deadline: float | None = None) -> None:
        for name in names:
            if name not in signal.Signals.__members__:
                raise ConfigError(f"Signals({name!r}): there is no such signal on this system; give names such as {', '.join(_USUAL)}")
        if deadline is not None and not (isinstance(deadline, int | float) and 0 < deadline < float("inf")):
            raise ConfigError(f"Signals(deadline=...) must be seconds above 0, or None to wait as long as it takes, but got {deadline!r}")
        self.names = names or tuple(name for name in _USUAL if name in signal.Signals.__members__)
        self.deadline = deadline
        self.received: str | None = None
        self.noted: str | None = None  # what this process has been sent; it is received once all that train together know of it
        self.shared = False  # whether others train together with this process
        self._previous: dict[int, Any] = {}
        self._waiting, self._pid = False, 0
        self._pipe: tuple[int, int] | None = None
        self._watcher: threading.Thread | None = None

    def __repr__(self) -> str:
        end = [] if self.deadline is None else [f"deadline={self.deadline}"]
        return f"Signals({', '.join([*map(repr, self.names), *end])})"

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                f"signals reach the main thread only, but this is {threading.current_thread().name}; leave signals=True out here, and listen "
                "in the main thread, as in `with fl.Signals() as signals:`"
            )
        if self._previous or self._pipe is not None:
            raise ConfigError("this Signals is open already; open another one, which begins with what this one has received")
        self._pid, self.received, self.noted = os.getpid(), None, None
        if self.deadline is not None:
            self._watch(self.deadline)
        for name in self.names:
            number = signal.Signals[name]
            previous = signal.getsignal(number)
            outer = getattr(previous, "__self__", None)
            if isinstance(outer, Signals):
                self.received = self.noted = self.received or outer.received
            if previous not in (signal.SIG_IGN, None):  # None: a handler that Python did not install and could not put back
                self._previous[number] = previous
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
        if self._pipe is not None and self._watcher is not None:
            os.write(self._pipe[1], b"\0")
            self._watcher.join()
            for file in self._pipe:
                os.close(file)
        self._pipe = self._watcher = None

    @property
    def number(self) -> int:
        """The number of the first signal that this process has had; 0 while there is none."""
        return 0 if self.noted is None else int(signal.Signals[self.noted])

    def agreed(self, number: int) -> None:
        """Take note of what processes that train together have received: the number of a signal, or 0."""
        if number and self.received is None:
            self.received = signal.Signals(number).name

    @contextmanager
    def together(self, others: bool) -> Iterator[None]:
        """While it lasts, a signal counts once all that train together know of it, if there are others."""
        before, self.shared = self.shared, self.shared or others
        try:
            yield
        finally:
            self.shared = before

    def alone(self) -> None:
        """From here on this process listens for itself: what it has been sent it has received."""
        self.shared, self.received = False, self.received or self.noted

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def until(self, items: Iterator[Any], single: bool = False) -> Iterator[Any]:
        """The items, up to the moment at which a signal comes; the wait for an item ends at once then.

        Args:
            items: An iterator whose next item may take long, and which may be left in the middle of making one.
            single: Of processes that train together, each may leave off by itself; False waits until all know of the signal.
        """
        while True:
            try:
                self._waiting = True
                item = None if self._ends(single) else next(items, None)
            except _Wake:
                return
            finally:
                self._waiting = False
            if item is None or self._ends(single):
                return
            yield item
            item = None  # not kept while the next one is fetched

    def _ends(self, single: bool) -> bool:
        return self.received is not None or (single and self.noted is not None)

    def between(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items, up to the first one that would be begun after a signal came; none is left in the middle.

        Args:
            items: Any iterator.
        """
        while self.received is None:
            item = next(items, None)
            if item is None:
                return
            yield item
            item = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._pid:
            _in_a_child(number)
            return
        again = self.noted is not None
        self.noted = self.noted or name
        self.received = self.received or (None if self.shared else name)
        previous = self._previous.get(number)
        if self._pipe is not None and not again:
            os.write(self._pipe[1], bytes([number]))
        if previous not in _PASSIVE:
            previous(number, frame)
        if name == "SIGINT" and again:
            raise KeyboardInterrupt
        if name == "SIGINT" and not isinstance(getattr(previous, "__self__", None), Signals):
            os.write(2, _HINT)
        if self._waiting and not self.shared:
            self._waiting = False
            raise _Wake

    def _watch(self, deadline: float) -> None:
        """Start the thread that ends the process; it learns of a signal through a pipe, into which a handler may write."""
        self._pipe = os.pipe()
        read, pid = self._pipe[0], self._pid

        def watching() -> None:
            number = os.read(read, 1)[0]
            if not number:
                return
            left, begun = deadline, time.monotonic()
            while left > 0 and not select.select([read], [], [], left)[0]:
                left = deadline - (time.monotonic() - begun)
            if left <= 0 and os.getpid() == pid:
                name = signal.Signals(number).name
                os.write(2, _too_late(name, deadline))
                os._exit(128 + number)

        self._watcher = threading.Thread(target=watching, name="fnlight deadline", daemon=True)
        self._watcher.start()


def _too_late(name: str, deadline: float) -> bytes:
    return (
        f"\n{name}: {deadline:g} s are over and the run has not ended: a save that was under way is abandoned; "
        "the checkpoint before it stands, go on from it with resume=True\n"
    ).encode("ascii")


def _in_a_child(number: int) -> None:
    """In a process that was forked off: its parent decides about Ctrl-C, but it can be terminated."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def listening() -> tuple[int, ...]:
    """The signals for which a `Signals` listens in this process, by number.

    Returns:
        Numbers, ascending.

    Example:
        >>> with Signals("SIGUSR1"):
        ...     listening() == (signal.SIGUSR1,)
        True
        >>> listening()
        ()
    """
    held = {number: getattr(signal.getsignal(number), "__self__", None) for number in signal.valid_signals()}
    return tuple(sorted(int(number) for number, owner in held.items() if isinstance(owner, Signals)))


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back the signals that are listened to while workers are started, which are sent them too; they unblock them when they are ready.

    Example:
        >>> with Signals() as signals, held_back():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(signals.received)
        None
    """
    numbers = listening()
    if not numbers:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(numbers: tuple[int, ...]) -> None:
    """Let a worker process outlive signals that were sent to the whole group, for its parent ends it when it is no longer needed.

    Of SIGTERM only the first is survived: the second may be the parent's.

    Args:
        numbers: What `listening` gave in the parent.

    Example:
        >>> leave_to_parent(())
    """
    for number in numbers:
        signal.signal(number, _after_the_first() if number == signal.SIGTERM else _nothing)
    if numbers:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _after_the_first() -> Callable[[int, FrameType | None], None]:
    """A handler of SIGTERM that lets the first one pass."""
    seen: list[int] = []

    def ending(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(0)
        seen.append(number)

    return ending


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, rather than SIG_IGN, which programs started by the worker would inherit."""


def exit_code(name: str) -> int:
    """The exit code by which a process says that a signal ended it.

    Args:
        name: Such as ``"SIGTERM"``.

    Returns:
        128 and the number of the signal; 0 if it is none.

    Example:
        >>> exit_code("SIGTERM"), exit_code("SIGINT"), exit_code("3 epochs done")
        (143, 130, 0)
    """
    found = signal.Signals.__members__.get(name)
    return 0 if found is None else 128 + found


def worker_death(error: BaseException) -> LoaderError | None:
    """What an exception says of a dead worker. torch raises it in a signal's handler: in whatever happens to run.

    Args:
        error: Any exception.

    Returns:
        The error that names it; None if the exception is about something else.

    Example:
        >>> worker_death(ValueError("x")) is None
        True
    """
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
        return None
    why = str(error.__cause__).strip() if isinstance(error.__cause__, RuntimeError) else ""  # it may name the signal
    return LoaderError(
        f"{(why or str(error).strip()).rstrip('.')}: this process read data for the run and died, most often for want of memory; use fewer "
        "workers or smaller batches and resume: the order of the data does not depend on the number of workers"
    )
