"""Laws of `fnlight.errors`: one root, the tree of the docstring, and the builtin exceptions that callers expect."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight import errors
from fnlight.data import Share, Source
from fnlight.errors import FnlightError, LoaderWarning, MemoryWarning, TaskWarning
from fnlight.parallel import World

CLASSES = {n: k for n, k in vars(errors).items() if inspect.isclass(k) and k.__module__ == errors.__name__}
ERRORS = {n: k for n, k in CLASSES.items() if issubclass(k, FnlightError) and k is not FnlightError}
WARNINGS = {n: k for n, k in CLASSES.items() if issubclass(k, Warning)}


def drawn() -> dict[str, tuple[str, str]]:
    """The tree in the docstring: each name with the one that it hangs on and the builtin in its brackets."""
    found: dict[str, tuple[str, str]] = {}
    above = ["FnlightError"]
    for line in (errors.__doc__ or "").splitlines():
        node = re.match(r"^\s{4}([│ ]*)[├└]── (\w+)(?:\((\w+)\))?", line)
        if node:
            depth = len(node[1]) // 4
            above[depth + 1 :] = [node[2]]
            found[node[2]] = (above[depth], node[3] or "")
    return found


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every exception is drawn where it hangs, and nothing is drawn that does not exist."""
    tree = drawn()
    assert set(tree) == set(ERRORS)
    for name, (parent, builtin) in tree.items():
        bases = [base.__name__ for base in ERRORS[name].__bases__]
        assert bases == ([parent, builtin] if builtin else [parent]), name


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_caught_by_its_root_and_by_a_builtin(name: str) -> None:
    """``except FnlightError`` catches all of them, and so does the builtin that code without fnlight would expect."""
    with pytest.raises(FnlightError, match="what happened"):
        raise ERRORS[name]("what happened")
    assert issubclass(ERRORS[name], TypeError | ValueError | RuntimeError | AssertionError)
    assert issubclass(ERRORS[name], AssertionError) == (
        name in ("TaskCheckError", "LoaderCheckError")
    )  # which test runners show as a failed assertion


def test_bugs_are_not_caught_by_the_root() -> None:
    """A failed assertion inside of fnlight is no error of the user, and passes by ``except FnlightError``."""
    assert not issubclass(AssertionError, FnlightError)


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_can_be_filtered_by_name(name: str) -> None:
    """Each warning is a class of its own, below UserWarning, so that it is shown by default and can be silenced alone."""
    assert issubclass(WARNINGS[name], UserWarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", WARNINGS[name])
        warnings.warn("silenced", WARNINGS[name], stacklevel=1)
    assert caught == []


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_what_happened(name: str) -> None:
    """The docstring of each exception is a sentence of its own."""
    doc = inspect.getdoc(CLASSES[name]) or ""
    assert re.match(r"^[A-Z`].+\.$", doc.splitlines()[0])
    assert sum(inspect.getdoc(other) == doc for other in CLASSES.values()) == 1


def quiet_fit() -> None:
    """Train a model in eval mode, which fit warns of from a depth of its own."""
    task = fl.Task(
        nn.Linear(1, 1).eval(), lambda model, x: model(x).mean(), configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
    )
    fl.fit(fl.TrainState.create(task), [torch.ones(1, 1)], fl.FitConfig(max_steps=1, progress=False))


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: errors.warn("new", MemoryWarning), MemoryWarning),
        (quiet_fit, TaskWarning),
        (
            lambda: Source(torch.utils.data.DataLoader(range(8), batch_size=4), share=Share(World(0, 3))),
            LoaderWarning,
        ),  # in a class that attrs writes
    ],
)
def test_a_warning_names_the_line_of_the_user(act, kind) -> None:
    """However deep within fnlight it arises: a place within fnlight would help nobody, and would be shown once for all places that lead to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    (only,) = caught
    assert only.category is kind
    assert Path(only.filename) == Path(__file__)


def test_all_warnings_are_given_in_one_way() -> None:
    """So that each names the line of the user."""
    package = Path(inspect.getfile(fl)).parent
    assert [str(p.relative_to(package)) for p in sorted(package.rglob("*.py")) if "warnings.warn(" in p.read_text()] == ["errors.py"]
