"""A placeholder store whose tensors are replaced on load: until then it shares the memory of another state instead of copying it."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fnlight.state import Store, copied
from fnlight.tensors import give_memory, is_lazy, is_sharded, like_parts, local, lying_like


class Lent:
    """Tensors that share the memory of another state, which must not be written to.

    `put` gives such a tensor its own memory; a tensor that is no longer referenced is forgotten.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> lent, memo = Lent(), {}
        >>> lent.borrow(model.parameters(), memo)
        >>> twin = copy.deepcopy(model, memo)
        >>> lent.put(twin.bias, torch.ones(1)), lent.put(twin.bias, torch.ones(1))
        (True, False)
        >>> twin.bias.item() == model.bias.item(), twin.weight.data_ptr() == model.weight.data_ptr()
        (False, True)
    """

    def __init__(self) -> None:
        self._held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def borrow(self, tensors: Iterable[Tensor], memo: dict[int, Any]) -> None:
        """Let a ``deepcopy`` with this memo borrow the memory of tensors; those that share some with another are copied by it.

        Args:
            tensors: Of the original.
            memo: What the ``deepcopy`` will be given.
        """
        given = {id(t): t for t in tensors}.values()
        for tensor in filter(is_sharded, given):
            twin = like_parts(local(tensor), tensor)
            memo[id(tensor)] = self._held[id(twin)] = twin
        known = [t for t in given if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
        known = [t for t in known if not is_lazy(t.device)]  # a lazy device knows no memory that could be lent
        times = Counter(tensor.untyped_storage().data_ptr() for tensor in known)
        for tensor in known:
            if _is_whole(tensor) and times[tensor.untyped_storage().data_ptr()] == 1:
                twin = nn.Parameter(tensor.data, tensor.requires_grad) if type(tensor) is nn.Parameter else tensor.data
                memo[id(tensor)] = self._held[id(twin)] = twin

    def put(self, target: Tensor, value: Tensor) -> bool:
        """Let a value, which is nobody else's, become the memory of a tensor that is lent; say whether it was.

        Args:
            target: A tensor of the copy.
            value: Of the same shape; it is copied where device, dtype or strides differ.

        Returns:
            False, and nothing is done, if the tensor has memory of its own.
        """
        if self._held.pop(id(target), None) is None:
            return False
        target.data = fitted(value, target)
        return True

    def own(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Copy what is still lent: of these tensors, or all of it."""
        for tensor in list(self._held.values() if tensors is None else tensors):
            if self._held.pop(id(tensor), None) is not None:
                give_memory(tensor)


def _is_whole(tensor: Tensor) -> bool:
    """Say whether a tensor is all there is in its memory, so that it may get another one."""
    size = tensor.numel() * tensor.itemsize
    return 0 < size == tensor.untyped_storage().nbytes() and not tensor.is_meta and tensor.grad_fn is None


def fitted(value: Tensor, like: Tensor, same_kind: bool = True) -> Tensor:
    """A value with the strides of another tensor, its dtype and its device; itself, where it has them.

    Args:
        value: Of the same shape.
        like: The other tensor.
        same_kind: False leaves the value its own dtype and device.

    Returns:
        The value, or a copy of it.

    Example:
        >>> value = torch.ones(2, 3)
        >>> fitted(value, torch.zeros(2, 3)) is value, fitted(value, torch.zeros(3, 2).T).stride()
        (True, (1, 2))
    """
    dtype, device = (like.dtype, like.device) if same_kind else (value.dtype, value.device)
    value = lying_like(value, like)
    if (value.dtype, value.device, value.stride()) == (dtype, device, like.stride()):
        return value
    return torch.empty_like(like, dtype=dtype, device=device, requires_grad=False).copy_(value)


def twin(store: Store) -> tuple[Store, Lent]:
    """Copy a store as a placeholder: the copy shares the tensors of model and optimizers, and has no memory of combinators.

    Args:
        store: The original; it stays as it is.

    Returns:
        The copy, and what it has borrowed.

    Example:
        >>> from fnlight.optim import Optim
        >>> store = Store(nn.Linear(2, 1), Optim(None), {"ema": {}})
        >>> copied, lent = twin(store)
        >>> copied.module.weight.data_ptr() == store.module.weight.data_ptr(), copied.memory
        (True, {})
    """
    memo: dict[int, Any] = {}
    lent = Lent()
    lent.borrow(_tensors(store), memo)
    module = copied(store.module, memo) if store.place is None else store.place.copy(store.module, memo)
    return Store(module, copy.deepcopy(store.optims if store.phases else store.optim, memo), {}, store.place), lent


def _tensors(store: Store) -> Iterator[Tensor]:
    yield from store.module.parameters()
    yield from store.module.buffers()
    for optim in store.optims.values():
        for slots in (optim.optimizer.state if optim.optimizer is not None else {}).values():
            yield from (value for value in (slots.values() if isinstance(slots, dict) else ()) if isinstance(value, Tensor))
