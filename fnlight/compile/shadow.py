"""A shadow: a store with other tensors of the same shapes, on which a kernel works while it is traced.

`held` lists once the tensors that a kernel may use; `shadow` builds a store of the same structure with other tensors of the same shapes.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fnlight.errors import FnlightError
from fnlight.state import StepScratch, Store, hooked
from fnlight.tensors import buffers_of, has_step_hooks, is_lazy, leaves, map_tensors, parameters_of


class UntraceableError(FnlightError):
    """A kernel that cannot become one graph; the message says which part and why. It never leaves `fnlight.compile`."""


class UnsettledError(UntraceableError):
    """This step creates optimizer state or memory, or a condition does not hold: this step is made without a graph."""


class WantedError(FnlightError):
    """The trace must start again, with another tree of the memory or with one more number. It never leaves `fnlight.compile`."""


def held(store: Store, reads: Sequence[str]) -> list[Tensor]:
    """List the tensors of a store that its kernel may read or change, each once, in an order given by the store's structure.

    Args:
        store: The live store.
        reads: Names of the trees in the memory that the kernel uses.

    Returns:
        Parameters, buffers, optimizer state, and the tensors of these trees.

    Raises:
        UntraceableError: If the optimizer keeps tensors where they cannot be found.

    Example:
        >>> from fnlight.optim import Optim
        >>> len(held(Store(nn.Linear(2, 1), Optim(None), {}), ()))
        2
    """
    module, optimizer = store.module, store.optim.optimizer
    if store.place is not None:
        raise UntraceableError(f"{store.place} averages gradients over ranks during the backward pass, which a graph cannot hold")
    if is_lazy(store.device):
        raise UntraceableError(f"the device {str(store.device)!r} compiles steps itself")
    hooks = hooked(module)
    if hooks:
        raise UntraceableError(f"the gradient of {hooks[0]} has a hook")
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    if optimizer is not None:
        _check_optimizer(optimizer)
        known = {id(p) for p in found}
        found += [leaf for slots in optimizer.state.values() for leaf in _tensors(slots)]
        found += [leaf for group in optimizer.param_groups for leaf in _tensors(_plain(group)) if id(leaf) not in known]
    found += [leaf for name in reads for leaf in _tensors(store.memory[name])]
    return list({id(t): t for t in found}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise UntraceableError(f"{name} evaluates the loss a variable number of times per step")
    if has_step_hooks(optimizer):
        raise UntraceableError(f"{name} has hooks on its step, which would run only once")
    for key, value in vars(optimizer).items():
        if key not in ("state", "param_groups", "defaults") and any(isinstance(leaf, Tensor | Optimizer) for _, leaf in leaves(value)):
            raise UntraceableError(f"{name} keeps tensors in its attribute {key!r}")


def shadow(store: Store, reads: Sequence[str], new: Mapping[int, Tensor], rates: Sequence[Any], options: Mapping[str, Any]) -> Store:
    """Build a store of the same structure with other tensors; its module is the live one, whose tensors `swapped` replaces.

    Args:
        store: The live store.
        reads: Names of the trees in the memory that the kernel uses; the others are not there.
        new: By identity of each tensor of `held`, its replacement.
        rates: One per group of the optimizer: its learning rate, or None to leave it.
        options: Values that are set in every group that has them, such as ``{"foreach": False}``.

    Returns:
        A store for one call of a kernel.

    Example:
        >>> from fnlight.optim import Optim
        >>> store = Store(nn.Linear(2, 1), Optim(None), {})
        >>> twin = shadow(store, (), {id(t): t.detach().clone() for t in held(store, ())}, (), {})
        >>> list(twin.named)
        ['weight', 'bias']
    """
    twin = object.__new__(Store)
    for slot in Store.__slots__:
        setattr(twin, slot, getattr(store, slot))
    twin.named = {name: new[id(p)] for name, p in store.named.items()}  # pyright: ignore[reportAttributeAccessIssue]  # tensors stand in
    twin.params = [new[id(p)] for p in store.params]  # pyright: ignore[reportAttributeAccessIssue]  # as above
    twin.memory = _Memory({name: _replaced(store.memory[name], new) for name in reads})
    twin.step = StepScratch()
    twin.step.progress = _Hidden()  # pyright: ignore[reportAttributeAccessIssue]  # as above
    if store.optim.optimizer is not None:
        twin.optim = copy.copy(store.optim)
        object.__setattr__(twin.optim, "bound", None)
        object.__setattr__(twin.optim, "optimizer", _optimizer(store.optim.optimizer, new, rates, options))
    return twin


class _Memory(dict[str, Any]):
    """The trees that a kernel is known to use; another one that it asks for is added, and the trace starts again."""

    def __missing__(self, key: str) -> Any:
        raise WantedError(key)


class _Hidden:
    """Replaces the progress: its value would become a constant of the graph, so reading it raises."""

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"the step reads progress.{name}, which would be a constant in a graph; store.host.number makes it an input")


def _optimizer(optimizer: Any, new: Mapping[int, Tensor], rates: Sequence[Any], options: Mapping[str, Any]) -> Any:
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    twin.param_groups = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        made = _replaced(_plain(group), new) | {"params": [new[id(p)] for p in group["params"]]}
        made |= {key: value for key, value in options.items() if key in made}
        twin.param_groups.append(made if rate is None else made | {"lr": rate})
    twin.state = defaultdict(dict, {_key(key, new): _replaced(slots, new) for key, slots in optimizer.state.items()})
    return twin


def _key(key: Any, new: Mapping[int, Tensor]) -> Any:
    return new.get(id(key), key)


def _replaced(tree: Any, new: Mapping[int, Tensor]) -> Any:
    """A copy of a tree, down to the last container, with the tensors replaced."""
    return map_tensors(lambda tensor: new.get(id(tensor), tensor), tree)


@contextmanager
def swapped(module: nn.Module, new: Mapping[int, Tensor]) -> Iterator[None]:
    """Replace a module's parameters and buffers by other tensors for the duration of the block.

    Args:
        module: The live module.
        new: By identity of each parameter and buffer, its replacement.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with swapped(layer, {id(layer.weight): layer.weight.new_zeros(1, 1)}):
        ...     layer.weight.item()
        0.0
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    tables: list[dict[str, Any]] = [table for m in module.modules() for table in (parameters_of(m), buffers_of(m))]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = new[id(tensor)]
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


def changes(before: Store, after: Store, tables: Sequence[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Compare a shadow with one that no kernel has changed.

    Args:
        before: An unchanged shadow with the same tensors.
        after: The shadow on which the kernel worked.
        tables: Pairs of the module's buffers before and after.

    Returns:
        Pairs of a tensor and the one by which the kernel has replaced it.

    Raises:
        UntraceableError: If something changed that a graph would not change again: a number, a string, a structure.

    Example:
        >>> from fnlight.optim import Optim
        >>> store = Store(nn.Linear(2, 1), Optim(None), {})
        >>> changes(store, store, [])
        []
    """
    moved: list[tuple[Tensor, Tensor]] = []
    one, two = before.optim.optimizer, after.optim.optimizer
    if one is not None:
        name = type(one).__name__
        if [*one.state] != [*two.state] or any(one.state[key].keys() != two.state[key].keys() for key in one.state):
            raise UnsettledError(f"{name} creates its state in this step")
        for key, slots in one.state.items():
            moved += _compare(slots, two.state[key], f"{name} keeps {{}} as a Python value")
        for a, b in zip(one.param_groups, two.param_groups, strict=True):
            moved += _compare(_plain(a), _plain(b), f"{name} keeps {{}} in its groups, as a Python value")
    for key, tree in before.memory.items():
        moved += _compare(tree, after.memory[key], f"the memory of {key!r} changes {{}}, a Python value")
    for old, now in tables:
        moved += _compare(old, now, "the model changes its buffer {}")
    return moved


def _compare(old: Any, now: Any, says: str) -> list[tuple[Tensor, Tensor]]:
    one, two = dict(leaves(old)), dict(leaves(now))
    moved: list[tuple[Tensor, Tensor]] = []
    for path in [*one, *(p for p in two if p not in one)]:
        a, b = one.get(path), two.get(path)
        if a is b:
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
            moved.append((a, b))
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b) or not bool(a == b or a != a):
            raise UntraceableError(says.format(repr(path)) + ", which would be a constant in a graph")
    return moved
