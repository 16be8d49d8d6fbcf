"""Retry calls to a remote store after a temporary failure, such as a lost connection or a busy server.

The library tenacity (9.2.1) would replace the loop in `retried`, 8 lines. Most lines here decide which errors of a store are temporary,
which it does not know, and its import takes 54 ms.
"""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

WAITS = (0.1, 0.4, 1.6, 6.4)
"""Seconds between attempts; there is one attempt more than there are waits."""

_PASSING = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionClosedError",
    "HTTPClientError",
    "IncompleteRead",
    "ServerDisconnectedError",
}
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def retried(fn: Callable[[], T], sleep: Callable[[float], Any]) -> T:
    """Call a function again while it fails for a temporary reason.

    Args:
        fn: What is tried; it must not matter if it was done in part.
        sleep: Waits for seconds.

    Returns:
        What it gives.

    Example:
        >>> answers = [TimeoutError(), 3]
        >>> def ask():
        ...     found = answers.pop(0)
        ...     if isinstance(found, Exception):
        ...         raise found
        ...     return found
        >>> retried(ask, sleep=print)
        0.1
        3
    """
    for wait in WAITS:
        try:
            return fn()
        except Exception as error:
            if not transient(error):
                raise
        sleep(wait)
    return fn()


def transient(error: BaseException) -> bool:
    """Say whether a failure, or its cause, is temporary: timeouts, lost connections, and servers that are busy or broken.

    Args:
        error: What a store raised; each has errors of its own, and wraps those of its client.

    Returns:
        Whether to try again.

    Example:
        >>> transient(ConnectionResetError()), transient(FileNotFoundError())
        (True, False)
    """
    if isinstance(error, _LASTING):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, TimeoutError | ConnectionError) or names & _PASSING:
        return True
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    inner = error.__cause__ or error.__context__
    return inner is not None and transient(inner)


def _status(error: Any) -> int | None:
    """The status of an HTTP answer, as clients of S3 and others keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    return next((getattr(error, name) for name in ("status", "status_code", "code") if isinstance(getattr(error, name, None), int)), None)
