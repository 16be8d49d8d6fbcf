"""Parameter groups by rule: each rule says which parameters it means and what holds for them; groups follow from that."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import attrs
from torch import Tensor, nn

from fnlight.errors import OptimizerError, check_type
from fnlight.tensors import NORMS

Options = Mapping[str, Any]


@attrs.frozen
class GroupRule:
    """What holds for some parameters; made by `no_decay`, `layer_decay` and `frozen`.

    Args:
        text: The code that makes it.
        find: Maps a module and the names of its trainable parameters to the group name and the options of those that it means.
        freezes: Whether those that it means are not trained at all.

    Example:
        >>> no_decay()
        no_decay()
    """

    text: str
    find: Callable[[nn.Module, Sequence[str]], Mapping[str, tuple[str, Options]]]
    freezes: bool = False

    def __repr__(self) -> str:
        return self.text


def param_groups(model: nn.Module, *rules: GroupRule | Mapping[str, Options], **options: Any) -> list[dict[str, Any]]:
    """The parameter groups of a model, by rule: every trainable parameter is in one group, and every group has a name.

    Parameters for which the same rules hold make a group; its name says which: ``"backbone/no_decay"``; ``"rest"`` if none does.
    Rules are gone through in order: what a later one sets wins, and `layer_decay` multiplies the learning rate that it finds.

    Args:
        model: The model that `configure_optimizers` was given.
        *rules: `no_decay`, `layer_decay`, `frozen`, or a mapping from patterns of names to options, such as
            ``{"backbone": {"lr": 1e-4}}``; ``"name"`` among the options is what the group is called. A pattern is the beginning of
            a qualified name, in whole parts, and may hold ``*``.
        **options: What holds for all parameters that no rule says otherwise, such as ``lr`` and ``weight_decay``.

    Returns:
        The groups, for any optimizer: ``torch.optim.AdamW(groups)``.

    Raises:
        OptimizerError: If a pattern means no parameter, two patterns of a mapping mean the same one, or none is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        >>> groups = param_groups(model, {"2": {"lr": 1e-2, "name": "head"}}, no_decay(), lr=1e-3, weight_decay=0.1)
        >>> for group in groups:
        ...     print(group["name"], len(group["params"]), group["lr"], group["weight_decay"])
        rest 1 0.001 0.1
        no_decay 3 0.001 0.0
        head 1 0.01 0.1
        head/no_decay 1 0.01 0.0
    """
    check_type("param_groups(model, ...)", model, nn.Module, "an nn.Module")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: dict(options) for name in named}
    labels: dict[str, list[str]] = {name: [] for name in named}
    left_out: dict[str, Tensor] = {}
    for rule in rules:
        found = (_by_pattern(rule) if isinstance(rule, Mapping) else _rule(rule)).find(model, list(held))
        for name, (label, given) in found.items():
            if isinstance(rule, GroupRule) and rule.freezes:
                left_out[name] = named[name]
                del held[name]
                continue
            held[name] |= {key: _value(key, value, held[name], name=name, rule=rule) for key, value in given.items()}
            labels[name] += [label] if label else []
    if not held:
        raise OptimizerError(f"nothing is left to train: {', '.join(map(repr, rules)) or 'no rule'} leaves no trainable parameter")
    groups = _grouped(named, held, labels)
    for p in left_out.values():
        p.requires_grad_(False)
    return groups


def _rule(rule: Any) -> GroupRule:
    if not isinstance(rule, GroupRule):
        raise OptimizerError(
            f"a rule must be no_decay(...), layer_decay(...), frozen(...) or a mapping of patterns to options, but got {rule!r:.80}; "
            "options of all groups are given by name, as in lr=1e-3"
        )
    return rule


def _value(key: str, value: Any, held: Options, name: str, rule: Any) -> Any:
    if not isinstance(value, _Scaled):
        return value
    if not isinstance(held.get(key), int | float):
        raise OptimizerError(
            f"{rule} multiplies {key!r}, but for {name!r} it is {held.get(key)!r}; give it, as in param_groups(..., {key}=1e-3)"
        )
    return held[key] * value.factor


def _grouped(named: Mapping[str, Tensor], held: Mapping[str, Options], labels: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, given in held.items():
        own = {key: value for key, value in given.items() if key != "name"}
        label = "/".join(labels[name]) or "rest"
        group = groups.setdefault(label, {"params": [], "name": label, **own})
        if {key: value for key, value in group.items() if key not in ("params", "name")} != own:
            raise OptimizerError(f"two groups are called {label!r}, but hold other options; give one another name, at {name!r}")
        group["params"].append(named[name])
    return list(groups.values())


@attrs.frozen(repr=False)
class _Scaled:
    """A factor of what an option was before."""

    factor: float


def matches(name: str, pattern: str) -> bool:
    """Say whether a pattern means a qualified name: it is the name's beginning, in whole parts, and may hold ``*``.

    Args:
        name: A qualified name.
        pattern: Such as ``"backbone"`` or ``"layers.*.norm"``.

    Returns:
        Whether it does.

    Example:
        >>> matches("backbone.0.weight", "backbone"), matches("backbone2.weight", "backbone")
        (True, False)
    """
    bare = pattern.removesuffix(".")
    return fnmatchcase(name, bare) or fnmatchcase(name, f"{bare}.*")


def meant(pattern: str, model: nn.Module, where: str) -> list[str]:
    """The parameters that a pattern means, at least one.

    Args:
        pattern: As for `matches`.
        model: Whose parameters.
        where: What the error calls the place of the pattern.

    Returns:
        Their names.

    Raises:
        OptimizerError: If it means none.

    Example:
        >>> meant("0", nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "freeze")
        ['0.weight', '0.bias']
    """
    found = [name for name, _ in model.named_parameters() if matches(name, pattern)]
    if not found:
        raise _means_nothing(pattern, model, where)
    return found


def _means_nothing(pattern: str, model: nn.Module, where: str) -> OptimizerError:
    names = [name for name, _ in model.named_parameters()]
    parts = dict.fromkeys(".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2))
    near = difflib.get_close_matches(pattern, list(parts), n=4, cutoff=0.5) or names[:4]
    return OptimizerError(f"{pattern!r} of {where} means no parameter; near to it are {near}")


def _by_pattern(given: Mapping[str, Options]) -> GroupRule:
    def find(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, Options]]:
        found: dict[str, tuple[str, Options]] = {}
        owner: dict[str, str] = {}
        for pattern, options in given.items():
            if not isinstance(options, Mapping):
                raise OptimizerError(f"{pattern!r} must map to options, as in {{'lr': 1e-4}}, but maps to {options!r:.60}")
            members = [name for name in meant(pattern, model, "param_groups") if name in names]
            if not members:
                raise OptimizerError(
                    f"{pattern!r} of param_groups means frozen parameters only, for which no option can hold; leave it out"
                )
            both = [name for name in members if name in owner]
            if both:
                raise OptimizerError(
                    f"{both[0]!r} is meant by two patterns, {owner[both[0]]!r} and {pattern!r} ({len(both)} in all); let them differ"
                )
            owner |= dict.fromkeys(members, pattern)
            label = str(options.get("name", pattern.strip(".*") or pattern))
            found |= dict.fromkeys(members, (label, options))
        return found

    return GroupRule(repr(dict(given)), find)


def no_decay(*also: str | type[nn.Module]) -> GroupRule:
    """No weight decay for biases and for all parameters of norms.

    A norm is known by its type: the batch, layer, group, instance and RMS norms of torch, and any module whose class is called
    a norm, such as ``LlamaRMSNorm``. A bias is known by the last part of its name: ``bias``, ``in_proj_bias``, ``bias_ih_l0``.

    Args:
        *also: Further patterns of names, or types of modules, such as ``nn.Embedding``.

    Returns:
        A rule for `param_groups`; its group is called ``no_decay``.

    Raises:
        OptimizerError: If a pattern means no parameter, or is neither a text nor a type.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> [(group["name"], len(group["params"])) for group in param_groups(model, no_decay(), weight_decay=0.1)]
        [('rest', 1), ('no_decay', 3)]
    """
    wrong = [one for one in also if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Module))]
    if wrong:
        raise OptimizerError(f"no_decay takes patterns of names and types of modules, but got {wrong[0]!r}")
    kinds = tuple(one for one in also if isinstance(one, type))
    patterns = [one for one in also if isinstance(one, str)]

    def find(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, Options]]:
        inside = {
            f"{at}.{own}".lstrip(".")
            for at, m in model.named_modules()
            if _is_norm(m) or isinstance(m, kinds)
            for own, _ in m.named_parameters(recurse=False, remove_duplicate=False)
        }
        for pattern in patterns:
            inside |= set(meant(pattern, model, "no_decay"))
        return {name: ("no_decay", {"weight_decay": 0.0}) for name in names if name in inside or _is_bias(name)}

    shown = ", ".join(one.__name__ if isinstance(one, type) else repr(one) for one in also)
    return GroupRule(f"no_decay({shown})", find)


def _is_norm(module: nn.Module) -> bool:
    known = (*NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, known) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2].split("_")


def layer_decay(rate: float, *layers: str | tuple[str, ...]) -> GroupRule:
    """Learning rates that shrink from the output to the input: the last layer has the full one, each before it `rate` times the next.

    Args:
        rate: What a layer's learning rate is of the next one's, above 0 and at most 1.
        *layers: Patterns from the input to the output, which together mean every parameter. One with ``*`` in the place of a number,
            such as ``"blocks.*"``, stands for as many layers as there are numbers; a tuple of patterns is one layer.

    Returns:
        A rule for `param_groups`; its groups are called ``layer0``, ``layer1``, ..., from the input on.

    Raises:
        OptimizerError: If the rate is out of its range, a pattern means no parameter, or a parameter is meant by no layer or by two.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        >>> rule = layer_decay(0.5, "embed", "blocks.*")
        >>> [(group["name"], group["lr"]) for group in param_groups(model, rule, lr=1.0)]
        [('layer0', 0.25), ('layer1', 0.5), ('layer2', 1.0)]

    References:
        Howard and Ruder, "Universal language model fine-tuning for text classification" (2018).
    """
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= 1:
        raise OptimizerError(f"layer_decay(rate) must be a number above 0 and at most 1, but got {rate!r}")
    if len(layers) == 0:
        raise OptimizerError(
            'layer_decay needs the layers from the input to the output, as in layer_decay(0.8, "embed", "blocks.*", "head")'
        )
    for layer in layers:
        check_type("layer_decay(rate, *layers)", layer, str | tuple, "a pattern of names, or a tuple of them for one layer")
    text = f"layer_decay({rate}, {', '.join(map(repr, layers))})"

    def find(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, Options]]:
        number: dict[str, int] = {}
        depth = 0
        for layer in layers:
            found = _layers(layer, model, text)
            both = [name for name in found if name in number]
            if both:
                raise OptimizerError(f"{both[0]!r} is meant by two layers of {text} ({len(both)} in all); let them differ")
            number |= {name: depth + place for name, place in found.items()}
            depth += max(found.values()) + 1
        missed = [name for name in names if name not in number]
        if missed:
            raise OptimizerError(
                f"{text} says nothing about {missed[:8]} ({len(missed)} in all); name their layer, from the input to the output"
            )
        return {name: (f"layer{number[name]}", {"lr": _Scaled(rate ** (depth - 1 - number[name]))}) for name in names}

    return GroupRule(text, find)


def _layers(layer: str | tuple[str, ...], model: nn.Module, where: str) -> dict[str, int]:
    """By name, the layer that a pattern means it to be in, counted from 0; frozen layers count as well."""
    if isinstance(layer, tuple) or "*" not in layer:
        patterns = layer if isinstance(layer, tuple) else (layer,)
        return dict.fromkeys((name for pattern in patterns for name in meant(pattern, model, where)), 0)
    shape = re.compile(re.escape(layer.removesuffix(".")).replace(r"\*", r"(\d+)", 1) + r"(\.|$)")
    found = {name: int(hit[1]) for name, _ in model.named_parameters() if (hit := shape.match(name))}
    if not found:
        raise _means_nothing(layer, model, where)
    order = {number: place for place, number in enumerate(sorted(set(found.values())))}
    return {name: order[number] for name, number in found.items()}


def frozen(*patterns: str) -> GroupRule:
    """Parameters that are not trained: they are in no group, and their gradients are switched off.

    This is the one thing that `param_groups` changes in the model that it is given: ``requires_grad`` of these becomes False.

    Args:
        *patterns: Patterns of names, such as ``"backbone"``.

    Returns:
        A rule for `param_groups`.

    Raises:
        OptimizerError: If there is no pattern, or one means no parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> groups = param_groups(model, frozen("0"))
        >>> len(groups[0]["params"]), model[0].weight.requires_grad
        (2, False)
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptimizerError(f"frozen takes patterns of names, as in frozen('backbone'), but got {patterns!r}")
    text = f"frozen({', '.join(map(repr, patterns))})"

    def find(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, Options]]:
        chosen = {name for pattern in patterns for name in meant(pattern, model, text)}
        return {name: ("", {}) for name in names if name in chosen}

    return GroupRule(text, find, freezes=True)
