"""What the source must not hold: hidden state, reach-back, code that runs from files, and what nobody can read in one go."""

import ast
from functools import cache
from pathlib import Path

import pytest
import torch

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
DOORS = ("tensors/_private_torch.py", "compile/_private_torch.py")
"""The modules that may use private names of torch."""

PUBLIC_UNDERSCORES = {
    "_fields": "of a named tuple, documented",
    "_replace": "of a named tuple, documented",
    "_exit": "of os, documented",
    "_rand": "NumPy's global generator, a third of the time of numpy.random.seed; with that as the fallback",
    "_computed": "the cached result of a metric of torchmetrics; only a reset, which loses its state, clears it otherwise",
    "_reductions": "how a metric of torchmetrics merges the states of ranks; there is no public name",
}
"""Names with an underscore that are not fnlight's and not torch's."""

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


@cache
def _own_names() -> set[str]:
    """Attributes with an underscore that classes of fnlight define: methods, fields and slots."""
    found: set[str] = set()
    for cls in (node for path in modules() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)):
        found |= {node.name for node in cls.body if isinstance(node, Function)}
        found |= {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
        found |= {
            n.attr
            for n in ast.walk(cls)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self" and isinstance(n.ctx, ast.Store)
        }
        slots = [node.value for node in cls.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"]
        found |= {each.value for node in slots for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return {name for name in found if _is_private(name)}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1 and name.isidentifier()


@cache
def _of_torch() -> set[str]:
    """Names with an underscore of torch and of its objects that fnlight works with."""
    objects = (
        torch,
        torch._C,
        torch.Tensor,
        torch.nn,
        torch.nn.Linear(1, 1),
        torch.optim.SGD([torch.zeros(1)]),
        torch.utils.data.DataLoader,
    )
    return {name for each in objects for name in dir(each) if _is_private(name)}


def _private_uses(path: Path) -> list[str]:
    """Places where a module uses a private name that is not fnlight's own."""
    own, torchs, found = _own_names(), _of_torch(), list[str]()
    for node in ast.walk(tree(path)):
        match node:
            case ast.Attribute(value=value, attr=name) if _is_private(name) and name not in PUBLIC_UNDERSCORES:
                whose = ast.unparse(value)
                if whose.startswith("torch") or name not in own or (name in torchs and whose not in ("self", "cls")):
                    found.append(f"{place(path, node)}: {ast.unparse(node)}")
            case ast.Constant(value=str(name)) if _is_private(name) and (name in torchs or name in TORCH_STRINGS):
                found.append(f"{place(path, node)}: {name!r}")
            case ast.Import(names=names):
                found += [f"{place(path, node)}: import {a.name}" for a in names if _is_private_in_torch(a.name)]
            case ast.ImportFrom(module=str(module), names=names):
                imported = [f"{module}.{a.name}" for a in names]
                found += [f"{place(path, node)}: from {module} import ..." for name in imported if _is_private_in_torch(name)]
            case ast.Call(args=[ast.Constant(value=str(module)), *_]) if called(node).endswith("import_module"):
                found += [f"{place(path, node)}: {module}"] if _is_private_in_torch(module) else []
            case _:
                pass
    return found


TORCH_STRINGS = ("_local_tensor", "_step_supports_amp_scaling", "_wrapped_by_lr_sched", "_NormBase", "_BatchNorm")
"""Private names of torch that only some objects have, for `getattr`."""


def _is_private_in_torch(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(_is_private(part) for part in rest)


def test_private_names_of_torch_are_behind_one_door() -> None:
    """What may change with any release of torch is in two modules, one of them for its compiler; all others use public names."""
    assert {str(p.relative_to(PACKAGE)) for p in modules()} >= set(DOORS)
    wrong = [use for path in modules() if str(path.relative_to(PACKAGE)) not in DOORS for use in _private_uses(path)]
    assert not wrong, lacking(wrong, f"add a function to one of {DOORS}, with a docstring and the public way if there is one:")


def test_each_door_says_what_its_functions_do() -> None:
    """Every function there has a docstring: what it does, and which public way there is."""
    wrong = [
        place(PACKAGE / door, f)
        for door in DOORS
        for f in tree(PACKAGE / door).body
        if isinstance(f, Function) and not f.name.startswith("_") and ast.get_docstring(f) is None
    ]
    assert not wrong, lacking(wrong, "functions without a docstring:")


def test_private_names_are_recognised(tmp_path: Path) -> None:
    """Attributes, imports and names for `getattr` are found; fnlight's own are not taken for torch's."""
    lines = {
        "torch._foreach_add_(a, b)": True,
        "module._buffers": True,
        "getattr(module, '_buffers')": True,
        "given._some_name_of_another_library": True,
        "from torch._inductor import config": True,
        "from torch.nn.modules.batchnorm import _BatchNorm": True,
        "import torch._dynamo": True,
        "import_module('torch._guards')": True,
        "found._replace(loss=1)": False,
        "self._copy(device)": False,
        "from torch.nn import Module": False,
        "torch.compile(model)": False,
    }
    for number, (line, wrong) in enumerate(lines.items()):
        path = tmp_path / f"module{number}.py"
        path.write_text(line, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.repo.test_source.place", lambda path, node: "here")
            assert bool(_private_uses(path)) is wrong, line


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
