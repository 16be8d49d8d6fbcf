"""Tests of the tests: each states its law, can fail, and checks what an error says."""

import ast
import re
from pathlib import Path

import pytest

from tests.repo.source import ROOT, Function, called, functions, lacking, place, tree

FILES = sorted((ROOT / "tests").rglob("*.py"))
CHECKS = ("assert_", "check_", "pytest.raises", "pytest.warns", "torch.testing.", "pytest.fail")
"""What a call is named after that makes a test fail where its law is broken."""

WITHOUT_MESSAGE = ("StopIteration", "KeyboardInterrupt", "SystemExit")
"""Exceptions that say nothing."""


def _tests(path: Path) -> list[Function]:
    return [f for f in functions(tree(path)) if f.name.startswith("test_")]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "tests"))


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("test_")], ids=_name)
def test_every_test_states_its_law(path: Path) -> None:
    """Every test has a docstring: one sentence that says what holds."""
    wrong = [f"{place(path, t)}: {t.name}" for t in _tests(path) if not (ast.get_docstring(t) or "").rstrip().endswith((".", "?", "!"))]
    assert not wrong, lacking(wrong, "say in one sentence what holds:")


def test_the_laws_have_the_numbers_of_the_page_on_the_design() -> None:
    """Each law of docs/design.md is the subject of one file, whose first line says its number, and whose name says which law it is."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Laws")[1].split("\n## ")[0]
    laws = {int(number): name.lower() for number, name in re.findall(r"^(\d+)\. \*\*([^*]+)\.\*\*", page, re.M)}
    claimed: dict[int, str] = {}
    for path in FILES:
        first = re.match(r"Laws? ([\d, and]+):", ast.get_docstring(tree(path)) or "")
        claimed |= {int(number): path.name for number in re.findall(r"\d+", first[1])} if first else {}
    files = {name: f"test_{name}.py" for name in laws.values()} | {"ranks": "test_law.py", "round trip": "test_resume.py"}
    assert claimed == {number: files[name] for number, name in laws.items()}


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("test_")], ids=_name)
def test_every_test_can_fail(path: Path) -> None:
    """Every test asserts something, by itself or through a function whose name says so."""
    wrong: list[str] = []
    for test in _tests(path):
        asserts = [n for n in ast.walk(test) if isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant)]
        calls = [called(n) for n in ast.walk(test)]
        if not asserts and not any(c.startswith(CHECKS) or c.rsplit(".", 1)[-1].startswith(("assert_", "check_")) for c in calls):
            wrong.append(f"{place(path, test)}: {test.name}")
    assert not wrong, lacking(wrong, "assert something, or call a function named assert_... or check_...:")


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_checks_of_errors_check_the_message(path: Path) -> None:
    """``pytest.raises`` and ``pytest.warns`` always say what the message must hold."""
    wrong: list[str] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and called(node) in ("pytest.raises", "pytest.warns", "pytest.RaisesExc"):
            match = next((k.value for k in node.keywords if k.arg == "match"), None)
            silent = node.args and ast.unparse(node.args[0]) in WITHOUT_MESSAGE
            if not silent and (match is None or (isinstance(match, ast.Constant) and match.value == "")):
                wrong.append(f"{place(path, node)}: {ast.unparse(node)}")
    assert not wrong, lacking(wrong, 'pass match="what the message must say":')


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_tests_never_wait(path: Path) -> None:
    """No test sleeps: time is an argument, and what must be waited for is an event."""
    wrong = [place(path, n) for n in ast.walk(tree(path)) if called(n) in ("time.sleep", "sleep")]
    assert not wrong, lacking(wrong, "do not sleep:")
