"""The worker processes of a loader: they end when the process that they read for ends."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

_ON_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl: which signal comes when the thread that started this process ends


def owner(context: Any) -> int | None:
    """Return the process whose death ends the workers of a loader.

    Args:
        context: The loader's ``multiprocessing_context``; None is the standard one.

    Returns:
        The id of this process. None where a worker cannot follow it: on other systems than Linux; in a thread that may end before the
        process does, for it is the thread that the system watches; where a server forks the workers.

    Example:
        >>> owner(multiprocessing.get_context("forkserver")) is None
        True
    """
    method = (context or multiprocessing).get_start_method()
    watched = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    return os.getpid() if watched and method in ("fork", "spawn") else None


def follow(parent: int | None) -> None:
    """Let the system kill this process as soon as its parent is dead, whatever either of them does at that moment.

    Args:
        parent: What `owner` gave in the parent.

    Example:
        >>> follow(None)
    """
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_ON_DEATH, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be watched
        os.kill(os.getpid(), signal.SIGKILL)
