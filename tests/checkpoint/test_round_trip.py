"""Law: ``load(save(state))`` is bitwise the state."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fnlight.checkpoint import load, restore, save, verify
from fnlight.errors import CheckpointError
from fnlight.optim import Optim
from fnlight.state import Task, TrainState
from fnlight.step import update
from tests.checkpoint.tasks import adamw, advance, content, files, forge_bytes, make_task, tokens, trained, unlike
from tests.optim.table import CASES, OF_TORCH

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.complex32,
]  # fmt: skip


def holder(**tensors: torch.Tensor) -> Task:
    """A task whose model holds nothing but buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return Task(module, train_step=lambda model, batch: batch)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, in order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def test_a_state_comes_back_bitwise(tmp_path: Path) -> None:
    """Weights, buffers, slots, groups, memory, counts, seed, history and the reason to stop are what they were."""
    state = attrs.evolve(trained(), stopped="enough")
    path = save(state, tmp_path / "state")
    assert unlike(state, load(path, make_task())) == []
    assert verify(path) == []


def test_saving_leaves_the_state_as_it_is(tmp_path: Path) -> None:
    """A state is readable and unchanged after it was saved."""
    state = trained()
    before = state.copy()
    save(state, tmp_path / "state")
    assert unlike(state, before) == []


def test_a_loaded_state_goes_on_as_the_saved_one_would(tmp_path: Path) -> None:
    """The next steps from the loaded state are bitwise those from the saved one."""
    state = trained()
    other = load(save(state, tmp_path / "state"), make_task())
    for i in range(3):
        state, other = advance(state, tokens(i)), advance(other, tokens(i))
    assert unlike(state, other) == []


def test_a_new_process_reads_the_same(tmp_path: Path) -> None:
    """Another process that loads and saves the state again writes the very same bytes."""
    save(trained(), tmp_path / "a")
    program = (
        "import sys, fnlight.checkpoint as c; from tests.checkpoint.tasks import make_task;"
        "c.save(c.load(sys.argv[1], make_task()), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, tmp_path / "a", tmp_path / "b"], cwd=ROOT, check=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    """Files depend on the state alone, so two that are equal can be compared by their digests."""
    state = trained()
    save(state, tmp_path / "a")
    save(state.copy(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_files_are_those_of_the_format(tmp_path: Path) -> None:
    """A checkpoint is four files, the weights under their own names, slots as NAME/SLOT, trees as KEY/PATH, tied weights once."""
    state = trained()
    path = Path(save(state, tmp_path / "state"))
    assert sorted(p.name for p in path.iterdir()) == ["memory.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    model = load_file(path / "model.safetensors")
    assert set(model) == set(state.module().state_dict()) - {"head.weight"}
    assert torch.equal(model["embed.weight"], state.params["embed.weight"])
    assert {f"{name}/{slot}" for name, slots in state.opt_state.items() for slot in slots} <= set(load_file(path / "optimizer.safetensors"))
    assert set(load_file(path / "memory.safetensors")) == {f"ema/{name}" for name in state.params} | {"buffers/seen"}


def test_a_state_without_memory_has_no_file_for_it(tmp_path: Path) -> None:
    """Only files with something in them are written."""
    path = Path(save(TrainState.create(holder(x=torch.ones(1))), tmp_path / "state"))
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "state.json"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    """Each dtype keeps every bit, NaN payloads included, in shapes [], [0], [2, 0, 3] and [2, 3]."""
    raw = torch.randint(256, (2, 3, dtype.itemsize), dtype=torch.uint8)
    full = raw.view(dtype).reshape(2, 3) if dtype != torch.bool else raw[..., 0] > 127
    tensors = {"full": full, "scalar": full[1, 2].clone(), "empty": full.new_empty(0), "hollow": full.new_empty(2, 0, 3)}
    state = TrainState.create(holder(**tensors))
    blank = holder(**{name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in tensors.items()})
    found = load(save(state, tmp_path / "state"), blank).buffers
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in found.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in tensors.items()
    }


@pytest.mark.parametrize("name", ["transposed", "expanded", "strided", "conjugate", "channels_last", "imaginary"])
def test_every_layout_comes_back_with_its_values(tmp_path: Path, name: str) -> None:
    """Tensors that do not lie in order in memory are written in order, and read into whatever layout the model has."""
    z = torch.complex(torch.randn(2, 3), torch.randn(2, 3))
    tensor = {
        "transposed": torch.randn(3, 2).t(), "expanded": torch.randn(1, 3).expand(4, 3), "strided": torch.randn(8)[::2], "conjugate": z.conj(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "imaginary": z.conj().imag,
    }[name]  # fmt: skip
    state = TrainState.create(holder(x=tensor))
    state.store.memory["x"] = tensor  # as it is: copying a model may have put its tensors in order
    path = save(state, tmp_path / "state")
    assert load(path, holder(x=torch.zeros_like(tensor))).memory["x"].equal(tensor)
    assert load(path, holder(x=torch.zeros_like(tensor))).buffers["x"].equal(tensor)
    assert load(path, holder(x=torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape))).buffers["x"].equal(tensor)


def test_slots_follow_the_strides_of_their_parameter(tmp_path: Path) -> None:
    """Fused kernels take equal strides for granted, so a channels-last parameter gets channels-last slots, and goes on bitwise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    task = Task(net, lambda model, batch: model(batch).square().mean(), configure_optimizers=lambda m: torch.optim.AdamW(m.parameters()))
    x = torch.randn(2, 3, 4, 4)
    state, _ = update(TrainState.create(task), x)
    other = load(save(state, tmp_path / "state"), task)
    assert other.opt_state["0.weight"]["exp_avg"].stride() == other.params["0.weight"].stride() == state.params["0.weight"].stride()
    assert unlike(update(state, x)[0], update(other, x)[0]) == []


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.filterwarnings("ignore")  # old optimizers use deprecated overloads
def test_every_optimizer_goes_on_bitwise(tmp_path: Path, name: str) -> None:
    """Slots of any nesting and values in groups come back, and the next step is the one that the saved state takes."""
    case = CASES[name]
    state = TrainState.create(case.task())
    *batches, after = case.batches(8)  # RAdam and its kin fill their buffers only after some steps
    for batch in batches:
        state, _ = update(state, batch)
    other = load(save(state, tmp_path / "state"), case.task())
    assert unlike(state, other) == []
    assert unlike(update(state, after)[0], update(other, after)[0]) == []


@pytest.mark.parametrize("fused", [False, True])
def test_step_counts_and_flags_of_kernels_come_back(tmp_path: Path, fused: bool) -> None:
    """Fused and plain kernels keep their step counts as they had them."""
    task = make_task(lambda model: adamw(model, fused=fused))
    state = trained(task=task)
    other = load(save(state, tmp_path / "state"), task)
    assert unlike(state, other) == []
    assert other.store.optim.optimizer.param_groups[0]["fused"] is fused


def test_a_tensor_learning_rate_comes_back(tmp_path: Path) -> None:
    """A group value that is a tensor stays one, with its value."""
    task = make_task(lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), fused=False, foreach=False))
    state = trained(task=task)
    state.store.optim.optimizer.param_groups[0]["lr"].fill_(0.25)
    found = load(save(state, tmp_path / "state"), task).store.optim.optimizer.param_groups[0]["lr"]
    assert isinstance(found, torch.Tensor)
    assert found.item() == 0.25


def test_a_schedule_goes_on_where_it_stood(tmp_path: Path) -> None:
    """The learning rate of the last step is in the groups, and the next one follows from the counts."""
    task = make_task(lambda model: Optim(adamw(model), schedule=lambda step: 0.5**step))
    state = trained(steps=3, task=task)
    other = load(save(state, tmp_path / "state"), task)
    assert other.store.optim.optimizer.param_groups[0]["lr"] == 0.05 * 0.25
    assert unlike(advance(state, tokens(0)), advance(other, tokens(0))) == []


def test_names_that_meet_in_a_file_stay_apart(tmp_path: Path) -> None:
    """Two leaves of a tree whose paths read the same keep each its own tensor."""
    state = TrainState.create(holder(x=torch.ones(1)))
    tree = {"a/b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0)}, 1: torch.tensor(3.0), "1": torch.tensor(4.0)}
    state.store.memory["tree"] = tree
    state.store.memory["$tree"] = {"buffers": torch.tensor(5.0)}
    found = load(save(state, tmp_path / "state"), state.task)
    assert unlike(state, found) == []
    assert [found.memory["tree"][key] for key in (1, "1")] == [torch.tensor(3.0), torch.tensor(4.0)]


class Counter(nn.Linear):
    """A module with a state of its own."""

    calls: Any = 0

    def get_extra_state(self) -> Any:
        """What is saved besides tensors."""
        return {"calls": self.calls, "last": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        """What is read besides tensors."""
        self.calls = state["calls"]


def test_extra_states_of_modules_come_back(tmp_path: Path) -> None:
    """What a module gives to torch as its extra state is saved as data, and given back."""
    task = Task(nn.Sequential(Counter(2, 1)), train_step=lambda model, batch: model(batch).sum())
    state = TrainState.create(task)
    state.store.module[0].calls = (3, "three")  # pyright: ignore[reportIndexIssue]
    found: Any = load(save(state, tmp_path / "state"), task).store.module
    assert found[0].calls == (3, "three")


def test_loaded_tensors_do_not_alias_the_file(tmp_path: Path) -> None:
    """Overwriting the bytes of a file that a state was loaded from changes nothing in the state."""
    state = trained()
    path = Path(save(state, tmp_path / "state"))
    other = load(path, make_task())
    for file in path.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)
    assert unlike(state, other) == []


def test_restoring_into_a_trained_state_leaves_nothing_of_it(tmp_path: Path) -> None:
    """`restore` gives the saved state whatever stood in the other one, which stays as it was."""
    state, like = trained(steps=2), trained(steps=5, seed=1)
    before = content(like)
    found = restore(save(state, tmp_path / "state"), like)
    assert unlike(state, found) == []
    assert list(content(like)) == list(before)
    assert unlike(like, trained(steps=5, seed=1)) == []


def test_a_state_before_its_first_step_drops_the_slots_of_a_trained_one(tmp_path: Path) -> None:
    """Slots that the checkpoint does not have are gone after restoring it."""
    fresh = TrainState.create(make_task())
    assert dict(restore(save(fresh, tmp_path / "state"), trained()).opt_state) == {}


def test_an_older_module_name_of_a_script_still_means_the_same_optimizer(tmp_path: Path) -> None:
    """An optimizer class of a script keeps its memory when the script is imported under its own name."""
    state = trained()
    path = save(state, tmp_path / "state")
    forge_bytes(path, lambda text: text.replace("torch.optim.adamw.AdamW", "__main__.AdamW"))
    assert unlike(state, load(path, make_task())) == []


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.eye(2).to_sparse(), r"x is sparse \(torch.sparse_coo\), but a checkpoint holds only dense tensors"),
        (torch.empty(2, device="meta"), "x is on the meta device"),
        (torch.empty(2, dtype=torch.float8_e8m0fnu), "x is torch.float8_e8m0fnu, but the safetensors format supports only float64"),
    ],
)
def test_tensors_that_the_format_lacks_are_refused(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    """A tensor that cannot be written is named, and no file is left."""
    state = TrainState.create(holder(y=torch.ones(1)))
    state.store.memory["x"] = tensor
    with pytest.raises(CheckpointError, match=message):
        save(state, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_history_of_tensors_is_refused(tmp_path: Path) -> None:
    """A record holds numbers, so that rules and tables can read it."""
    state = TrainState.create(holder(x=torch.ones(1))).recorded({"val/loss": torch.ones(2)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match=r"history of step 0/val/loss is a tensor of shape \[2\].*record float"):
        save(state, tmp_path / "state")


def test_memory_that_contains_itself_is_refused(tmp_path: Path) -> None:
    """A tree without an end gives an error, not a crash."""
    state = TrainState.create(holder(x=torch.ones(1)))
    loop: list[Any] = []
    loop.append(loop)
    state.store.memory["loop"] = loop
    with pytest.raises(CheckpointError, match="nested too deeply, or contains itself"):
        save(state, tmp_path / "state")


def test_group_values_that_are_no_data_come_from_the_code(tmp_path: Path) -> None:
    """A function in a group that is as configured is left out, for the code configures it again; a new one is refused."""

    def configure(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(model.parameters()), "shape": F.relu}], lr=0.1)

    task = Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum(), configure_optimizers=configure)
    state = TrainState.create(task)
    assert load(save(state, tmp_path / "state"), task).store.optim.optimizer.param_groups[0]["shape"] is F.relu
    state.store.optim.optimizer.param_groups[0]["shape"] = F.gelu
    with pytest.raises(CheckpointError, match="groups/0/shape has type"):
        save(state, tmp_path / "other")


def test_loading_touches_no_global_generator(tmp_path: Path) -> None:
    """Neither saving nor loading draws a random number, and no warning is given for what is as it was."""
    state = trained()
    before = torch.default_generator.get_state()
    task = state.task
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(save(state, tmp_path / "state"), task)
    assert torch.default_generator.get_state().equal(before)
