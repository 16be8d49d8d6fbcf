"""Linear layers that compute in 8-bit floating point, through torchao, which is an extra."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from fnlight.errors import ConfigError, check_type
from fnlight.optim import matches

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]

_LEAST = (8, 9)  # the compute capability that brought matrix products in fp8
_MULTIPLE = 16  # what both sides of a matrix must divide by
_CONVERTED = "Float8Linear"


def to_fp8(module: nn.Module, *, exclude: Iterable[str] = (), recipe: Recipe = "tensorwise", emulate: bool = False) -> nn.Module:
    """Let the linear layers of a module compute in fp8, in place: their three matrix products, forward and backward.

    Weights stay what they are, as do all names, so optimizers, checkpoints and averages know nothing of it; train with
    ``autocast(torch.bfloat16)``. Layers whose sides are no multiples of 16 stay as they are. ``FitConfig(precision="fp8")`` does both.

    Args:
        module: The model, before a `Task` is made of it.
        exclude: Patterns of names of layers that stay as they are, such as ``["head"]``.
        recipe: How numbers are scaled before they are rounded, as torchao calls it: ``"tensorwise"`` (fastest), ``"rowwise"`` or
            ``"rowwise_with_gw_hp"`` (most exact).
        emulate: True rounds to fp8 and multiplies in the usual precision: slow, on any hardware, to see what a training makes of it.

    Returns:
        The module; another one if it is itself a linear layer.

    Raises:
        ConfigError: If the hardware or the package is missing, or no layer can be converted.

    Example:
        >>> to_fp8(nn.Linear(16, 16), recipe="magic")
        Traceback (most recent call last):
        fnlight.errors.ConfigError: recipe must be one of ('tensorwise', 'rowwise', 'rowwise_with_gw_hp'), but got 'magic'

    References:
        Micikevicius et al., "FP8 formats for deep learning" (2022).
    """
    check_type("to_fp8(module)", module, nn.Module, "an nn.Module")
    check_type("to_fp8(exclude=...)", exclude, Iterable, "patterns of names")
    if recipe not in get_args(Recipe):
        raise ConfigError(f"recipe must be one of {get_args(Recipe)}, but got {recipe!r}")
    if not emulate:
        _check_hardware()
    float8 = _package()
    if any(type(m).__name__ == _CONVERTED for m in module.modules()):
        return module
    names = _convertible(module, (exclude,) if isinstance(exclude, str) else tuple(exclude))
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    config = replace(config, emulate=True) if emulate else config
    return float8.convert_to_float8_training(module, config=config, module_filter_fn=lambda m, name: name in names)


def _check_hardware() -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"fp8 needs a GPU with fp8 matrix products (compute capability {_LEAST[0]}.{_LEAST[1]}: H100, L4, RTX 40, or newer), but there is none; "
            "take bf16, or try what fp8 does to a training, slowly, with fl.to_fp8(model, emulate=True)"
        )
    found = torch.cuda.get_device_capability()
    if torch.version.hip is None and found < _LEAST:
        raise ConfigError(
            f"fp8 needs compute capability {_LEAST[0]}.{_LEAST[1]} or more, but {torch.cuda.get_device_name()} has {found[0]}.{found[1]}; take bf16, or "
            "try what fp8 does to a training, slowly, with fl.to_fp8(model, emulate=True)"
        )


def _package() -> Any:
    try:
        from torchao import float8  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ConfigError(f'fp8 needs the package torchao ({error}); pip install "fnlight[fp8]", or take bf16') from error
    return float8


def _convertible(module: nn.Module, exclude: tuple[str, ...]) -> set[str]:
    layers = {name: m for name, m in module.named_modules() if type(m) is nn.Linear}
    for pattern in exclude:
        if not any(matches(name, pattern) for name in layers):
            raise ConfigError(
                f"to_fp8(exclude=...) means {pattern!r}, but the model has no such linear layer; there are {list(layers)[:8]}"
            )
    found = {
        name
        for name, m in layers.items()
        if m.in_features % _MULTIPLE == 0 and m.out_features % _MULTIPLE == 0 and not any(matches(name, pattern) for pattern in exclude)
    }
    if not found:
        sides = [[m.out_features, m.in_features] for m in list(layers.values())[:8]]
        raise ConfigError(
            f"no layer can compute in fp8: it needs linear layers whose sides are multiples of {_MULTIPLE}, but there are {sides}; take bf16"
        )
    return found
