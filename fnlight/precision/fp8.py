"""Linear layers in 8-bit floating point, with the optional package torchao."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from fnlight.errors import ConfigError, check_type
from fnlight.optim import matches

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]

_LEAST = (8, 9)  # the first compute capability with fp8 matrix products
_MULTIPLE = 16  # both sizes of a weight matrix must be multiples of this
_CONVERTED = "Float8Linear"


def to_fp8(module: nn.Module, *, exclude: Iterable[str] = (), recipe: Recipe = "tensorwise", emulate: bool = False) -> nn.Module:
    """Convert the linear layers of a module to fp8 in place: their three matrix products, forward and backward.

    Weights keep their dtype and their names, so optimizers, checkpoints and averages work as before. Train with
    ``autocast(torch.bfloat16)``. Layers with a size that is not a multiple of 16 are not converted. ``FitConfig(precision="fp8")`` does
    both.

    Args:
        module: The model, before a `Task` is made of it.
        exclude: Name patterns of layers that are not converted, such as ``["head"]``.
        recipe: How numbers are scaled before they are rounded, in the terms of torchao: ``"tensorwise"`` (fastest), ``"rowwise"`` or
            ``"rowwise_with_gw_hp"`` (most exact).
        emulate: True rounds to fp8 and multiplies in the usual precision. It is slow, but shows on any hardware how a model trains in fp8.

    Returns:
        The module; a new one if the module itself is a linear layer.

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
            "use bf16, or test fp8 slowly without such a GPU: fl.to_fp8(model, emulate=True)"
        )
    found = torch.cuda.get_device_capability()
    if torch.version.hip is None and found < _LEAST:
        raise ConfigError(
            f"fp8 needs compute capability {_LEAST[0]}.{_LEAST[1]} or more, but {torch.cuda.get_device_name()} has {found[0]}.{found[1]}; use bf16, or "
            "test fp8 slowly without such a GPU: fl.to_fp8(model, emulate=True)"
        )


def _package() -> Any:
    try:
        from torchao import float8  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ConfigError(f'fp8 needs the package torchao ({error}); pip install "fnlight[fp8]", or use bf16') from error
    return float8


def _convertible(module: nn.Module, exclude: tuple[str, ...]) -> set[str]:
    layers = {name: m for name, m in module.named_modules() if type(m) is nn.Linear}
    for pattern in exclude:
        if not any(matches(name, pattern) for name in layers):
            raise ConfigError(
                f"to_fp8(exclude=...) has the pattern {pattern!r}, but no linear layer of the model matches it; there are {list(layers)[:8]}"
            )
    found = {
        name
        for name, m in layers.items()
        if m.in_features % _MULTIPLE == 0 and m.out_features % _MULTIPLE == 0 and not any(matches(name, pattern) for pattern in exclude)
    }
    if not found:
        sides = [[m.out_features, m.in_features] for m in list(layers.values())[:8]]
        raise ConfigError(
            f"no layer can compute in fp8: it needs linear layers whose sizes are multiples of {_MULTIPLE}, but the model has {sides}; use bf16"
        )
    return found
