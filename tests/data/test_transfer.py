"""Batches that are copied to a device keep their content, and pinned buffers are written again only after their copy has ended."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fnlight.data.transfer import Buffers, Lane, moved, transferred
from fnlight.tensors import map_tensors


class Recorded:
    """Streams that say what is asked of them; the device is the CPU, and a copy to it is made late, when its event comes."""

    pins = False
    device = torch.device("cpu")

    def __init__(self):
        self.log, self.events = [], 0

    @contextmanager
    def aside(self):
        self.log.append("aside")
        yield
        self.log.append("back")

    def mark(self):
        self.events += 1
        return Event(self.log, self.events)

    def hand_over(self, tensors, event):
        self.log.append(f"wait on the device for {event.number}")


class Event:
    def __init__(self, log, number):
        self.log, self.number = log, number

    def synchronize(self):
        self.log.append(f"wait on the host for {self.number}")


def test_the_host_waits_only_for_the_copy_before_the_last():
    """Two sets of buffers take turns: before one is written again, the copy out of it, two batches ago, must have ended."""
    streams = Recorded()
    lane = Lane(streams)
    for i in range(4):
        lane.send(torch.full((2,), float(i)))
    copied = [["aside", "back", f"wait on the device for {i}"] for i in (1, 2, 3, 4)]
    assert streams.log == [*copied[0], *copied[1], "wait on the host for 1", *copied[2], "wait on the host for 2", *copied[3]]


def test_a_buffer_is_not_written_while_the_batch_before_is_copied():
    """What was sent stays readable while the next batch is staged: neighbours have no memory in common."""
    lane = Lane(Recorded())
    first, second, third = (lane.send({"x": torch.full((2,), float(i)), "y": [torch.full((1,), i)]}) for i in range(3))
    assert first["x"].data_ptr() != second["x"].data_ptr()
    assert second["x"].tolist() == [1.0, 1.0]
    assert first["x"].data_ptr() == third["x"].data_ptr()
    assert third["y"][0].tolist() == [2]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(0, 2), torch.ones(()), torch.ones(2, dtype=torch.bool), torch.arange(6)[::2]],
)
def test_a_staged_tensor_is_equal(tensor):
    """Whatever its shape, strides and type."""
    found = Buffers(pins=False).staged(0, tensor)
    assert torch.equal(found, tensor)
    assert found.dtype is tensor.dtype
    assert found.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_a_buffer_follows_shapes_and_types():
    """The last, shorter batch of an epoch has a buffer of its own size."""
    buffers = Buffers(pins=False)
    for tensor in (torch.ones(4), torch.ones(3), torch.ones(3, dtype=torch.int64)):
        assert torch.equal(buffers.staged(0, tensor), tensor)


def test_what_cannot_be_staged_is_taken_as_it_is():
    """Sparse tensors, tensors of other devices, and tensors of a class of their own."""
    buffers = Buffers(pins=False)
    for tensor in (torch.eye(2).to_sparse(), torch.ones(1, device="meta"), torch.nn.Parameter(torch.ones(1))):
        assert buffers.staged(0, tensor) is tensor


class Own:
    """A batch that moves itself."""

    def to(self, device):
        return ("moved", device.type)


def test_a_batch_keeps_its_types_on_the_way():
    """Containers stay what they are, numbers stay, and what moves itself is asked to."""
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 2]), batch_first=True)
    batch = {"x": torch.ones(2), "more": (torch.ones(1), [torch.ones(1), "text"], None), "own": Own(), "packed": packed}
    (found, samples, last), *rest = list(transferred(iter([(batch, 2, True)]), torch.device("meta")))
    assert (samples, last, rest) == (2, True, [])
    assert found["own"] == ("moved", "meta")
    assert found["more"][1][1] == "text"
    assert found["more"][2] is None
    devices = []
    map_tensors(lambda t: devices.append(t.device.type) or t, {key: found[key] for key in ("x", "more")})
    assert devices == ["meta"] * 3
    assert found["packed"].data.device.type == "meta"


def test_the_batch_that_was_handed_out_is_not_kept():
    """The batch before is let go of by the time the next one is read."""
    kept = []

    def read():
        first = torch.ones(1)
        before = weakref.ref(first)
        yield first, 1, False
        del first
        kept.append(before())
        yield torch.ones(1), 1, True

    assert len(list(transferred(read(), torch.device("meta")))) == 2
    assert kept == [None]


def test_what_moves_itself_goes_on_the_stream_of_the_computation():
    """Memory that the lane cannot see is never taken from the side stream, where it could be given away too early."""
    streams = Recorded()
    streams.device = torch.device("meta")
    assert Lane(streams).send([Own(), torch.ones(1)])[0] == ("moved", "meta")
    assert streams.log == ["aside", "back", "wait on the device for 1"]


def test_moving_to_where_a_tensor_is_gives_the_tensor():
    """Nothing is copied that need not be."""
    tensor = torch.ones(2)
    assert moved([tensor], torch.device("cpu"))[0] is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_batches_arrive_on_a_gpu_as_they_were():
    """With the real streams: many batches, each multiplied on the device at once, are all what they should be."""
    batches = [(torch.full((1000, 100), float(i)), 1, i == 49) for i in range(50)]
    sums = [batch.sum() for batch, _, _ in transferred(iter(batches), torch.device("cuda"))]
    assert [float(s) for s in sums] == [1e5 * i for i in range(50)]
