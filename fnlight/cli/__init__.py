"""The command line: inspect, verify, compare, export and remove checkpoints, and repeat failed steps.

``fnlight COMMAND --help`` says what each command takes. Exit codes are those of ``diff``: 0 if all is well or the same, 1 if something
is broken or differs, 2 if the command could not run.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from fnlight.checkpoint import printable
from fnlight.cli.changes import export, prune
from fnlight.cli.checks import diff, verify
from fnlight.cli.repeat import replay
from fnlight.cli.show import inspect
from fnlight.errors import FnlightError


def run(args: Sequence[str] | None = None) -> int:
    """Run one command; the entry point of ``fnlight`` and of ``python -m fnlight``.

    Args:
        args: What stands behind ``fnlight``; None takes it from the command line.

    Returns:
        The exit code.

    Example:
        >>> run(["verify", "no/such/run"])
        2
    """
    commands = {fn.__name__: fn for fn in (inspect, verify, diff, export, prune, replay)}
    about = "Look at, check and change fnlight's checkpoints."
    return answered(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="fnlight", description=about, args=args))


def answered(command: Callable[[], int]) -> int:
    """The exit code of a command, whose errors and warnings are lines on the standard error.

    Args:
        command: Does the work.

    Returns:
        Its exit code, or 2 where it could not do what it was told.

    Example:
        >>> answered(lambda: verify("no/such/run"))
        2
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _say
        try:
            return command()
        except BrokenPipeError:  # the reader, such as `head`, has gone
            return 0
        except (FnlightError, OSError) as error:
            _say(str(error))
        except KeyboardInterrupt:
            sys.stderr.write("fnlight: stopped\n")
            return 130
    return 2


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write("\n".join(map(printable, f"fnlight: {message}".split("\n"))) + "\n")


def main() -> None:
    """Run one command and leave with its exit code.

    Example:
        >>> main.__name__
        'main'
    """
    sys.exit(run())
