"""How the commands print: tables in colour on a terminal, plain columns where the output goes to a file or another program.

Names come from files of strangers: what a terminal would obey is printed as an escape.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fnlight.checkpoint import printable

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
"""A path or URL."""

Code = Annotated[str | None, tyro.conf.arg(metavar="MODULE:NAME")]
"""Where something lies in the user's code."""

_WIDE = 10_000  # columns if the output is not a terminal: a line is never broken


def console() -> Console:
    """Where the commands print to.

    Returns:
        A console on the standard output.

    Example:
        >>> console().print("all is well")
        all is well
    """
    return Console(file=sys.stdout, highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDE)


def line(*parts: str) -> None:
    """Print a line of text as it is.

    Args:
        *parts: Texts, with spaces between them.

    Example:
        >>> line("3", "checkpoints")
        3 checkpoints
    """
    console().print(Text("\n".join(map(printable, " ".join(parts).split("\n")))))


def table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table.

    Args:
        title: Stands above it; empty for none.
        names: The names of the columns; empty texts show none.
        rows: Texts, one for each column.
        left: How many columns, from the first on, are set to the left; numbers stand to the right.

    Example:
        >>> table("", ["name", "size"], [["model", "12"], ["optimizer", "345"]])
        name       size
        model        12
        optimizer   345
    """
    out = console()
    plain = not out.is_terminal
    found = Table(
        box=None if plain else box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="" if plain else "bold",
        show_header=any(names),
    )
    for i, name in enumerate(names):
        found.add_column(printable(name), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        found.add_row(*(Text(printable(cell)) for cell in row))
    if title:
        out.print(Text(title, style="" if plain else "bold cyan"))
    if plain:
        with out.capture() as captured:
            out.print(found)
        sys.stdout.write("".join(f"{each.rstrip()}\n" for each in captured.get().splitlines()))
    else:
        out.print(found)


def count(number: int, noun: str) -> str:
    """Format a number with its noun.

    Args:
        number: How many.
        noun: What one of them is called.

    Returns:
        A text.

    Example:
        >>> count(1, "tensor"), count(1200, "step")
        ('1 tensor', '1,200 steps')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Format a number of bytes for people.

    Args:
        number: How many.

    Returns:
        A text.

    Example:
        >>> size(512), size(3 * 1024**2)
        ('512 B', '3.0 MiB')
    """
    left = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if left < 1024:
            return f"{left:.0f} B" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1024
    return f"{left:.1f} TiB"
