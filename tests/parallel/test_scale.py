"""1,024 ranks and seven billion parameters on paper: what a rank holds, what a checkpoint is made of, and what is read when ranks change."""

import json
import time

import pytest
import torch
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import fnlight as fl
from fnlight.checkpoint import describe_state, parse, parts_of
from fnlight.checkpoint.layout import Layout, overlap
from fnlight.checkpoint.manifest import MAX_BYTES, render
from fnlight.tensors import box_of, local

RANKS = 1024


class Layer(nn.Module):
    """The shapes of a decoder layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
            nn.Linear(inner, width, bias=False),
        )
        self.norm, self.norm_after = nn.RMSNorm(width), nn.RMSNorm(width)


class Decoder(nn.Module):
    """The shapes of a language model of 6.7 billion parameters."""

    def __init__(self, width=4096, inner=11008, layers=32, words=32000):
        super().__init__()
        self.embedding, self.head, self.norm = nn.Embedding(words, width), nn.Linear(width, words, bias=False), nn.RMSNorm(width)
        self.layers = nn.ModuleList(Layer(width, inner) for _ in range(layers))


@pytest.fixture(scope="module")
def state():
    """The state of rank 0 of 1,024, after what could be a step."""
    distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    with torch.device("meta"):
        model = Decoder()
    task = fl.Task(model, lambda model, batch: None, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters()))
    found = fl.TrainState.create(task, place=fl.parallel.fsdp())
    for p in found.store.params:
        slots = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        found.store.optim.optimizer.state[p] = {"step": torch.tensor(1.0), **slots}
    yield found
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def planned(state):
    """The manifest that rank 0 would write, and how long the plan and the manifest took, in seconds."""
    begun = time.perf_counter()
    body, tensors = describe_state(state, together=False)
    parts = parts_of(tensors, rank=0)
    planned = time.perf_counter() - begun
    each = [10**8, "xxh3:" + "0" * 32]
    files = {file: {"parts": [each] * len(parts.writers), **entry} for file, entry in parts.entries.items()}
    data = render({**body, "layouts": [layout.data() for layout in parts.layouts], "files": files})
    return parts, data, planned, time.perf_counter() - begun - planned


def test_a_rank_holds_its_part(state):
    """A 1,024th of weights and slots, but for tensors that do not divide: parameters, gradients and two slots are some hundred megabytes."""
    whole, mine = (sum(f(p) for p in state.store.params) for f in (torch.Tensor.numel, lambda p: local(p).numel()))
    assert whole == 6_738_415_616
    assert whole / RANKS <= mine < 1.02 * whole / RANKS
    print(f"\n{mine:,} parameters a rank; {16 * mine / 2**20:.0f} MiB with gradients and two slots in fp32")


def test_the_manifest_stays_small(planned):
    """It grows with tensors and with ranks, not with their product: less than half a megabyte, and it is read back."""
    parts, data, plan, rendering = planned
    assert len(parts.writers) == RANKS
    assert len(parts.layouts) == 1
    assert len(data) < 1 << 19 < MAX_BYTES
    assert parse(data)["layouts"][0]["files"] == list(range(RANKS))
    print(f"\n{2 * RANKS + 1:,} files; manifest {len(data):,} bytes; plan {1e3 * plan:.0f} ms, manifest {1e3 * rendering:.0f} ms")


@pytest.mark.parametrize("ranks", [512, 768, 1024, 2048])
def test_other_ranks_read_every_byte_once(planned, ranks):
    """However many there are, the parts that they hold are what they read, from the few files that hold them."""
    entry = planned[0].entries["model.safetensors"]
    saved, read, files = Layout(((0, RANKS),), tuple(range(RANKS))), 0, 0
    some = range(0, ranks, max(1, ranks // 64))
    for rank in some:
        touched: set[int] = set()
        for _, shape in entry["tensors"].values():
            wanted = box_of(shape, [(0, ranks, rank)])
            held = 0 if 0 in wanted[1] else torch.Size(wanted[1]).numel()
            common = [(file, overlap(wanted, (offset, size))) for file, offset, size in saved.cells(shape, wanted)] if held else []
            assert sum(torch.Size(box[1]).numel() for _, box in common if box is not None) == held
            touched |= {file for file, box in common if box is not None}
            read += 4 * held
        files = max(files, len(touched))
    assert files <= 16
    print(f"\n{ranks} ranks: {read / len(some) / 2**20:.1f} MiB of weights a rank, from up to {files} files each")


def test_what_json_says_of_a_layout_is_what_it_says_of_all(planned):
    """One layout of 1,024 numbers serves 291 tensors and their slots."""
    parts = planned[0]
    assert len(json.dumps(parts.layouts[0].data())) < 6000
    assert {len(entry["cut"]) for entry in parts.entries.values()} == {291, 582}
