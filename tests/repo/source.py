"""What the tests of this folder share: the repository's files, read once, and how to find things in their syntax trees."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fnlight"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def nouns() -> set[str]:
    """What fnlight is made of: the name of every module and package in its folder."""
    return {p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")} | {
        p.parent.name for p in PACKAGE.glob("*/__init__.py")
    }


def noun(path: Path) -> str:
    """The module or package of fnlight that a file belongs to; ``__init__`` for the package's own."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    """Where a node stands, as ``path:line``."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def functions(node: ast.AST) -> Iterator[Function]:
    """Every function and method below a node."""
    return (n for n in ast.walk(node) if isinstance(n, Function))


def public(path: Path) -> Iterator[ast.ClassDef | Function]:
    """The public functions and classes of a module; a file whose name starts with an underscore has none."""
    if path.stem.startswith("_") and path.stem != "__init__":
        return
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node


def called(node: ast.AST) -> str:
    """The name of what a call calls, such as ``pytest.raises``; empty where it has none."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) else ""


def names_in_init() -> dict[str, str]:
    """The names that ``fnlight/__init__.py`` takes, with the module each comes from."""
    found: dict[str, str] = {}
    for node in ast.walk(tree(PACKAGE / "__init__.py")):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fnlight."):
            found |= {(alias.asname or alias.name): node.module or "" for alias in node.names}
    return found


def lacking(problems: list[str], what: str) -> str:
    """A message for contributors: what holds here, and each place where it does not."""
    return f"{what}\n  " + "\n  ".join(problems)


def fences(page: Path) -> list[tuple[int, str, str]]:
    """The fenced blocks of a Markdown page: line number of the first line, language, text without the common indent."""
    found: list[tuple[int, str, str]] = []
    opened: tuple[int, str, str, str] | None = None  # line, language, indent, fence
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is None:
            start = re.match(r"^(\s*)(`{3,})\s*([\w+-]*)", line)
            if start:
                opened, lines = (number + 1, start[3], start[1], start[2]), []
        elif line.strip() == opened[3]:
            found.append((opened[0], opened[1], "\n".join(lines) + "\n"))
            opened = None
        else:
            lines.append(line.removeprefix(opened[2]))
    assert opened is None, f"{page}:{opened[0]}: a block that is opened and never closed" if opened else ""
    return found
