"""The smoke tier: it touches every package and every law, and what it lists exists."""

import pytest

from tests.repo.source import PACKAGE, ROOT, functions, lacking, tree
from tests.smoke import SMOKE, TOO_LONG, is_smoke

TESTS = ROOT / "tests"
PACKAGES = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
LAWS = sorted(p.name for p in (TESTS / "laws").glob("test_*.py"))


@pytest.mark.parametrize("place", [*(f"{name}/" for name in PACKAGES), *(f"laws/{name}" for name in LAWS)])
def test_every_package_and_every_law_has_a_smoke_test(place: str) -> None:
    """A package or a law that is missing in tests/smoke.py would break unseen until the whole suite runs."""
    named = [entry for entry in SMOKE if f"{entry}/".startswith(place) or entry.startswith(place)]
    assert named, f"add a quick test of tests/{place} to SMOKE in tests/smoke.py"


def test_what_the_smoke_tier_lists_exists() -> None:
    """A folder, a file or a test that was renamed is not left out in silence."""
    wrong: list[str] = []
    for entry in (*SMOKE, *TOO_LONG):
        file, _, test = entry.partition("::")
        path = TESTS / file
        names = [f.name for f in functions(tree(path))] if path.suffix == ".py" and path.is_file() else []
        if not path.exists() or (test and test.partition("[")[0] not in names):
            wrong.append(entry)
    assert not wrong, lacking(wrong, "listed in tests/smoke.py, and not there:")


def test_marks_are_given_by_the_list_alone() -> None:
    """One visible place says what is in the smoke tier."""
    others = (path for path in TESTS.rglob("*.py") if path.name != "test_smoke.py")
    marked = [str(path.relative_to(ROOT)) for path in others if "mark.smoke" in path.read_text(encoding="utf-8")]
    assert not marked, lacking(marked, "list the tests in tests/smoke.py instead:")
    assert is_smoke("tests/pipe/test_pipe.py::test_any")
    assert not is_smoke("tests/examples/test_any.py::test_any")
