"""The pages of docs/api, made from the source: ``python tests/repo/api_pages.py`` writes them, a test compares them.

A page lists the signature and the first line of every public name, so it can be read in a checkout too; the site adds the full docstrings.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.repo.source import PACKAGE, ROOT, Function, tree

API = ROOT / "docs" / "api"


def page_of(noun: str) -> str:
    """The text of the page of a package, or of a flat module such as ``errors``."""
    path = PACKAGE / noun / "__init__.py" if (PACKAGE / noun).is_dir() else PACKAGE / f"{noun}.py"
    said = re.split(r"::\n|\nExample:", ast.get_docstring(tree(path)) or "")[0].strip()
    listed = "\n".join(_listed(noun, path))
    return f"# `fnlight.{noun}`\n\n{_plain(said)}\n\n## Names\n\n{listed}\n\n## Reference\n\n::: fnlight.{noun}\n"


def _plain(text: str) -> str:
    paragraphs = [" ".join(part.split()) for part in text.replace("``", "`").split("\n\n")]
    return "\n\n".join(part if part.endswith((".", ":")) else f"{part}." for part in paragraphs if part)


def _listed(noun: str, path: Path) -> Iterator[str]:
    if path.name != "__init__.py":
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                yield _line(node)
        return
    for name in sorted(_public(path), key=str.lower):
        node = _definition(path, name)
        yield _line(node) if isinstance(node, ast.ClassDef | Function) else f"- `{name}`"


def _public(path: Path) -> list[str]:
    """What ``__all__`` of a package lists."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [n.name for n in tree(path).body if isinstance(n, Function) and not n.name.startswith("_")]


def _definition(path: Path, name: str) -> ast.AST | None:
    """Where a name is defined: here, or in the module that it is imported from."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names] and (node.module or "").startswith("fnlight"):
            target = PACKAGE.parent.joinpath(*(node.module or "").split("."))
            file = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
            return _definition(file, name)
    return None


def _line(node: ast.ClassDef | Function) -> str:
    first = (ast.get_docstring(node) or "").split("\n", 1)[0].replace("``", "`")
    return f"- `{node.name}{_signature(node)}`: {first}"


def _signature(node: ast.ClassDef | Function) -> str:
    if isinstance(node, Function):
        given = ast.unparse(node.args)
        return f"({given})" if node.returns is None else f"({given}) -> {ast.unparse(node.returns)}"
    bases = [ast.unparse(base) for base in node.bases]
    if any(base.endswith(("Error", "Exception", "Warning", "Interrupt")) for base in bases):
        return f"({', '.join(bases)})"
    init = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    call = next((n for n in node.body if isinstance(n, Function) and n.name == "__call__"), None)
    if init is None and "Protocol" in bases and call is not None:
        return ".__call__" + _signature(call).replace("(self, ", "(", 1)
    if init is not None:
        return f"({ast.unparse(init.args)})".replace("(self, ", "(", 1).replace("(self)", "()")
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    shown = [n.target.id for n in fields if isinstance(n.target, ast.Name) and _is_given(n)]
    return f"({', '.join(shown)})"


def _is_given(field: ast.AnnAssign) -> bool:
    text = ast.unparse(field)
    return not text.startswith("_") and "ClassVar" not in text and "init=False" not in text


def nouns_with_pages() -> list[str]:
    """Every package, and the flat modules ``errors`` and ``protocols``."""
    flat = [p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")]
    return sorted([*flat, *(p.parent.name for p in PACKAGE.glob("*/__init__.py"))])


if __name__ == "__main__":
    for old in API.glob("*.md"):
        old.unlink()
    for each in nouns_with_pages():
        (API / f"{each}.md").write_text(page_of(each), encoding="utf-8")
