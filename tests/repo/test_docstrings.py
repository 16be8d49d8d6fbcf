"""The docstring template: one line of what it is, ``Args:`` by name, ``Returns:``, ``Raises:`` where so, an ``Example:`` that runs."""

import ast
import re
from pathlib import Path

import pytest

from tests.repo.source import PACKAGE, Function, functions, lacking, modules, noun, place, public, tree

WITHOUT_EXAMPLE = {
    "protocols": "types without code; `fnlight.pipe.pipe` shows them at work",
    "errors": "exceptions say in one line what happened; the functions that raise them show when",
}
"""Modules whose functions and classes need no ``Example:``, each with the reason."""


def _first_line(node: ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef | ast.Module) -> str:
    return (ast.get_docstring(node) or "").split("\n", 1)[0]


def _section(docstring: str, title: str) -> str:
    """The text of a section of a Google style docstring."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.M)
    return found[1] if found else ""


def _parameters(node: Function) -> list[str]:
    a = node.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    return [n for n in names if n not in ("self", "cls") and not n.startswith("_")]


def _fields(node: ast.ClassDef) -> list[str]:
    """What the constructor of a class takes: the parameters of ``__init__``, or the annotated fields of a record."""
    init = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    if init is not None:
        return _parameters(init)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    given = [n for n in fields if "ClassVar" not in ast.unparse(n.annotation) and "init=False" not in ast.unparse(n)]
    return [n.target.id for n in given if isinstance(n.target, ast.Name) and not n.target.id.startswith("_")]


def _is_bare(node: ast.ClassDef) -> bool:
    """Say whether a class is a protocol, an exception or a warning: nobody constructs it with arguments of its own."""
    bases = [ast.unparse(base) for base in node.bases]
    return any(base == "Protocol" or base.endswith(("Error", "Exception", "Warning")) for base in bases)


def _returns(node: Function) -> bool:
    managed = any("contextmanager" in ast.unparse(d) for d in node.decorator_list)
    return not managed and node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn", "Never")


def _problems(path: Path, node: Function | ast.ClassDef) -> list[str]:
    at, docstring = f"{place(path, node)}: {node.name}", ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef) and _is_bare(node):
        return [] if _first_line(node).endswith(".") else [f"{at}: the first line must be a sentence and end with a period"]
    found = [] if _first_line(node).endswith(".") else [f"{at}: the first line must be a sentence and end with a period"]
    names = _parameters(node) if isinstance(node, Function) else _fields(node)
    documented = re.findall(r"^\s*\*{0,2}([\w, `*]+):", _section(docstring, "Args"), re.M)
    known = {n.strip(" `*") for line in documented for n in line.split(",")}
    found += [f"{at}: Args: says nothing about {name}" for name in names if name not in known]
    if isinstance(node, Function) and _returns(node) and not (_section(docstring, "Returns") or _section(docstring, "Yields")):
        found.append(f"{at}: returns {ast.unparse(node.returns) if node.returns else ''}, but has no Returns:")
    if ">>>" not in _section(docstring, "Example") and noun(path) not in WITHOUT_EXAMPLE:
        found.append(f"{at}: has no Example: with >>>, which runs as a test")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_and_classes_follow_the_template(path: Path) -> None:
    """Every public function and class says what it is, what it takes and gives, and shows it at work."""
    problems = [p for node in public(path) for p in _problems(path, node)]
    assert not problems, lacking(problems, "docstrings (see `fold_in` in fnlight/tensors/rng.py for one that is complete):")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_public_methods_say_what_they_are(path: Path) -> None:
    """Every module and every public method has a docstring whose first line is a sentence."""
    wrong = [] if _first_line(tree(path)).endswith((".", "::", ":")) else [f"{place(path, tree(path))}: the module"]
    for node in public(path):
        if isinstance(node, ast.ClassDef):
            methods = [m for m in functions(node) if m in node.body and not m.name.startswith("_")]
            wrong += [
                f"{place(path, m)}: {node.name}.{m.name}" for m in methods if not _first_line(m).endswith(".") and not _is_overload(m)
            ]
    assert not wrong, lacking(wrong, "a docstring must begin with a line that says what it is and ends with a period:")


def _is_overload(node: Function) -> bool:
    return any(ast.unparse(d) == "overload" for d in node.decorator_list)
