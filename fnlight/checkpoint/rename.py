"""Name mapping: load a checkpoint into a model whose parameters have other names, with everything that is kept by these names."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fnlight.errors import CheckpointError, check_type
from fnlight.optim import OTHER

Rename = Mapping[str, str] | Callable[[str], str | None] | None
"""Names in the file to names in the model: a mapping, whose keys name a parameter or a module with all below it, or a function."""


def new_name(rename: Rename, name: str) -> str | None:
    """Return the name in the model for a name in a file.

    Args:
        rename: A mapping, whose longest matching key is used; or a function; None changes nothing.
        name: A qualified name.

    Returns:
        The name; None leaves the tensor out.

    Example:
        >>> new_name({"encoder": "trunk", "encoder.norm": "norm"}, "encoder.0.weight"), new_name({"a": "b"}, "ab")
        ('trunk.0.weight', 'ab')
    """
    if rename is None:
        return name
    if not isinstance(rename, Mapping):
        check_type("rename", rename, Callable, "a mapping of names, or a function of a name")
        return rename(name)
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in rename:
            return ".".join([rename[head], *parts[n:]])
    return name


def renamed(found: Mapping[str, Any], rename: Rename) -> dict[str, Any]:
    """Return a mapping with the new names; entries without a new name are left out.

    Args:
        found: Names to anything.
        rename: What changes.

    Returns:
        A new mapping.

    Raises:
        CheckpointError: If two names become one.

    Example:
        >>> renamed({"net.bias": 1, "other": 2}, {"net": "head"})
        {'head.bias': 1, 'other': 2}
    """
    changed: dict[str, Any] = {}
    for name, value in found.items():
        new = new_name(rename, name)
        if new in changed:
            raise CheckpointError(f"rename= maps two tensors of the file to {new!r}, {name!r} is the second; map each to its own name")
        if new is not None:
            changed[new] = value
    return changed


def renamed_body(body: Mapping[str, Any], names: Collection[str], rename: Rename) -> Mapping[str, Any]:
    """Return the sections of a manifest with the new names: parameters, slots and groups of optimizers, and memory kept by name.

    Args:
        body: The sections; they stay as they are.
        names: Names of all parameters and buffers in the checkpoint.
        rename: What changes.

    Returns:
        New sections; the files are listed as they are.

    Example:
        >>> body = {"optimizer": None, "memory": {"ema": {"a": 1}}, "buffers": {}, "extra": {}}
        >>> renamed_body(body, {"a"}, {"a": "b"})["memory"]
        {'ema': {'b': 1}}
    """
    if rename is None:
        return body
    return {
        **body,
        "optimizer": _optimizer(body["optimizer"], rename),
        "memory": {key: _by_name(tree, names, rename) for key, tree in body["memory"].items()},
        "buffers": renamed(body["buffers"], rename),
        "extra": renamed(body["extra"], rename),
    }


def _optimizer(section: Any, rename: Rename) -> Any:
    if section is None:
        return None
    if "phases" in section:
        return {**section, "phases": {name: _optimizer(each, rename) for name, each in section["phases"].items()}}
    own = {OTHER: section["slots"][OTHER]} if OTHER in section["slots"] else {}
    slots = {name: slots for name, slots in section["slots"].items() if name != OTHER}
    groups = [{**group, "params": list(renamed(dict.fromkeys(group["params"]), rename))} for group in section["groups"]]
    return {**section, "slots": {**renamed(slots, rename), **own}, "groups": groups}


def _by_name(tree: Any, names: Collection[str], rename: Rename) -> Any:
    """A tree of a combinator, in which a dict whose keys are all names of parameters or buffers follows them."""
    if isinstance(tree, list):
        return [_by_name(item, names, rename) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree and all(key in names for key in tree):
        return renamed(tree, rename)
    return {key: _by_name(item, names, rename) for key, item in tree.items()}
