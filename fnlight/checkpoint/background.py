"""One job at a time in a thread of its own, whose errors are raised where it is waited for."""

import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Runs a job beside the training; never two at a time, and none is ever queued.

    Its thread keeps the process alive until the job is done, also when the interpreter is ending.

    Example:
        >>> background = Background()
        >>> background.begin(lambda: 6 * 7)
        >>> background.wait()
        True
        >>> background.idle
        True
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Say whether no job is under way."""
        return self._thread is None or not self._thread.is_alive()

    def begin(self, job: Callable[[], Any]) -> None:
        """Start a job; the one before it must have been waited for."""
        assert self.idle, "two jobs at a time"
        thread = threading.Thread(target=self._run, args=(job,), name="fnlight save", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # no more threads: it is done at once, which takes longer but loses nothing
            self._run(job)
        else:
            self._thread = thread

    def _run(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  # raised again by wait()
            self.error = error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job is done; its error is raised, once.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            True if no job is under way any more.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return True
