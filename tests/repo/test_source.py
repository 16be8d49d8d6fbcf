"""What the source must not hold: hidden state, reach-back, code that runs from files, and what nobody can read in one go."""

import ast
from pathlib import Path

import pytest

from tests.repo.source import PACKAGE, ROOT, Function, called, functions, lacking, modules, place, tree

MODULE_LINES, FUNCTION_LINES = 400, 40

LONGER_MODULES: dict[str, str] = {}
"""Modules past the limit, each with the reason."""

LONGER_FUNCTIONS = {
    "evaluate_every.evaluate_every": "a combinator: the short functions in it share what it is given",
    "log_to.log_to": "a combinator: the short functions in it share what it is given",
}
"""Functions past the limit, as ``module.function``, each with the reason."""

NAMES = {"hasattr": "ask for what you need in the signature", "super": "compose instead of overriding"}
CALLS = {
    "torch.load": "a checkpoint must not run code; read safetensors",
    "time.sleep": "time is an argument",
    "eval": "nothing is run from text",
    "exec": "nothing is run from text",
}
VARIADIC = {
    "zip": "it takes as many as there are",
    "nn.Sequential": "it takes as many as there are",
    "checks.one_of": "it takes as many as there are",
    "ctypes.CDLL(None).prctl": "a function of C has no names",
}
"""What may be called with more than four arguments by position, each with the reason."""
HOT = {
    "item._items": "makes an Item for each step; by name that takes a half longer, 0.4 µs",
    "progress.after": "makes a Progress for each step, as above",
    "state.advanced": "makes a TrainState for each step, as above",
    "update.__call__": "makes a TrainState for each step, as above",
}
"""Functions that make a record at every step and may do so by position, as ``module.function``, each with the reason."""
MODULES = {"pickle": "a file must not run code", "cloudpickle": "a file must not run code", "abc": "a Protocol says what is needed"}
EMPTY = ("[]", "{}", "set()", "dict()", "list()", "deque()", "defaultdict(list)", "defaultdict(dict)", "Counter()")


def _problems(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree(path)):
        at = place(path, node)
        match node:
            case ast.Global() | ast.Nonlocal():
                found.append(f"{at}: {ast.unparse(node)}: state belongs into the state")
            case ast.Name(id=name) if name in NAMES:
                found.append(f"{at}: {name}: {NAMES[name]}")
            case ast.Call() if called(node) in CALLS:
                found.append(f"{at}: {called(node)}: {CALLS[called(node)]}")
            case ast.Import(names=names):
                found += [f"{at}: import {a.name}: {MODULES[a.name]}" for a in names if a.name in MODULES]
            case ast.ImportFrom(module=module) if module in MODULES:
                found.append(f"{at}: from {module}: {MODULES[module]}")
            case ast.arg(arg="trainer"):
                found.append(f"{at}: a parameter called trainer: take what is needed, not who holds it")
            case ast.Raise(exc=ast.expr() as raised) if ast.unparse(raised).startswith("NotImplementedError"):
                found.append(f"{at}: NotImplementedError: there are no base classes to override")
            case _:
                pass
    return found


def _length(function: Function) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_hides_state_reaches_back_or_runs_files(path: Path) -> None:
    """No super, hasattr, global, nonlocal, pickle, torch.load, sleep, abstract base, or parameter called trainer."""
    problems = _problems(path)
    assert not problems, lacking(problems, "fnlight does without these:")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_keeps_state(path: Path) -> None:
    """No container at the level of a module is empty, which could only mean that somebody fills it later."""
    assigned = [n for n in tree(path).body if isinstance(n, ast.Assign | ast.AnnAssign) and n.value is not None]
    wrong = [f"{place(path, n)}: {ast.unparse(n)}" for n in assigned if n.value is not None and ast.unparse(n.value) in EMPTY]
    assert not wrong, lacking(wrong, "mutable values live in the state, not in a module:")


def _unnamed(node: ast.Call) -> bool:
    given = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
    return len(given) > 4 and ast.unparse(node.func) not in VARIADIC


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_calls_say_what_their_arguments_are(path: Path) -> None:
    """No call has more than four arguments by position, except of functions that take any number of them or know no names."""
    hot = {n for f in functions(tree(path)) if f"{path.stem}.{f.name}" in HOT for n in ast.walk(f) if isinstance(n, ast.Call)}
    records = {n for n in hot if ast.unparse(n.func) in ("Item", "Progress", "TrainState")}
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and n not in records]
    wrong = [f"{place(path, n)}: {ast.unparse(n):.100}" for n in calls if _unnamed(n)]
    assert not wrong, lacking(wrong, "name the arguments of these calls, all but the first few:")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_choice_between_actions_is_an_if_statement(path: Path) -> None:
    """No conditional expression stands alone as a statement: it is for values."""
    found = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.IfExp)]
    wrong = [f"{place(path, n)}: {ast.unparse(n):.100}" for n in found]
    assert not wrong, lacking(wrong, "write these as if statements:")


def test_modules_are_short() -> None:
    """A module has at most 400 lines, or a reason."""
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules()}
    wrong = [f"{name}: {count} lines" for name, count in lengths.items() if count > MODULE_LINES and name not in LONGER_MODULES]
    assert not wrong, lacking(wrong, f"split what is longer than {MODULE_LINES} lines, or give the reason in LONGER_MODULES:")
    stale = [name for name in LONGER_MODULES if lengths.get(name, 0) <= MODULE_LINES]
    assert not stale, f"no longer too long, take out of LONGER_MODULES: {stale}"


def test_functions_are_short() -> None:
    """A function has at most 40 lines without its docstring, or a reason."""
    lengths = {f"{p.stem}.{f.name}": (_length(f), place(p, f)) for p in modules() for f in functions(tree(p))}
    wrong = [
        f"{at}: {name} has {count} lines"
        for name, (count, at) in lengths.items()
        if count > FUNCTION_LINES and name not in LONGER_FUNCTIONS
    ]
    assert not wrong, lacking(wrong, f"split functions of more than {FUNCTION_LINES} lines, or give the reason in LONGER_FUNCTIONS:")
    stale = [name for name in LONGER_FUNCTIONS if lengths.get(name, (0, ""))[0] <= FUNCTION_LINES]
    assert not stale, f"no longer too long, take out of LONGER_FUNCTIONS: {stale}"


def test_the_contracts_fit_on_two_screens() -> None:
    """All protocols together have at most 130 lines."""
    assert len((PACKAGE / "protocols.py").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_types_are_shipped() -> None:
    """Type checkers of users read fnlight's annotations."""
    assert (ROOT / "fnlight" / "py.typed").exists()
