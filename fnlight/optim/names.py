"""Optimizers by name: every class of torch, torch_optimizer and the optional packages that are installed."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fnlight.errors import OptimizerError
from fnlight.optim.lookahead import Lookahead
from fnlight.optim.needs import UNFIT, public_name

SOURCES = ("torch.optim", "torch_optimizer", "schedulefree", "pytorch_optimizer")
"""The packages that are searched for a name, in this order; the last two are optional."""

_OURS = {"torch.optim": {}, "torch_optimizer": {"lookahead": Lookahead}, "schedulefree": {}, "pytorch_optimizer": {"lookahead": Lookahead}}


def optimizer(name: str, params: Any, **options: Any) -> Any:
    """Make an optimizer by name: ``optimizer("adamw", model, lr=3e-4)``.

    Case, ``-`` and ``_`` are ignored. The name is searched in ``torch.optim``, ``torch_optimizer``, ``schedulefree`` and
    ``pytorch_optimizer``, in this order; ``"torch_optimizer.RAdam"`` chooses the package. ``"lookahead"`` is `Lookahead` and takes the
    name of the inner optimizer as ``base``.

    Args:
        name: A name such as ``"adamw"``, ``"SGD"``, ``"torch_optimizer.Yogi"`` or ``"AdamWScheduleFree"``.
        params: The model that `configure_optimizers` gets, for all of its trainable parameters; or the result of `param_groups`; or any
            parameters.
        **options: The options of the optimizer.

    Returns:
        The optimizer.

    Raises:
        OptimizerError: If there is no optimizer with that name, it does not have an option, or groups share a parameter.

    Example:
        >>> import torch
        >>> type(optimizer("AdaBelief", torch.nn.Linear(2, 1), lr=1e-3))
        <class 'torch_optimizer.adabelief.AdaBelief'>
    """
    kind = optimizer_class(name)
    if kind is Lookahead:
        own = {key: options.pop(key) for key in ("k", "alpha") if key in options}
        return Lookahead(optimizer(options.pop("base", "adamw"), params, **options), **own)
    unfit = UNFIT.get(public_name(kind))
    if unfit is not None:
        raise OptimizerError(f"{public_name(kind)} {unfit}")
    first = next(iter(inspect.signature(kind).parameters), None)
    given = params if first == "model" else _params(params)
    known = inspect.signature(kind).parameters
    foreign = [key for key in options if key not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]
    if foreign:
        raise OptimizerError(f"{name!r} has no option {', '.join(foreign)}; it has {', '.join(list(known)[1:])}")
    try:
        return kind(given, **options)
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise OptimizerError(f"{name!r} ({kind.__module__}.{kind.__qualname__}) cannot be made with {options}: {error}") from error


def _params(params: Any) -> Any:
    if isinstance(params, nn.Module):
        return [p for p in params.parameters() if p.requires_grad]
    given = list(params)
    if not given or not all(isinstance(group, Mapping) for group in given):
        return given
    groups = [
        {**group, "params": list(group["params"]) if not isinstance(group["params"], nn.Parameter) else [group["params"]]}
        for group in given
    ]
    owner: dict[int, Any] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            label = group.get("name", i)
            if id(p) in owner:
                raise OptimizerError(
                    f"the groups {owner[id(p)]!r} and {label!r} share a parameter of shape {list(p.shape)}; put every parameter into one group only"
                )
            owner[id(p)] = label
    return groups


def optimizer_class(name: str) -> Any:
    """The optimizer class for a name.

    Args:
        name: The name, as for `optimizer`.

    Returns:
        The class.

    Raises:
        OptimizerError: If there is no such class; the error lists the closest names.

    Example:
        >>> optimizer_class("adamw"), optimizer_class("torch_optimizer.radam")
        (<class 'torch.optim.adamw.AdamW'>, <class 'torch_optimizer.radam.RAdam'>)
    """
    if not isinstance(name, str):
        raise OptimizerError(f"optimizer(name, ...) takes a name such as 'adamw', but got {type(name).__name__}: {name!r:.60}")
    source, _, bare = name.rpartition(".")
    if source and source not in SOURCES:
        raise OptimizerError(f"fnlight does not search the package {source!r} for optimizers; it searches {', '.join(SOURCES)}")
    sources = (source,) if source else SOURCES
    wanted = _plain(bare)
    known: dict[str, str] = {}
    for where in sources:
        found = {_plain(own): (own, kind) for own, kind in optimizer_classes(where).items()}
        if wanted in found:
            return found[wanted][1]
        known = {plain: f"{where}.{own}" for plain, (own, _) in found.items()} | known
    near = [known[plain] for plain in difflib.get_close_matches(wanted, list(known), n=5, cutoff=0.5)]
    lacking = [where for where in sources if where not in ("torch.optim", "torch_optimizer") and not optimizer_classes(where)]
    more = f"; {' and '.join(lacking)} not installed: pip install fnlight[optimizers]" if lacking else ""
    raise OptimizerError(f"there is no optimizer called {name!r}; the closest names are {', '.join(near) or 'none'}{more}")


def optimizer_classes(source: str) -> dict[str, Any]:
    """Every optimizer class of a package.

    Args:
        source: One of `SOURCES`.

    Returns:
        Names to classes; an empty dict if the package is not installed.

    Example:
        >>> "AdamW" in optimizer_classes("torch.optim"), len(optimizer_classes("torch_optimizer"))
        (True, 30)
    """
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name != source:
            raise
        return {}
    found = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind) and issubclass(kind, Optimizer)}
    return {
        name: _OURS[source].get(_plain(name), kind) for name, kind in found.items() if kind is not Optimizer and not name.startswith("_")
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
