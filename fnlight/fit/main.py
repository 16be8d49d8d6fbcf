"""`main`: run a script's main function, and exit with the code that cluster schedulers expect."""

import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fnlight.errors import Interrupted
from fnlight.runtime import exit_code
from fnlight.state import TrainState


def main(fn: Callable[[], Any]) -> NoReturn:
    """Run a script's main function, and exit with a code that says how it ended.

    If a signal stopped the returned state, an evaluation or a prediction, the code is 128 plus the number of the signal: 143 for SIGTERM,
    130 for Ctrl-C. Otherwise it is 0, or 1 after an exception, as usual.

    Args:
        fn: Takes no arguments. It returns a state, or several in a list or a mapping. An integer is an exit code; other values are ignored.

    Raises:
        SystemExit: Always, unless `fn` raises something else.

    Example:
        >>> main(lambda: None)
        Traceback (most recent call last):
        SystemExit: 0
    """
    try:
        code = _code(fn())
    except Interrupted as error:
        sys.stderr.write(f"{error}\n")
        code = exit_code(error.args[0])
    except KeyboardInterrupt:
        sys.stderr.write("stopped at once by Ctrl-C\n")
        code = 128 + signal.SIGINT
    sys.exit(code)


def _code(result: Any) -> int:
    if isinstance(result, TrainState):
        return exit_code(result.stopped or "")
    if isinstance(result, bool | str | bytes):
        return 0
    if isinstance(result, int):
        return result
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return max((_code(each) for each in result if isinstance(each, TrainState)), default=0)
    return 0
