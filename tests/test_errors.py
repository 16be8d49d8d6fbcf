"""Laws of `fnlight.errors`: one root, the tree of the docstring, and the builtin exceptions that callers expect."""

import inspect
import re
import warnings

import pytest

from fnlight import errors
from fnlight.errors import FnlightError

CLASSES = {n: k for n, k in vars(errors).items() if inspect.isclass(k)}
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
    assert issubclass(ERRORS[name], AssertionError) == (name == "TaskCheckError")  # which test runners show as a failed assertion


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
