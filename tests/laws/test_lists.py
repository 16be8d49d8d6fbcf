"""The laws are tried over everything that the package has."""

import importlib
import inspect
import pkgutil
import typing

import pytest

import fnlight
from fnlight import Combinator
from fnlight.testing import check_task
from tests.laws.combinators import ENTRIES
from tests.laws.tasks import TASKS


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
    assert len(combinators()) >= 13


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_of_the_laws_pass_the_checks_that_users_run(name):
    """`check_task` finds no fault with any task of the list."""
    case = TASKS[name]
    report = check_task(case.make(), case.batches()[0])
    skipped = {"loss": set(), "phases": {"overfit"}, "whole": {"deterministic", "keyed", "model"}}[case.kind]
    assert set(report.skipped) == (skipped if case.trains else skipped | {"gradients", "overfit"})
