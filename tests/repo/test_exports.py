"""Exports are explicit: what ``fl.`` offers is what ``__all__`` says, and each name is documented under its noun."""

import re
import tomllib
import types

import pytest

import fnlight as fl
from tests.repo.source import ROOT, lacking, names_in_init, nouns

WITHOUT_TESTS = {"protocols": "types without code; every other test uses them"}
TESTS_OF_NO_MODULE = {
    "phases": "several optimizers go through pipe, update, state and checkpoint",
    "examples": "runs the programs in examples/",
}


def test_all_is_sorted_and_is_what_is_exported() -> None:
    """``__all__`` is the sorted list of the public names, submodules aside."""
    public = [n for n, v in vars(fl).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)]
    assert fl.__all__ == sorted(public), "fnlight.__all__ must list, as sorted() sorts them, the names that fnlight/__init__.py imports"


def test_every_public_name_comes_from_a_documented_module() -> None:
    """Every public name stands on the API page of the module that it comes from."""
    wrong: list[str] = []
    for name, module in names_in_init().items():
        page = ROOT / "docs" / "api" / f"{module.split('.')[1]}.md"
        if not page.exists() or f"::: fnlight.{module.split('.')[1]}" not in page.read_text(encoding="utf-8"):
            wrong.append(f"fl.{name} comes from {module}, but {page.relative_to(ROOT)} does not hold the line `::: fnlight.{page.stem}`")
    assert not wrong, lacking(wrong, "every public name must be documented:")


def test_names_are_exported_under_their_own_name() -> None:
    """A name is the same in its module and in ``fl``."""
    wrong = [name for name in names_in_init() if getattr(getattr(fl, name), "__name__", name) != name]
    assert not wrong, f"exported under another name than their own: {wrong}"


def test_one_noun_has_its_tests() -> None:
    """``fnlight/x.py`` is tested by ``tests/test_x.py``, or by files in ``tests/x/``, and by nothing that is named differently."""
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    tests |= {p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py"))} & nouns()
    missing = sorted(nouns() - tests - WITHOUT_TESTS.keys())
    foreign = sorted(tests - nouns() - TESTS_OF_NO_MODULE.keys())
    assert not missing, f"write {', '.join(f'tests/test_{n}.py' for n in missing)}"
    assert not foreign, f"{', '.join(f'tests/test_{n}.py' for n in foreign)} test no module of that name; call them after what they test"


def test_one_noun_has_its_page() -> None:
    """``fnlight/x.py`` is documented on ``docs/api/x.md``, and no page is left of a module that is gone."""
    pages = {p.stem for p in (ROOT / "docs" / "api").glob("*.md")}
    assert nouns() == pages, f"without a page in docs/api: {sorted(nouns() - pages)}; pages of no module: {sorted(pages - nouns())}"


@pytest.mark.parametrize("name", ["update", "fit", "pipe", "evaluate"])
def test_where_a_function_and_its_module_share_a_name_the_function_is_exported(name: str) -> None:
    """``fl.fit`` is the function; its module stays importable as ``from fnlight.fit.fit import ...``."""
    assert isinstance(getattr(fl, name), types.FunctionType)


def test_the_top_floor_is_reached_without_an_import_of_its_own() -> None:
    """``fl.testing`` is there when somebody asks for it, and an unknown name gets the ordinary error."""
    assert fl.testing.__name__ == "fnlight.testing"
    with pytest.raises(AttributeError, match="module 'fnlight' has no attribute 'trainer'"):
        fl.trainer


def test_the_version_is_the_same_everywhere() -> None:
    """``fl.__version__``, pyproject.toml and the newest entry of the changelog name one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None, "CHANGELOG.md must have a heading such as `## 0.1.0`"
    assert fl.__version__ == project["version"] == newest[1]
