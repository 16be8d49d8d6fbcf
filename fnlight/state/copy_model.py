"""The one function that copies a model, wherever fnlight needs a copy; ``copy.deepcopy`` alone loses or refuses what real models hold.

It is apart from `task`, which says what a task is: this module is about what `nn.Module` objects hold besides their tensors.
"""

import copy
import random
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.tensors import attributes_of, buffers_of, gradient_hooks, is_lazy, is_sharded

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})  # their deepcopy fails in torch 2.13


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """An independent copy of a module, with all that a training needs.

    In addition to what ``copy.deepcopy`` copies, it keeps the hooks and attributes of parameters, and parameters that share memory still do.
    Attributes that are results of a forward, such as ``self.last = self.layer(x)``, are copied without their graph.

    Args:
        model: Any module.
        memo: What ``copy.deepcopy`` has copied already, by identity; it is added to.

    Returns:
        The copy. Hooks that are methods of a module of the model are methods of its copy; all others are the same functions.

    Raises:
        TypeError: If an attribute cannot be copied; it is named.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.register_hook(lambda grad: 10 * grad)
        >>> twin = copied(model)
        >>> twin(torch.ones(1, 1)).sum().backward()
        >>> twin.weight.grad.item()
        10.0
    """
    memo = {} if memo is None else memo
    results = [v for _, v in _attributes(model) if isinstance(v, Tensor) and v.grad_fn is not None and id(v) not in memo]
    memo.update({id(v): v.detach().clone() for v in results})
    memo.update({id(b): b.clone() for b in model.buffers() if b.layout in _COMPRESSED and id(b) not in memo})
    memo.update(_tied((*model.parameters(), *model.buffers()), memo))
    before = dict(memo)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # of whatever class the attribute raises
        raise TypeError(_uncopyable(model, before, error)) from error
    for old, new in zip(model.parameters(), twin.parameters(), strict=True):
        if new is not old and not is_sharded(old):
            _follow(old, new, memo)
    return twin


def _follow(old: nn.Parameter, new: nn.Parameter, memo: dict[int, Any]) -> None:
    """Give a copied parameter the attributes and the hooks of the original."""
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, copy.deepcopy(value, memo))
    if new.requires_grad:
        before, after = gradient_hooks(old)
        for hook in before:
            new.register_hook(_rebound(hook, memo))
        for hook in after:
            new.register_post_accumulate_grad_hook(_rebound(hook, memo))


def _rebound(hook: Any, memo: dict[int, Any]) -> Any:
    return MethodType(hook.__func__, memo[id(hook.__self__)]) if isinstance(hook, MethodType) and id(hook.__self__) in memo else hook


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold besides parameters and modules, by path; of dicts, lists and tuples, what is in them."""
    for prefix, inner in model.named_modules():
        for name, value in (*attributes_of(inner).items(), *buffers_of(inner).items()):
            yield from _inside(f"{prefix}.{name}".lstrip("."), value, ())


def _inside(path: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _inside(f"{path}[{key!r}]", inner, above)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _inside(f"{path}[{i}]", inner, above)
    else:
        yield path, value


def _uncopyable(model: nn.Module, memo: dict[int, Any], error: Exception) -> str:
    known = memo | {id(m): m for m in model.modules()}
    for path, value in _attributes(model):
        try:
            copy.deepcopy(value, dict(known))
        except Exception as found:  # noqa: BLE001  # of whatever class, see above
            return (
                f"the model cannot be copied because of its attribute {path}, of type {type(value).__name__}: {found}; a state works on a copy of "
                "the model, so make this object where it is used, keep it outside of the model, or give its class a __deepcopy__"
            )
    return (
        f"the model, of type {type(model).__name__}, cannot be copied: {error}; a state works on a copy, so copy.deepcopy(model) must work"
    )


def _tied(tensors: Iterable[Tensor], memo: dict[int, Any]) -> dict[int, Any]:
    """Copies of parameters that share memory with another parameter or buffer, which share it in the same way; deepcopy would part them."""
    spans = sorted((_span(t) for t in {id(t): t for t in tensors if _has_memory(t) and id(t) not in memo}.values()), key=lambda s: s[:2])
    groups: list[list[tuple[int, int, Tensor]]] = []
    end = 0
    for span in spans:
        if groups and span[0] < end:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span[1])
    return {id(t): new for group in groups if len(group) > 1 for t, new in _copies([t for _, _, t in group])}


def _copies(group: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    memory = group[0].untyped_storage().clone()
    for old in group:
        new = torch.empty(0, dtype=old.dtype, device=old.device).set_(memory, old.storage_offset(), old.shape, old.stride())
        yield old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not is_lazy(tensor.device) and not tensor.is_meta and tensor.numel() > 0 and tensor.grad_fn is None


def _span(tensor: Tensor) -> tuple[int, int, Tensor]:
    """The first and the last byte of a tensor."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.itemsize, tensor


def check_generators(model: nn.Module) -> None:
    """Refuse random generators that a model keeps for itself: they are in no checkpoint, so that a resumed run would draw other numbers.

    Args:
        model: Any module.

    Raises:
        TypeError: If there is one, in a module that does not save it by a ``get_extra_state`` of its own.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> model.noise = torch.Generator()
        >>> check_generators(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: the model keeps a random generator of its own, noise (Generator), ...
    """
    saved = [name for name, m in model.named_modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
    for path, value in _attributes(model):
        if _is_generator(value) and not any(path.startswith(f"{name}.".lstrip(".")) for name in saved):
            raise TypeError(
                f"the model keeps a random generator of its own, {path} ({type(value).__name__}), which no checkpoint holds, so that a resumed run "
                "would draw other numbers; leave it out and draw from the global generators, which fnlight seeds for each step, or save it in "
                "get_extra_state and set_extra_state of the module"
            )


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator | random.Random) or type(value).__module__.startswith("numpy.random")
