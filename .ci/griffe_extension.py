"""What the documentation site must be told about the source of fnlight, which is read and never imported.

Classes of attrs and named tuples get the ``__init__`` that is written for them, ``Example:`` is a section like ``Examples:``, a page of
``docs/api`` does not repeat its introduction, and a function that shares the name of its module (`fnlight.gradients.accumulate`) is not
hidden by it. griffe-fieldz knows attrs, too, but it imports the package: that takes PyTorch, and ten times as long.
"""

import re
from collections.abc import Iterator
from typing import Any

from griffe import (
    Alias,
    Attribute,
    Class,
    Expr,
    ExprCall,
    ExprKeyword,
    Extension,
    Function,
    GriffeLoader,
    Module,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)


class FnlightExtension(Extension):
    """Named in `.zensical.toml`."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Adapt all that was read, once."""
        loader.resolve_aliases(implicit=True, external=False)  # by their paths, some of which lead elsewhere in the end
        for each in list(_objects(pkg)):
            _adapt_docstring(each)
            if isinstance(each, Class) and "__init__" not in each.members and _is_record(each):
                _write_init(each)
        for package in (m for m in pkg.members.values() if isinstance(m, Module)):
            _prefer_functions_to_modules(package)


def _objects(within: Object) -> Iterator[Object]:
    for member in within.members.values():
        if isinstance(member, Object):
            yield member
            yield from _objects(member)


def _adapt_docstring(of: Object) -> None:
    if of.docstring is None:
        return
    said = re.sub(r"^Example:$", "Examples:", of.docstring.value, flags=re.M)
    said = re.sub(r"::$", ":", said, flags=re.M)  # literal blocks
    if isinstance(of, Module):
        _, heading, example = said.partition("Examples:\n")
        said = heading + example  # the text before it opens the page already
    of.docstring.value = said


def _prefer_functions_to_modules(package: Module) -> None:
    for name in (str(export) for export in package.exports or ()):
        module = package.members.get(name)
        if isinstance(module, Module) and name in module.members:
            package.members[name] = Alias(name, module.members[name], parent=package)


def _write_init(cls: Class) -> None:
    found = [_parameter(name, field, kw_only=kw_only) for name, (field, kw_only) in _fields(cls).items()]
    parameters = sorted((p for p in found if p is not None), key=lambda p: p.kind is ParameterKind.keyword_only)
    itself = Parameter("self", kind=ParameterKind.positional_or_keyword)
    cls.set_member("__init__", Function("__init__", parameters=Parameters(itself, *parameters), returns="None", parent=cls))


def _is_record(cls: Class) -> bool:
    given = _attrs_arguments(cls)
    return _is_named_tuple(cls) if given is None else given.get("init") != "False"


def _is_named_tuple(cls: Class) -> bool:
    return any(isinstance(base, Expr) and base.canonical_path == "typing.NamedTuple" for base in cls.bases)


def _fields(cls: Class) -> dict[str, tuple[Attribute, bool]]:
    """The fields by name, those of bases first, and whether their class takes arguments by name only."""
    records = [each for each in reversed(cls.mro()) if _attrs_arguments(each) is not None]
    return {
        name: (member, (_attrs_arguments(each) or {}).get("kw_only") == "True")
        for each in [*records, cls]
        for name, member in each.members.items()
        if isinstance(member, Attribute) and _is_field(member)
    }


def _attrs_arguments(cls: Class) -> dict[str, str] | None:
    """What ``@attrs.frozen(...)`` or ``@attrs.define(...)`` above a class is given; None for other classes."""
    for decorator in cls.decorators:
        if isinstance(decorator.value, Expr) and decorator.value.canonical_path in ("attrs.define", "attrs.frozen"):
            return {name: str(value) for name, value in _keywords(decorator.value).items()}
    return None


def _is_field(member: Attribute) -> bool:
    """Whether attrs takes this for a field: it has a type, and it is neither a ``ClassVar`` nor a property."""
    of_class = "class-attribute" in member.labels and "instance-attribute" not in member.labels
    return member.annotation is not None and "property" not in member.labels and not of_class


def _parameter(name: str, field: Attribute, *, kw_only: bool) -> Parameter | None:
    """The argument of a field, or None if there is none."""
    value = field.value
    given = _keywords(value) if isinstance(value, ExprCall) and value.canonical_path == "attrs.field" else None
    if given is None:
        default = value
    elif str(given.get("init")) == "False":
        return None
    elif "factory" in given:
        default = f"{given['factory']}()"
    else:
        default = given.get("default")
    if isinstance(default, ExprCall) and default.canonical_path == "attrs.Factory":
        default = "..."  # made of the other fields
    kw_only = kw_only or str((given or {}).get("kw_only")) == "True"
    kind = ParameterKind.keyword_only if kw_only else ParameterKind.positional_or_keyword
    alias = str((given or {}).get("alias", "")).strip("'\"") or name.lstrip("_")
    return Parameter(alias, annotation=field.annotation, kind=kind, default=default)


def _keywords(call: Expr) -> dict[str, str | Expr]:
    return {a.name: a.value for a in call.arguments if isinstance(a, ExprKeyword)} if isinstance(call, ExprCall) else {}
