"""Loading without a second copy: a placeholder state whose tensors are replaced on load never writes to the shared ones."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnlight.checkpoint import load, open_checkpoint, restore, save, step_path
from fnlight.checkpoint.placeholder import Lent
from fnlight.checkpoint.reader import Opened
from fnlight.errors import CheckpointWarning
from fnlight.state import Task, TrainState
from fnlight.step import update
from tests.checkpoint.tasks import unlike

ROOT = Path(__file__).resolve().parents[2]


def train_step(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean square of the outputs."""
    return model(batch).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer with the largest memory."""
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def make(*layers: nn.Module) -> Task:
    """A task on a stack of layers."""
    return Task(nn.Sequential(*layers), train_step, configure_optimizers=adamw)


def storages(state: TrainState) -> set[int]:
    """Where the tensors of a state lie."""
    store = state.store
    slots = (t for held in store.optim.optimizer.state.values() for t in held.values())
    return {t.untyped_storage().data_ptr() for t in (*store.module.parameters(), *store.module.buffers(), *slots) if t.numel()}


def kib(name: str) -> int:
    """A line of what the system says of this process."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def taken(kind: str, folder: Path) -> int:
    """The KiB by which this process grew at the peak of reading a state."""
    for layer in (nn.Linear(2, 2), nn.Linear(2048, 5120, bias=False)):  # what torch loads when it first does something is not counted
        task, path = make(layer), folder / f"{layer.in_features}"
        state = update(TrainState.create(task), torch.ones(1, layer.in_features))[0]
        save(state, path)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
        before = kib("VmRSS")
        found = load(path, task) if kind == "load" else restore(path, like=state)
        grown = kib("VmHWM") - before
        assert unlike(found, state) == []
    return grown


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak of resident memory, as Linux has it")
@pytest.mark.parametrize("kind", ["load", "restore"])
def test_reading_takes_the_memory_of_one_state(tmp_path: Path, kind: str) -> None:
    """At the peak there is one new state, and no second copy of it or of a part of it: 40 MiB a tensor, of which there are three."""
    code = f"import pathlib; from tests.checkpoint.test_placeholder import taken; print(taken({kind!r}, pathlib.Path({str(tmp_path)!r})))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # a process of its own: what other tests have let go would hide what this one takes
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 120 * 1024 * 0.9 < int(done.stdout) < 120 * 1024 * 1.15


@pytest.mark.parametrize("kind", ["load", "restore"])
def test_what_was_read_is_nobody_elses(tmp_path: Path, kind: str) -> None:
    """No tensor lies in the memory of the task, of the other state or of the file: to write to one is seen nowhere else."""
    task = make(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weights = copy.deepcopy(task.model.state_dict())
    like = update(TrainState.create(task), torch.randn(4, 3))[0]
    state = update(like, torch.randn(4, 3))[0]
    before, path = state.copy(), Path(save(state, tmp_path / "state"))
    found = load(path, task) if kind == "load" else restore(path, like=like)
    assert not storages(found) & (storages(like) | storages(state) | {t.untyped_storage().data_ptr() for t in task.model.parameters()})
    for file in path.glob("*.safetensors"):
        with file.open("r+b") as written:
            written.write(b"\xff" * file.stat().st_size)
    assert unlike(found, before) == []
    update_in_place(found)
    assert unlike(state, before) == []
    assert all(torch.equal(value, weights[name]) for name, value in task.model.state_dict().items())


def update_in_place(state: TrainState) -> None:
    """Write to every tensor."""
    with torch.no_grad():
        for tensor in (*state.store.module.parameters(), *state.store.module.buffers()):
            tensor.fill_(7)
        for slots in state.store.optim.optimizer.state.values():
            for value in slots.values():
                value.fill_(7)


def test_what_the_checkpoint_lacks_is_copied(tmp_path: Path) -> None:
    """Weights that are left as they are, and their optimizer memory, are a copy of the other state's."""
    path = save(update(TrainState.create(make(nn.Linear(3, 3))), torch.ones(2, 3))[0], tmp_path / "state")
    like = update(TrainState.create(make(nn.Linear(3, 3), nn.Linear(3, 2))), torch.ones(2, 3))[0]
    before = like.copy()
    with pytest.warns(CheckpointWarning, match="only the matching weights were loaded"):
        found = restore(path, like=like, allow="model")
    assert torch.equal(found.params["1.weight"], like.params["1.weight"])
    assert not storages(found) & storages(like)
    update_in_place(found)
    assert unlike(like, before) == []


class Amax(nn.Module):
    """A module that writes its extra state into a buffer, as those for low precision do."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("history", torch.zeros(2), persistent=False)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        return x * self.weight

    def get_extra_state(self) -> Any:
        """The buffer, as numbers."""
        return self.history.tolist()

    def set_extra_state(self, state: Any) -> None:
        """In place."""
        self.history.copy_(torch.tensor(state))
        self.weight.data.mul_(1)


def test_code_of_the_user_writes_to_the_copy_only(tmp_path: Path) -> None:
    """A `set_extra_state` that writes in place never reaches the state that was borrowed from."""
    state, like = (TrainState.create(make(Amax())) for _ in range(2))
    state.store.module[0].history.fill_(5.0)
    found = restore(save(state, tmp_path / "state"), like=like)
    assert (found.store.module[0].history.tolist(), like.store.module[0].history.tolist()) == ([5.0, 5.0], [0.0, 0.0])


class Views(nn.Module):
    """Two buffers in one memory."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("whole", torch.zeros(4))
        self.register_buffer("first", self.whole[:2])
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        return x * self.weight


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    """What is a view of another is one afterwards, too; and a weight that is there twice is one object."""
    task = make(Views(), linear := nn.Linear(3, 3), linear)
    state = TrainState.create(task)
    state.store.module[0].whole.copy_(torch.arange(4.0))
    path = save(state, tmp_path / "state")
    for found in (load(path, task), restore(path, like=TrainState.create(task))):
        views, first, second = found.store.module
        assert views.whole.tolist() == [0.0, 1.0, 2.0, 3.0]
        views.whole.fill_(9.0)
        assert views.first.tolist() == [9.0, 9.0]
        assert first.weight is second.weight
        assert unlike(TrainState.create(task), TrainState.create(task)) == []


def test_memory_formats_are_those_of_the_model(tmp_path: Path) -> None:
    """Strides are not in a file: weights and slots get those of the model that is filled."""
    task = make(nn.Conv2d(3, 4, 3), nn.Flatten())
    like = TrainState.create(Task(copy.deepcopy(task.model).to(memory_format=torch.channels_last), train_step, configure_optimizers=adamw))
    state = update(TrainState.create(task), torch.ones(2, 3, 4, 4))[0]
    found = restore(save(state, tmp_path / "state"), like=like)
    weight = found.params["0.weight"]
    assert weight.stride() == like.params["0.weight"].stride() == found.opt_state["0.weight"]["exp_avg"].stride()
    assert unlike(found, state) == []


def test_each_file_is_read_once_and_checked_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were checked are the bytes that are used: a file that changes behind the check changes nothing."""
    state = update(TrainState.create(make(nn.Linear(3, 3))), torch.ones(2, 3))[0]
    path = save(state, tmp_path / "state")
    real = Opened.tensors

    def changed(self: Opened, name: str) -> dict[str, Tensor]:
        (tmp_path / "state" / name).write_bytes(b"")
        return real(self, name)

    monkeypatch.setattr(Opened, "tensors", changed)
    assert unlike(restore(path, like=state), state) == []


def test_a_broken_file_is_found_while_it_is_read_and_the_one_before_is_used(tmp_path: Path) -> None:
    """What was read of a broken checkpoint is let go."""
    states = [TrainState.create(make(nn.Linear(3, 3)))]
    states.append(update(states[0], torch.ones(2, 3))[0])
    for step, state in enumerate(states):
        save(state, step_path(tmp_path, step))
    file = Path(step_path(tmp_path, 1)) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.warns(CheckpointWarning, match=r"optimizer.safetensors is altered"):
        opened = open_checkpoint(tmp_path, hold=True)
    assert opened.path == step_path(tmp_path, 0)
    assert opened.held.keys() == opened.body["files"].keys()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4)[:2], torch.zeros(0), torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), torch.zeros(1).expand(3)],
    ids=["part", "empty", "meta", "sparse", "expanded"],
)
def test_only_what_is_all_of_its_memory_is_lent(tensor: Tensor) -> None:
    """Others are copied, as they always were."""
    memo: dict[int, Any] = {}
    Lent().borrow([tensor], memo)
    assert memo == {}


def test_a_copy_that_nobody_holds_is_forgotten() -> None:
    """What a checkpoint replaced is not copied in the end."""
    lent, memo, tensor = Lent(), dict[int, Any](), torch.zeros(2)
    lent.borrow([tensor], memo)
    borrowed = memo.pop(id(tensor))
    assert lent.put(borrowed, torch.ones(2))
    assert not lent.put(borrowed, torch.ones(2))
    lent.borrow([tensor], memo)
    memo.clear()
    lent.own()
    assert tensor.tolist() == [0.0, 0.0]
