"""The laws are tried over everything that the package has."""

import ast
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import pytest

import fnlight
from fnlight import Combinator
from fnlight.testing import check_task
from tests.laws.combinators import ALONE, CHOICES, ENTRIES, EVERYTHING, INTERACTING, OTHERS, PAIRS, PRODUCT, SAME
from tests.laws.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


def combinators():
    """Every public function of the package that is annotated to return a `Combinator`."""
    found = set()
    for info in pkgutil.walk_packages(fnlight.__path__, "fnlight."):
        module = importlib.import_module(info.name)
        for name, fn in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and fn.__module__ == info.name and typing.get_type_hints(fn).get("return") is Combinator:
                found.add(fn)
    return found


def test_the_list_holds_every_combinator():
    """A function of the package that returns a `Combinator` is in the list that the laws go over."""
    missing = sorted(fn.__name__ for fn in combinators() - {entry.fn for entry in ENTRIES.values()})
    assert not missing, f"add {missing} to ENTRIES in tests/laws/combinators.py"
    assert {entry.fn for entry in ENTRIES.values()} <= combinators(), "the search for combinators does not find all that are listed"


def test_the_laws_go_over_every_task_and_every_combinator():
    """Each combinator is tried alone, each task with all of them at once, and what makes a step in another way on every task with a trait."""
    assert set(PAIRS) <= set(PRODUCT)
    assert {choice for _, choice in PAIRS} == set(CHOICES)
    assert {name for name, choice in PAIRS if choice == EVERYTHING} == TASKS.keys()
    assert {(name, choice) for name, choice in PRODUCT if choice in ALONE and name not in SAME} <= set(PAIRS)


def test_the_pairs_that_are_known_to_interact_exist():
    """What is written down by name is a pair of the product, and what is tried alone is not in the full pipe."""
    assert {(name, choice) for name, choices in INTERACTING.items() for choice in choices} <= set(PRODUCT)
    assert set(ALONE) <= set(OTHERS)


def test_the_numbers_of_the_laws_are_those_of_the_design_page():
    """Each law of the page has a row with its test file, whose first line names that law."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## Laws")[2].partition("\n## ")[0]
    laws = [int(number) for number in re.findall(r"^(\d+)\. \*\*", page, re.M)]
    rows = {file: [int(n) for n in numbers.split(", ")] for numbers, file in re.findall(r"^\| ([\d, ]+) \| `(\S+)` \|$", page, re.M)}
    assert laws == list(range(1, 12))
    assert sorted(n for numbers in rows.values() for n in numbers) == laws
    for file, numbers in rows.items():
        first = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))).splitlines()[0]
        assert first.startswith(f"Law{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}: "), file
    named = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/laws").glob("test_*.py")} - {"tests/laws/test_lists.py"}
    assert named <= rows.keys()


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_of_the_laws_pass_the_checks_that_users_run(name):
    """`check_task` finds no fault with any task of the list."""
    case = TASKS[name]
    report = check_task(case.make(), case.batches()[0])
    skipped = {"loss": set(), "phases": {"overfit"}, "whole": {"deterministic", "keyed", "model"}}[case.kind]
    assert set(report.skipped) == (skipped if case.trains else skipped | {"gradients", "overfit"})
