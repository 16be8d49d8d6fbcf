"""Staging: the tensors of a state are copied into host buffers, from which they are written while training continues.

The buffers are made once and used again, so that a save costs no more than the copy. From a GPU the copy goes into pinned memory on a
stream of its own: the host does not wait, and the next kernels wait on the device until the tensors are read.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fnlight.checkpoint.write import Tensors
from fnlight.tensors import foreach_copy_


class Buffers:
    """Host memory for the tensors of one save, reused by the next save.

    Example:
        >>> buffers, weight = Buffers(), torch.zeros(2)
        >>> staged, wait = buffers.stage({"a": {"weight": weight}})
        >>> wait()
        >>> weight += 1
        >>> staged["a"]["weight"]
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """Copy tensors into the buffers.

        Args:
            tensors: By file, names to tensors; they may be changed as soon as this returns.

        Returns:
            The same with the buffers in their place, valid until the next call; and what waits until they are filled.
        """
        held, self._held = self._held, {}
        pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for file, named in tensors.items():
            for name, tensor in named.items():
                if tensor.layout != torch.strided or tensor.is_meta:  # refused by whoever writes it
                    self._held[file, name] = tensor
                    continue
                buffer = _fitting(held.pop((file, name), None), tensor)
                self._held[file, name] = buffer
                targets, sources = pairs.setdefault(tensor.device, ([], []))
                targets.append(buffer)
                sources.append(tensor)
        waits = [wait for device, (targets, sources) in pairs.items() if (wait := self._copy(device, targets, sources)) is not None]
        return {file: {name: self._held[file, name] for name in named} for file, named in tensors.items()}, lambda: _each(waits)

    def _copy(self, device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None] | None:
        with torch.no_grad():
            if device.type == "cpu":
                foreach_copy_(targets, sources)
                return None
            if device.type != "cuda":
                for target, source in zip(targets, sources, strict=True):  # not every device knows the foreach form
                    target.copy_(source)
                return None
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            training = torch.cuda.current_stream(device)
            stream.wait_stream(training)
            with torch.cuda.stream(stream):
                foreach_copy_(targets, sources, non_blocking=True)
                for source in sources:
                    source.record_stream(stream)
            training.wait_stream(stream)  # on the device: whatever changes these tensors next comes after the copy
            return stream.record_event().synchronize

    def clear(self) -> None:
        """Give the memory back."""
        self._held, self._streams = {}, {}


def _fitting(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and not buffer.is_meta:
        return buffer
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def _each(waits: list[Callable[[], None]]) -> None:
    for wait in waits:
        wait()
