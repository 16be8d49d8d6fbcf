"""Triggers, stop rules, retentions and sinks from their source text, such as ``"steps(50) | at_end"``.

The parser accepts their names only, so reading a text never runs code.
"""

import ast
from collections.abc import Mapping
from typing import Any

from fnlight import checkpoint, sinks, triggers
from fnlight.errors import ConfigError

_NAMES: Mapping[str, Any] = {
    **{n: getattr(triggers, n) for n in ("steps", "epochs", "minutes", "seconds", "at_end", "continuous")},
    **{n: getattr(triggers, n) for n in ("patience", "reached", "diverged", "nonfinite")},
    **{n: getattr(triggers, n) for n in ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs")},
    **{n: getattr(checkpoint, n) for n in ("last", "best", "every")},
    **{n: getattr(sinks, n) for n in ("JSONL", "CSV", "TensorBoard", "Console")},
}


def parse(text: str) -> Any:
    """Read the source text of a trigger, stop rule, retention or sink; unknown names are refused.

    Args:
        text: Such as ``"steps(50) | at_end"``.

    Returns:
        The value.

    Raises:
        ConfigError: If the text holds anything but known names, called with plain values and joined with ``|``, ``&`` and ``~``.

    Example:
        >>> parse("steps(50) | at_end")
        steps(50) | at_end
    """
    try:
        return _read(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"cannot read {text:.80}: {error}") from error


def _read(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _read(node.left, text) | _read(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _read(node.left, text) & _read(node.right, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_read(node.operand, text)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES:
        return _call(node, node.func.id, text)
    raise ConfigError(f"cannot read {ast.unparse(node):.60} in {text:.80}; the known names are {', '.join(_NAMES)}")


def _call(node: ast.Call, name: str, text: str) -> Any:
    try:
        args = [ast.literal_eval(arg) for arg in node.args]
        options = {str(option.arg): ast.literal_eval(option.value) for option in node.keywords}
        return _NAMES[name](*args, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {name}(...) in {text:.80}: {error}") from error


def written(name: str, value: Any) -> str:
    """The text of a value that `parse` reads back.

    Args:
        name: The field of the configuration that holds it.
        value: A trigger, stop rule, retention or sink.

    Returns:
        Its text.

    Raises:
        ConfigError: If it is, or holds, a user's function.

    Example:
        >>> written("log_every", triggers.steps(50))
        'steps(50)'
    """
    text = repr(value)
    wrong = f"FitConfig({name}={text:.80}) cannot be written as text: it is, or holds, your own function"
    try:
        found = parse(text)
    except ConfigError as error:
        raise ConfigError(wrong) from error
    if found != value:  # a user's function with the name of one of fnlight's
        raise ConfigError(wrong)
    return text
