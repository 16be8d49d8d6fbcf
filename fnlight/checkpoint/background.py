"""Run one job at a time in a background thread; its errors are raised by `Background.wait`."""

import threading
from collections.abc import Callable
from typing import Any

from fnlight.runtime import worker_death


class Background:
    """Runs a job in the background of the training; never two at a time, and none is queued.

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
        jobs = [job]  # whoever takes it out does it
        thread = threading.Thread(target=self._run, args=(jobs,), name="fnlight save", daemon=False)
        try:
            thread.start()
        except BaseException as error:  # no more threads, or a signal's handler has raised, before or behind the start
            self._run(jobs)  # it takes longer but loses nothing
            if not isinstance(error, RuntimeError) or thread.ident is not None or worker_death(error) is not None:
                raise
        finally:
            self._thread = None if thread.ident is None else thread

    def _run(self, jobs: list[Callable[[], Any]]) -> None:
        try:
            job = jobs.pop()
        except IndexError:
            return
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
