"""The tensors of a store as inputs of graphs, and everything else on which a graph depends."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.compile.shadow import held
from fnlight.state import Store
from fnlight.tensors import leaves

_CHANGES = ("params", "lr", "initial_lr")  # what a graph takes as inputs, or has no use for
_PLAIN = (bool, int, float, str, type(None))


@attrs.define(eq=False, repr=False)
class Bound:
    """One store, traversed once; at every further step it is only checked for changes.

    Args:
        store: The store.
        reads: Names of the trees in the memory of combinators that the kernel uses.
        version: The version of the store at the last call.
        signs: The descriptions seen so far, with a number for each.

    Example:
        >>> from fnlight.optim import Optim
        >>> bound = Bound(Store(torch.nn.Linear(1, 1), Optim(None), {}), (), 0, {})
        >>> bound.number((0, 0), 0.5) is bound.number((0, 0), 0.25), bound.number((0, 0), 0.25).item(), bound.sign()
        (True, 0.25, 0)
    """

    store: Store
    reads: Sequence[str]
    version: int
    signs: dict[Any, int]
    tensors: list[Tensor] = attrs.field(init=False)
    flat: list[Tensor] = attrs.field(init=False)
    groups: list[Any] = attrs.field(init=False)
    _options: list[Callable[[Any], Any]] = attrs.field(init=False)
    _modules: list[Any] = attrs.field(init=False)
    _params: list[Tensor] = attrs.field(init=False)
    _fixed: Any = attrs.field(init=False)
    _seen: Any = attrs.field(init=False, default=None)
    _sign: int = attrs.field(init=False, default=-1)
    _numbers: dict[Any, tuple[Tensor, list[float]]] = attrs.field(init=False, factory=dict)
    _rates: tuple[Any, Any, list[Tensor]] = attrs.field(init=False, default=(None, None, []))

    def __attrs_post_init__(self) -> None:
        store, optimizer = self.store, self.store.optim.optimizer
        self.tensors = held(store, self.reads)
        self.flat = [t.detach() for t in self.tensors]
        self.groups = [] if optimizer is None else optimizer.param_groups
        self._options = [_options_of(group) for group in self.groups]
        self._modules, self._params = list(store.module.modules()), list(store.module.parameters())
        settings = tuple((type(m), tuple((k, v) for k, v in vars(m).items() if _is_setting(k, v))) for m in self._modules)
        self._fixed = tuple(self.reads), type(optimizer), described(self.tensors), settings

    def sign(self) -> int:
        """A number for everything on which a graph depends besides batches and tensor values: modes, ``requires_grad``, options of groups."""
        seen = (
            [m.training for m in self._modules],
            [p.requires_grad for p in self._params],
            [(options(group), len(group), group.get("lr").__class__) for group, options in zip(self.groups, self._options, strict=True)],
        )
        if seen != self._seen:
            groups = tuple((tuple(group), described(_static(group))) for group in self.groups)
            sign = (self._fixed, tuple(seen[0]), tuple(seen[1]), groups, tuple(kind for _, _, kind in seen[2]))
            self._seen, self._sign = seen, self.signs.setdefault(sign, len(self.signs))
        return self._sign

    def rates(self, takes: Sequence[Sequence[bool]], rates: Sequence[Sequence[Any]]) -> list[Tensor]:
        """The learning rates, by update and group, that are inputs of a graph; if they are those of the last call, only they are compared."""
        known, values, found = self._rates
        if known is not takes or values != rates:
            found = list[Tensor]()
            for update, (taken, each) in enumerate(zip(takes, rates, strict=True)):
                found += [self.number((update, group), lr) for group, (take, lr) in enumerate(zip(taken, each, strict=True)) if take]
            self._rates = (takes, rates, found) if all(map(all, takes)) else (None, None, [])  # those in tensors are not compared
        return found

    def number(self, place: Any, value: float) -> Tensor:
        """A number as a tensor, which is written only when the number changes."""
        found = self._numbers.get(place)
        if found is None:
            device = self.store.device if self.store.device.type == "cuda" else None  # where a captured graph reads it
            found = self._numbers[place] = (torch.tensor(value, dtype=torch.float64, device=device), [value])
        if found[1][0] != value:
            found[0].fill_(value)
            found[1][0] = value
        return found[0]


def _static(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _CHANGES}


def _options_of(group: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function that returns the options of a group for comparison: plain values themselves, others described."""
    static = _static(group)
    if static and all(_is_plain(value) for value in static.values()):
        return itemgetter(*static)
    return lambda group: described(_static(group))


def _is_plain(value: Any) -> bool:
    return value.__class__ in _PLAIN or (value.__class__ is tuple and all(v.__class__ in _PLAIN for v in value))


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module may change what its forward pass does."""
    return name != "training" and (_is_plain(value) or (callable(value) and not name.startswith("_")))


def described(node: Any, tensors: list[Tensor] | None = None) -> Any:
    """Describe what a graph depends on in a batch or an option: shapes, types and strides of tensors, and all other values themselves.

    Args:
        node: Any tree.
        tensors: Its tensors are appended to this list, in the order of its leaves.

    Returns:
        A hashable value that can be compared.

    Example:
        >>> described((torch.ones(2), 3))
        ((torch.Size([2]), torch.float32, device(type='cpu'), (1,)), 3)
    """
    kind = node.__class__
    if kind is Tensor:
        return _shape(node, tensors)
    if kind is tuple or kind is list:
        return tuple([_shape(each, tensors) if each.__class__ is Tensor else described(each, tensors) for each in node])
    if node is None or kind in _PLAIN:
        return node
    return tuple([(path, _leaf(node, leaf, tensors)) for path, leaf in leaves(node)])


def _shape(tensor: Tensor, tensors: list[Tensor] | None) -> Any:
    if tensors is not None:
        tensors.append(tensor)
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _leaf(node: Any, leaf: Any, tensors: list[Tensor] | None) -> Any:
    if isinstance(leaf, Tensor):
        if tensors is not None:
            tensors.append(leaf)
        return type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return type(leaf) if leaf is node else described(leaf)
