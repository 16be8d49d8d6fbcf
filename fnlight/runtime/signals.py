"""Signals: SIGTERM, SIGUSR1 and Ctrl-C end a run at a step boundary, not in the middle of a step.

A handler only records the signal. `run`, `evaluate` and `predict` check it between two steps. If they wait for a batch, the wait ends.
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
"""The expected value in type errors of functions that take signals."""

_USUAL = ("SIGTERM", "SIGUSR1", "SIGINT")
_PASSIVE = (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, None)
_HINT = b"\nSIGINT: the run ends after this step and saves; press Ctrl-C again to stop at once\n"


class _Wake(BaseException):
    """Raised by a handler while the process only waits for a batch."""


class Signals:
    """Listens for signals while it is open, as in ``with Signals() as signals:``, and remembers the first signal.

    Previous handlers are called, too, and are restored at the end. A signal that was ignored stays ignored. A second Ctrl-C raises
    ``KeyboardInterrupt`` at once. A `Signals` that is opened inside another one starts with the signal that the outer one has received.

    Args:
        *names: Names of signals; without names: SIGTERM and SIGUSR1, which job schedulers send, and SIGINT (Ctrl-C).
        deadline: Seconds after the first signal until the process is ended, even in the middle of a step or a save, with a message and
            the exit code of the signal; None: no limit.

    Raises:
        ConfigError: If there is no such signal, or the deadline is not a number above 0.

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
            raise ConfigError(f"Signals(deadline=...) must be seconds above 0, or None for no limit, but got {deadline!r}")
        self.names = names or tuple(name for name in _USUAL if name in signal.Signals.__members__)
        self.deadline = deadline
        self.received: str | None = None
        self.noted: str | None = None  # the first signal sent to this process; it becomes `received` once all ranks know it
        self.shared = False  # whether this process is one of several ranks
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
                f"signals reach the main thread only, but this is {threading.current_thread().name}; leave signals=True out here, and open them "
                "in the main thread with `with fl.Signals() as signals:`"
            )
        if self._previous or self._pipe is not None:
            raise ConfigError("this Signals is open already; make another one, which starts with the signal that this one has received")
        self._pid, self.received, self.noted = os.getpid(), None, None
        if self.deadline is not None:
            self._watch(self.deadline)
        for name in self.names:
            number = signal.Signals[name]
            previous = signal.getsignal(number)
            outer = getattr(previous, "__self__", None)
            if isinstance(outer, Signals):
                self.received = self.noted = self.received or outer.received
            if previous not in (signal.SIG_IGN, None):  # None: a handler that Python did not install and cannot restore
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
        """The number of the first signal sent to this process; 0 if there is none."""
        return 0 if self.noted is None else int(signal.Signals[self.noted])

    def agreed(self, number: int) -> None:
        """Record the signal that all ranks have agreed on: its number, or 0 for none."""
        if number and self.received is None:
            self.received = signal.Signals(number).name

    @contextmanager
    def together(self, others: bool) -> Iterator[None]:
        """Inside this context, a signal is received only after all ranks know it, if there are others."""
        before, self.shared = self.shared, self.shared or others
        try:
            yield
        finally:
            self.shared = before

    def alone(self) -> None:
        """From now on this process does not wait for other ranks: a signal sent to it counts as received."""
        self.shared, self.received = False, self.received or self.noted

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def until(self, items: Iterator[Any], single: bool = False) -> Iterator[Any]:
        """Yield items until a signal arrives; a wait for the next item then ends at once.

        Args:
            items: An iterator that may be interrupted while it makes the next item.
            single: True if each rank may stop by itself; False waits until all ranks know the signal.
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
        """Start the thread that ends the process. Handlers tell it about a signal through a pipe, which is safe in a handler."""
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
        f"\n{name}: the run did not end within {deadline:g} s, so the process ends now; an unfinished save is lost, "
        "earlier checkpoints are not: resume from the last one with resume=True\n"
    ).encode("ascii")


def _in_a_child(number: int) -> None:
    """In a forked child: its parent handles Ctrl-C, but SIGTERM ends the child."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def listening() -> tuple[int, ...]:
    """The numbers of the signals that a `Signals` listens for in this process.

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
    """Block these signals while workers start, because the workers get them, too; a worker unblocks them when it is ready.

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
    """Let a worker process survive signals that were sent to the whole process group; its parent ends it later.

    Only the first SIGTERM is ignored: a second one may come from the parent.

    Args:
        numbers: The result of `listening` in the parent.

    Example:
        >>> leave_to_parent(())
    """
    for number in numbers:
        signal.signal(number, _after_the_first() if number == signal.SIGTERM else _nothing)
    if numbers:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _after_the_first() -> Callable[[int, FrameType | None], None]:
    """A handler of SIGTERM that ignores the first one and ends the process at the second."""
    seen: list[int] = []

    def ending(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(0)
        seen.append(number)

    return ending


def _nothing(number: int, frame: FrameType | None) -> None:
    """An empty handler. Programs that the worker starts would inherit SIG_IGN, but not this."""


def exit_code(name: str) -> int:
    """The exit code of a process that a signal ended.

    Args:
        name: The name of a signal, such as ``"SIGTERM"``.

    Returns:
        128 plus the number of the signal; 0 if the name is not a signal.

    Example:
        >>> exit_code("SIGTERM"), exit_code("SIGINT"), exit_code("3 epochs done")
        (143, 130, 0)
    """
    found = signal.Signals.__members__.get(name)
    return 0 if found is None else 128 + found


def worker_death(error: BaseException) -> LoaderError | None:
    """The error for a dead worker. torch raises it in a signal handler, so it can appear in any code.

    Args:
        error: Any exception.

    Returns:
        An error that names the worker; None if the exception is about something else.

    Example:
        >>> worker_death(ValueError("x")) is None
        True
    """
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker (pid"):
        return None
    why = str(error.__cause__).strip() if isinstance(error.__cause__, RuntimeError) else ""  # it may name the signal
    return LoaderError(
        f"{(why or str(error).strip()).rstrip('.')}: this worker process loaded data and died, most often because memory ran out; use fewer "
        "workers or smaller batches and resume; the order of the data does not depend on the number of workers"
    )
