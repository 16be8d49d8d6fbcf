"""Floors: a module imports only from lower floors, so that whoever reads one never has to look up."""

import ast
import re
from pathlib import Path

from tests.repo.source import PACKAGE, ROOT, called, functions, lacking, modules, noun, nouns, place, tree

FLOORS = {
    1: {"errors", "protocols"},
    2: {"tensors", "runtime"},
    3: {"metrics", "schedules"},
    4: {"optim", "sinks"},
    5: {"state"},
    6: {"checkpoint", "triggers", "pipe"},
    7: {"data"},
    8: {"gradients", "precision"},
    9: {"loop", "parallel"},
    10: {"step"},
    11: {"nonfinite", "compile", "testing", "report"},
    12: {"fit"},
    13: {"cli", "__init__"},
    14: {"__main__"},
}
"""One row a floor: a package imports from rows above its own. Within a package, modules have an order, too."""

FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}


def _imported(path: Path, node: ast.AST) -> list[str]:
    """The nouns of fnlight that a node imports; ``__init__`` stands for the facade itself."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
        base = path.relative_to(PACKAGE.parent).parts[: -node.level]
        names = [".".join([*base, node.module or ""]).rstrip(".")]
    elif isinstance(node, ast.ImportFrom):
        names = [f"fnlight.{alias.name}" for alias in node.names] if node.module == "fnlight" else [node.module or ""]
    else:
        return []
    parts = [name.split(".") for name in names if name.split(".")[0] == "fnlight"]
    return [p[1] if len(p) > 1 and p[1] in nouns() else "__init__" for p in parts]


def test_every_module_stands_on_a_floor() -> None:
    """Every module of the package has a floor."""
    missing = sorted(nouns() - FLOOR.keys())
    assert not missing, f"give {missing} a floor in FLOORS of {Path(__file__).name}: one above everything that it imports"


def test_the_page_on_the_design_knows_every_floor() -> None:
    """docs/design.md shows people the floors that are checked here."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    shown = {int(floor): set(re.findall(r"`(\w+)`", names)) for floor, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.M)}
    kept = {floor: names - {"__init__", "__main__"} for floor, names in FLOORS.items()}
    wrong = {floor: names ^ shown.get(floor, set()) for floor, names in kept.items() if names != shown.get(floor, set())}
    assert not wrong, f"docs/design.md and FLOORS differ, floor by floor, in {wrong}"


def test_imports_point_to_lower_floors_only() -> None:
    """An import points down, or to a file of the same package, so nothing has to be dodged."""
    wrong = [
        f"{place(path, node)}: {noun(path)} (floor {FLOOR[noun(path)]}) imports {other} (floor {FLOOR[other]})"
        for path in modules()
        if noun(path) in FLOOR
        for node in ast.walk(tree(path))
        for other in _imported(path, node)
        if other != noun(path) and FLOOR.get(other, -1) >= FLOOR[noun(path)]
    ]
    assert not wrong, lacking(wrong, "imports must point to lower floors; move what both need down, or hand it over as an argument:")


def _neighbours(path: Path) -> set[Path]:
    """The files of its own package that a file imports."""
    found: set[Path] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            target = PACKAGE.parent.joinpath(*node.module.split("."))
            inner = [target / f"{alias.name}.py" for alias in node.names]
            found |= {p for p in (target.with_suffix(".py"), target / "__init__.py", *inner) if p.exists() and noun(p) == noun(path)}
    return found - {path}


def test_the_files_of_a_package_have_an_order_too() -> None:
    """Within a package, imports make no cycle: its files can be read one after the other."""
    left = {path: _neighbours(path) for path in modules() if path.parent != PACKAGE}
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    assert not left, lacking([str(p.relative_to(PACKAGE.parent)) for p in sorted(left)], "these files import each other in a cycle:")


def _inner(path: Path, node: ast.AST) -> list[str]:
    """The modules inside of other packages that a node imports, past what their ``__init__`` offers."""
    modules_named = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
    )
    parts = [name.split(".") for name in modules_named if name.startswith("fnlight.")]
    return [".".join(p) for p in parts if len(p) > 2 and p[1] != noun(path)]


def test_a_package_is_used_through_its_init() -> None:
    """What other packages use, a package's ``__init__`` imports, so it shows all that it offers; its modules are its own."""
    wrong = [f"{place(path, node)}: {inner}" for path in modules() for node in ast.walk(tree(path)) for inner in _inner(path, node)]
    assert not wrong, lacking(wrong, "import from the package, not from a module inside of it:")


def test_no_import_is_hidden_from_the_floors() -> None:
    """Imports of fnlight stand at the top of a module: neither TYPE_CHECKING nor a function hides one."""
    wrong: list[str] = []
    for path in modules():
        wrong += [f"{place(path, n)}: TYPE_CHECKING" for n in ast.walk(tree(path)) if isinstance(n, ast.Name) and n.id == "TYPE_CHECKING"]
        if path == PACKAGE / "__init__.py":
            continue  # its __getattr__ brings the submodules of the top floor when they are asked for
        for function in functions(tree(path)):
            for node in ast.walk(function):
                late = bool(_imported(path, node)) or (called(node).endswith("import_module") and "fnlight" in ast.unparse(node))
                wrong += [f"{place(path, node)}: {ast.unparse(node)}, in {function.name}"] if late else []
    assert not wrong, lacking(wrong, "import modules of fnlight at the top of the file; only heavy outside packages are imported late:")
