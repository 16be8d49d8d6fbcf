"""Copies of batches to a device, without waiting for them.

A copy overlaps with computation only if it is made from pinned memory and on a stream of its own. So on CUDA each batch goes through one of
two sets of pinned buffers: while the device copies from one, the next batch is put into the other. The host reads the next batch while
the device still works on the one before, so nothing has to be read ahead, and the order of everything is that of a loop without it.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fnlight.data.combine import Triple
from fnlight.errors import LoaderWarning, warn
from fnlight.tensors import leaves, map_nodes, spread_on


def transferred(found: Iterator[Triple], device: torch.device) -> Iterator[Triple]:
    """Move the batches of an epoch to a device.

    Args:
        found: Gives ``(batch, samples, last)``.
        device: Where tensors are moved to.

    Yields:
        The same, moved.

    Example:
        >>> [batch.device.type for batch, _, _ in transferred(iter([(torch.ones(1), 1, True)]), torch.device("meta"))]
        ['meta']
    """
    spread = spread_on(device)
    arrive = None if spread is None else lambda tensor: spread(tensor.to(device, non_blocking=True))
    send = Lane(Streams(device)).send if device.type == "cuda" else lambda batch: moved(batch, device, arrive)
    first = True
    for batch, samples, last in found:
        if first and (kind := left_behind(batch)) is not None:
            warn(
                f"a batch holds a {kind} with tensors that are not moved to {device}, since it has no method to; give it `def to(self, device)` that "
                "returns a moved one, or make it a dataclass",
                LoaderWarning,
            )
        first = False
        yield send(batch), samples, last
        batch = None


def moved(node: Any, device: torch.device, copy: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Move a tree to another device; objects with their own ``to`` are moved by it.

    Args:
        node: Any tree.
        device: Where it goes.
        copy: Moves a tensor; None does it without waiting.

    Returns:
        A tree of the same types.

    Example:
        >>> moved({"x": (torch.ones(1), 2)}, torch.device("cpu"))
        {'x': (tensor([1.]), 2)}
    """
    if isinstance(node, Tensor):
        return node.to(device, non_blocking=True) if copy is None else copy(node)
    kind = node.__class__
    if kind is dict:
        return {key: moved(value, device, copy) for key, value in node.items()}
    if kind is tuple or kind is list:
        return kind([moved(value, device, copy) for value in node])

    def of(each: Any) -> Any:
        if isinstance(each, Tensor):
            return moved(each, device, copy)
        to = getattr(each, "to", None)
        if not callable(to):
            return NotImplemented
        return to(device, non_blocking=True) if isinstance(each, PackedSequence) else to(device)

    return map_nodes(of, node)


def left_behind(batch: Any) -> str | None:
    """The class of an object in a batch that holds tensors and cannot be moved; None if there is none.

    Args:
        batch: Any tree.

    Returns:
        Its name.

    Example:
        >>> from types import SimpleNamespace
        >>> left_behind({"x": SimpleNamespace(y=torch.ones(1))}), left_behind((torch.ones(1), "a"))
        ('SimpleNamespace', None)
    """
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) or callable(getattr(leaf, "to", None)):
            continue
        if any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values()):
            return type(leaf).__name__
    return None


@attrs.frozen(eq=False, repr=False)
class Streams:
    """What a `Lane` needs of a CUDA device.

    Args:
        device: The device.
        side: The stream on which batches are copied.

    Example:
        >>> attrs.fields(Streams).device.name
        'device'
    """

    device: torch.device
    side: Any = attrs.field(default=attrs.Factory(lambda self: torch.cuda.Stream(self.device), takes_self=True))
    pins: bool = attrs.field(default=True, init=False)

    def aside(self) -> AbstractContextManager[Any]:
        """Let what is called within go to the side stream."""
        return torch.cuda.stream(self.side)

    def mark(self) -> Any:
        """An event behind all that the side stream has been given; it has ``synchronize()``."""
        return self.side.record_event()

    def hand_over(self, tensors: list[Tensor], event: Any) -> None:
        """Let the stream of the computation wait for an event, and keep the memory of tensors until it has done with them."""
        here = torch.cuda.current_stream(self.device)
        here.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(here)


@attrs.define(eq=False, repr=False)
class Buffers:
    """Pinned memory for one batch, and the event behind the last copy out of it.

    Args:
        pins: False takes ordinary memory.
        sent: The event behind the last copy; None before the first.
        held: The buffers, by a tensor's place in its batch.

    Example:
        >>> buffers = Buffers(pins=False)
        >>> buffers.staged(0, torch.ones(2)) is buffers.staged(0, torch.zeros(2))
        True
    """

    pins: bool
    sent: Any = None
    held: dict[int, Tensor] = attrs.field(factory=dict)

    def staged(self, place: int, tensor: Tensor) -> Tensor:
        """A tensor of the host in pinned memory; what is pinned already, or lies elsewhere, is taken as it is."""
        if (
            type(tensor) is not Tensor
            or tensor.device.type != "cpu"
            or tensor.layout is not torch.strided
            or (self.pins and tensor.is_pinned())
        ):
            return tensor
        buffer = self.held.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self.held[place] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.pins)
        return buffer.copy_(tensor)


class Lane:
    """Copies batches to one device, through two sets of buffers that alternate.

    Args:
        streams: The streams of the device.

    Example:
        >>> from types import SimpleNamespace
        >>> Lane(SimpleNamespace(pins=False)).send.__name__
        'send'
    """

    __slots__ = ("_streams", "_turns")

    def __init__(self, streams: Any) -> None:
        self._streams = streams
        self._turns = itertools.cycle((Buffers(streams.pins), Buffers(streams.pins)))

    def send(self, batch: Any) -> Any:
        """The batch on the device, where whatever is computed next waits for it, and the host does not."""
        streams, buffers, sent = self._streams, next(self._turns), list[Tensor]()
        if buffers.sent is not None:
            buffers.sent.synchronize()  # the copy of the batch before the last, which has mostly ended long ago

        def copy(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu":
                return tensor.to(streams.device, non_blocking=True)
            with streams.aside():
                sent.append(buffers.staged(len(sent), tensor).to(streams.device, non_blocking=True))
            return sent[-1]

        there = moved(batch, streams.device, copy)  # what moves itself does so on the stream of the computation
        buffers.sent = streams.mark()
        streams.hand_over(sent, buffers.sent)
        return there
