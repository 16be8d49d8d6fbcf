"""Exports are explicit: what ``fl.`` offers is what ``__all__`` says, and each name is documented under its noun."""

import re
import tomllib
import types
from importlib import import_module

import pytest

import fnlight as fl
from tests.repo.api_pages import API, nouns_with_pages, page_of
from tests.repo.source import PACKAGE, ROOT, lacking, names_in_init, nouns

LONGEST = 140
"""Names in ``fl.`` at most: what a training script writes; the rest is in its package."""


def test_all_is_sorted_and_is_what_is_exported() -> None:
    """``__all__`` is the sorted list of the public names, submodules aside."""
    public = [n for n, v in vars(fl).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)]
    assert fl.__all__ == sorted(public), "fnlight.__all__ must list, as sorted() sorts them, the names that fnlight/__init__.py imports"


def test_the_top_holds_what_a_training_script_writes() -> None:
    """``fl.`` is short enough to be read; errors, types of functions and values that few need are in their packages."""
    assert len(fl.__all__) <= LONGEST
    assert not [name for name in fl.__all__ if name.endswith(("Error", "Warning"))], "errors are in fl.errors"


def test_every_public_name_is_public_in_its_package() -> None:
    """``fl.NAME`` is ``fnlight.PACKAGE.NAME``, too: the package lists it in ``__all__``."""
    wrong = [f"fl.{name}: {module}" for name, module in names_in_init().items() if name not in import_module(module).__all__]
    assert not wrong, lacking(wrong, "list it in __all__ of its package:")


@pytest.mark.parametrize("noun", nouns_with_pages())
def test_what_a_package_lists_is_there(noun: str) -> None:
    """Every name in ``__all__`` of a package can be imported from it, and there is at least one."""
    module = import_module(f"fnlight.{noun}")
    listed = getattr(module, "__all__", ["__doc__"])
    assert listed
    assert not [name for name in listed if getattr(module, name, None) is None]


def test_names_are_exported_under_their_own_name() -> None:
    """A name is the same in its module and in ``fl``."""
    wrong = [name for name in names_in_init() if getattr(getattr(fl, name), "__name__", name) != name]
    assert not wrong, f"exported under another name than their own: {wrong}"


def test_every_package_has_its_tests() -> None:
    """``fnlight/x/`` is tested by files in ``tests/x/``; a file ``tests/x/test_y.py`` of a package is about that package."""
    missing = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py") if not list((ROOT / "tests" / p.parent.name).glob("test_*.py")))
    flat = sorted(p.name for p in (ROOT / "tests").glob("test_*.py"))
    assert not missing, f"write tests/{missing}/test_*.py"
    assert flat == ["test_errors.py", "test_examples.py", "test_protocols.py"], f"move {flat} into the folder of the package that they test"


def test_every_package_has_its_page() -> None:
    """``fnlight/x/`` is documented on ``docs/api/x.md``, and no page is left of a package that is gone."""
    pages = {p.stem for p in API.glob("*.md")}
    assert nouns() == pages, f"without a page in docs/api: {sorted(nouns() - pages)}; pages of nothing: {sorted(pages - nouns())}"


@pytest.mark.parametrize("noun", nouns_with_pages())
def test_the_page_of_a_package_is_the_source_of_today(noun: str) -> None:
    """The signatures on ``docs/api/x.md`` are those of the source; ``python tests/repo/api_pages.py`` writes them."""
    assert (API / f"{noun}.md").read_text(encoding="utf-8") == page_of(noun), "run: python tests/repo/api_pages.py"


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
