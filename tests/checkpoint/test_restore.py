"""Restoring into other tasks: tensors are matched by name, configuration in the code wins, and every difference is reported."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fnlight.checkpoint import load, refill, restore, save
from fnlight.errors import CheckpointWarning, MismatchError
from fnlight.optim import Optim
from fnlight.state import Task, TrainState
from fnlight.step import update
from fnlight.tensors import differences
from tests.checkpoint.tasks import Net, adamw, content, make_task, trained, unlike


def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum of the outputs."""
    return model(batch).sum()


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimizer with momentum of all that is trainable."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, "momentum": 0.9, **options})


def mlp(*widths: int, configure: Any = sgd) -> Task:
    """A task on a stack of linear layers."""
    torch.manual_seed(7)
    return Task(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))), train_step, configure_optimizers=configure)


def stepped(task: Task, steps: int = 2, width: int = 2) -> TrainState:
    """A state after some steps."""
    state = TrainState.create(task)
    for i in range(steps):
        state, _ = update(state, torch.full((3, width), float(i + 1)))
    return state


def groups(state: TrainState) -> list[dict[str, Any]]:
    """The groups of the live optimizer."""
    return state.store.optim.optimizer.param_groups


def test_another_model_is_refused_with_every_name(tmp_path: Path) -> None:
    """A checkpoint of another task lists what is missing, unexpected and of another shape, and what to do."""
    path = save(stepped(mlp(2, 3, 1)), tmp_path / "state")
    with pytest.raises(MismatchError, match="from another model") as caught:
        load(path, mlp(2, 4, 1, 1))
    assert [" ".join(line.split()) for line in str(caught.value).splitlines()] == [
        f"the checkpoint is from another model. {path}: 1 loaded, 2 missing, 3 mismatched",
        "name in the file in the model",
        "2.weight - float32 [1, 1]",
        "2.bias - float32 [1]",
        "0.weight float32 [3, 2] float32 [4, 2]",
        "0.bias float32 [3] float32 [4]",
        "1.weight float32 [1, 3] float32 [1, 4]",
        (
            'Create the task with the model that was saved, or load the weights that match with allow=("model",), map names that changed with rename={...}: '
            "arguments of fl.restore(path, like=state, ...) and of fl.FitConfig(resume=True, ...)"
        ),
    ]


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    """Twenty rows say enough; the counts say the rest."""
    path = save(stepped(mlp(*[2] * 20)), tmp_path / "state")
    with pytest.raises(MismatchError, match=r"2 loaded, 36 unexpected\n(.*\n){21}  \.\.\. and 16 more\nCreate"):
        load(path, mlp(2, 2))


def test_a_failed_restore_leaves_the_other_state_as_it_was(tmp_path: Path) -> None:
    """`like` is only looked at."""
    like = stepped(mlp(2, 4, 1))
    before = stepped(mlp(2, 4, 1))
    with pytest.raises(MismatchError, match=r"0.weight"):
        restore(save(stepped(mlp(2, 3, 1)), tmp_path / "state"), like)
    assert unlike(like, before) == []


def test_another_dtype_is_another_model(tmp_path: Path) -> None:
    """Weights are never converted in silence."""
    path = save(TrainState.create(mlp(2, 1)), tmp_path / "state")
    task = Task(nn.Linear(2, 1).double(), train_step, configure_optimizers=sgd)
    with pytest.raises(MismatchError, match="weight"):
        load(path, task)


def test_a_partial_restore_takes_what_fits_and_says_what_did_not(tmp_path: Path) -> None:
    """Fitting weights come with their slots; the others stay as they are, and train on from there."""
    adam = lambda model: torch.optim.Adam(model.parameters(), lr=0.1)
    saved = stepped(mlp(2, 3, 1, configure=adam))
    like = TrainState.create(mlp(2, 3, 2, configure=adam))
    with pytest.warns(
        CheckpointWarning,
        match=r"only the matching weights were loaded\. .*: 2 loaded, 2 mismatched\n(.*\n)*.*1\.bias +float32 \[1\] +float32 \[2\]",
    ):
        found = restore(save(saved, tmp_path / "state"), like, allow=("model",))
    assert (
        list(differences({n: saved.params[n] for n in ("0.weight", "0.bias")}, {n: found.params[n] for n in ("0.weight", "0.bias")})) == []
    )
    assert torch.equal(found.params["1.weight"], like.params["1.weight"])
    assert list(found.opt_state) == ["0.weight", "0.bias"]
    assert found.progress == saved.progress
    assert sorted(update(found, torch.ones(1, 2))[0].opt_state) == sorted(found.params)


def test_a_new_parameter_keeps_the_memory_that_its_optimizer_made(tmp_path: Path) -> None:
    """Adagrad makes its slots at once; those of a parameter that the checkpoint lacks are still there."""
    adagrad = lambda model: torch.optim.Adagrad(model.parameters())
    path = save(stepped(mlp(2, 2, configure=adagrad)), tmp_path / "state")
    with pytest.warns(CheckpointWarning, match="2 loaded, 2 missing"):
        found = restore(path, TrainState.create(mlp(2, 2, 1, configure=adagrad)), allow=("model",))
    assert [found.opt_state[name]["step"].item() for name in found.params] == [2, 2, 0, 0]


def test_names_count_and_not_the_order(tmp_path: Path) -> None:
    """Weights, slots and groups go to the parameters of their names, in whatever order the code holds them."""

    class Turned(nn.Module):
        def __init__(self, *names: str) -> None:
            nn.Module.__init__(self)
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name)))))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The product of all."""
            return x * sum(p * i for i, (_, p) in enumerate(sorted(self.named_parameters()), start=1))

    def configure(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        order = [[named["a"]], [p for name, p in named.items() if name != "a"]]
        return torch.optim.Adam([{"params": part} for part in (order if next(iter(named)) > "b" else order[::-1])], lr=0.1)

    saved = stepped(Task(Turned("c", "a", "b"), train_step, configure_optimizers=configure))
    groups(saved)[0]["lr"], groups(saved)[1]["lr"] = 0.5, 0.25
    found = load(save(saved, tmp_path / "state"), Task(Turned("b", "a", "c"), train_step, configure_optimizers=configure))
    assert {n: p.tolist() for n, p in found.params.items()} == {n: p.tolist() for n, p in saved.params.items()}
    assert list(differences(content(saved)["slots"], {name: content(found)["slots"][name] for name in saved.opt_state})) == []
    lr = [{len(group["params"]): group["lr"] for group in groups(state)} for state in (saved, found)]
    assert lr[0] == lr[1] == {1: 0.5, 2: 0.25}


@pytest.mark.parametrize("reader", [load, lambda path, task: restore(path, stepped(task, steps=3))], ids=["load", "restore"])
def test_a_value_changed_in_the_code_wins_and_is_reported(tmp_path: Path, reader: Callable[..., TrainState]) -> None:
    """A checkpoint never overwrites the configuration; what it has learnt about unchanged values, it keeps."""
    saved = stepped(mlp(2, 1))
    groups(saved)[0].update(lr=0.025, momentum=0.8)
    path = save(saved, tmp_path / "state")
    with pytest.warns(CheckpointWarning, match=r"loaded with differences:\n  lr: 0\.1 in the checkpoint, 0\.05 now; 0\.05 is used$"):
        found = reader(path, mlp(2, 1, configure=lambda model: sgd(model, lr=0.05)))
    assert [groups(found)[0][key] for key in ("lr", "initial_lr", "momentum")] == [0.05, 0.05, 0.8]
    assert unlike(saved, load(path, mlp(2, 1))) == []


def test_the_code_wins_over_the_state_that_is_filled_as_well(tmp_path: Path) -> None:
    """A value that the code configures otherwise than the checkpoint is what the code configures, not what a schedule made of it since."""
    path = save(stepped(mlp(2, 1)), tmp_path / "state")
    like = stepped(mlp(2, 1, configure=lambda model: sgd(model, lr=0.05)))
    groups(like)[0]["lr"] = 0.001
    with pytest.warns(CheckpointWarning, match=r"lr: 0\.1 in the checkpoint, 0\.05 now"):
        assert groups(restore(path, like))[0]["lr"] == 0.05


def test_several_changed_values_are_all_named(tmp_path: Path) -> None:
    """Each changed value has its line, whatever its type; equal lines of several groups are one."""
    path = save(trained(), tmp_path / "state")
    changed = lambda model: adamw(model, betas=(0.8, 0.9), lr=torch.tensor(0.5), fused=False, foreach=False)
    with pytest.warns(CheckpointWarning, match="with differences") as caught:
        found = load(path, make_task(changed))
    assert str(caught[0].message).splitlines()[1:] == [
        "  lr: 0.05 in the checkpoint, 0.5 now; 0.5 is used",
        "  betas: (0.9, 0.999) in the checkpoint, (0.8, 0.9) now; (0.8, 0.9) is used",
    ]
    assert groups(found)[1]["betas"] == (0.8, 0.9)
    assert groups(found)[0]["lr"].item() == 0.5


def test_other_kernels_are_no_change_worth_a_warning(tmp_path: Path) -> None:
    """Whether a kernel is fused is the machine's business: the code decides, and the numbers go on."""
    saved = trained()
    found = load(save(saved, tmp_path / "state"), make_task(lambda model: adamw(model, fused=False, foreach=True)))
    assert [group["foreach"] for group in groups(found)] == [True, True]
    assert list(differences(content(saved)["slots"], content(found)["slots"])) == []


@pytest.mark.parametrize(
    "configure, now",
    [(sgd, "torch.optim.sgd.SGD"), (lambda model: torch.optim.Adam(p for p in model.parameters() if p.requires_grad), "Adam")],
)
def test_another_optimizer_starts_afresh_and_is_reported(tmp_path: Path, configure: Callable[[Any], Any], now: str) -> None:
    """Memory of another class means nothing, so it is not taken; weights, history and counts are."""
    saved = trained()
    with pytest.warns(
        CheckpointWarning, match=rf"optimizer changed: torch\.optim\.adamw\.AdamW in the checkpoint, .*{now} now; its state starts empty"
    ):
        found = restore(save(saved, tmp_path / "state"), TrainState.create(make_task(configure)), allow=("optimizer",))
    assert dict(found.opt_state) == {}
    assert groups(found)[0]["lr"] != 0.05
    kept = ("params", "buffers", "memory", "progress", "rest")
    assert list(differences({k: content(saved)[k] for k in kept}, {k: content(found)[k] for k in kept})) == []


def test_optimizers_of_one_name_from_two_packages_differ(tmp_path: Path) -> None:
    """RAdam of torch and that of torch_optimizer keep other slots."""
    import torch_optimizer

    path = save(stepped(mlp(2, 1, configure=lambda model: torch.optim.RAdam(model.parameters()))), tmp_path / "state")
    with pytest.raises(
        MismatchError,
        match=r"optimizer changed: .* torch\.optim\.radam\.RAdam, .* now has torch_optimizer\.radam\.RAdam, .*allow=\(.optimizer",
    ):
        load(path, mlp(2, 1, configure=lambda model: torch_optimizer.RAdam(model.parameters())))


def test_a_task_without_an_optimizer_reads_the_weights(tmp_path: Path) -> None:
    """Whoever only predicts needs no optimizer, and is told that one is left out; the other way round as well."""
    path = save(trained(), tmp_path / "state")
    with pytest.warns(CheckpointWarning, match="AdamW in the checkpoint, none now"):
        bare = load(path, make_task(configure=None))
    with pytest.warns(CheckpointWarning, match=r"none in the checkpoint, .*AdamW now"):
        assert dict(load(save(bare, path), make_task()).opt_state) == {}


def test_a_changed_schedule_is_the_codes_business(tmp_path: Path) -> None:
    """A schedule lives in the code: another one takes over at the saved count."""
    path = save(stepped(mlp(2, 1)), tmp_path / "state")
    found = load(path, mlp(2, 1, configure=lambda model: Optim(sgd(model), schedule=lambda step: 0.5**step)))
    assert groups(update(found, torch.ones(1, 2))[0])[0]["lr"] == 0.1 * 0.5**2


def test_groups_that_were_joined_take_their_values_from_the_code(tmp_path: Path) -> None:
    """Two groups that are one now have no values in common, which is said; slots still go by name."""
    saved = trained()
    one = lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with pytest.warns(
        CheckpointWarning, match="a parameter group has parameters from 2 groups of the checkpoint; its values are those of the code"
    ):
        found = load(save(saved, tmp_path / "state"), make_task(one))
    assert list(differences(content(saved)["slots"], content(found)["slots"])) == []


def test_groups_that_were_split_take_their_values_from_the_one(tmp_path: Path) -> None:
    """Each part of a group goes on with its values."""
    saved = stepped(mlp(2, 1))
    groups(saved)[0]["momentum"] = 0.5
    split = lambda model: torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)
    found = load(save(saved, tmp_path / "state"), mlp(2, 1, configure=split))
    assert [group["momentum"] for group in groups(found)] == [0.5, 0.5]


def test_freezing_a_part_drops_its_memory_and_says_so(tmp_path: Path) -> None:
    """A parameter that no optimizer holds now loses its slots; one that none held then starts afresh."""
    task = mlp(2, 2, 1)
    saved = stepped(task)
    task.model[0].requires_grad_(requires_grad=False)  # pyright: ignore[reportIndexIssue]
    with pytest.warns(CheckpointWarning, match=r"the optimizer no longer has these parameters; their state is dropped: 0.weight, 0.bias"):
        frozen = load(save(saved, tmp_path / "state"), task)
    assert sorted(frozen.opt_state) == ["1.bias", "1.weight"]
    with pytest.warns(CheckpointWarning, match=r"the checkpoint has no optimizer state for these; it starts empty: 0.bias, 0.weight"):
        assert sorted(load(save(frozen, tmp_path / "state"), mlp(2, 2, 1)).opt_state) == ["1.bias", "1.weight"]


def test_a_part_that_is_trained_anew_keeps_the_memory_that_its_optimizer_made(tmp_path: Path) -> None:
    """Adagrad makes its slots at once; those of a parameter that was frozen when it was saved are still there."""
    adagrad = lambda model: torch.optim.Adagrad(p for p in model.parameters() if p.requires_grad)
    task = mlp(2, 2, 1, configure=adagrad)
    task.model[0].requires_grad_(requires_grad=False)  # pyright: ignore[reportIndexIssue]
    path = save(stepped(task), tmp_path / "state")
    with pytest.warns(CheckpointWarning, match="has no optimizer state for these; it starts empty"):
        found = load(path, mlp(2, 2, 1, configure=adagrad))
    assert [found.opt_state[name]["step"].item() for name in found.params] == [0, 0, 2, 2]


def test_buffers_outside_the_state_dict_may_change_with_the_model(tmp_path: Path) -> None:
    """What the model computes for itself does not make it another model; what differs is left as it makes it, and said."""
    path = save(trained(), tmp_path / "state")
    module = Net()
    module.register_buffer("seen", torch.zeros(3), persistent=False)
    with pytest.warns(
        CheckpointWarning, match="non-persistent buffers whose shape differs were not loaded; they have the model's values: seen"
    ):
        assert load(path, make_task(module=module)).buffers["seen"].tolist() == [0.0, 0.0, 0.0]


def test_the_device_may_be_chosen(tmp_path: Path) -> None:
    """All tensors go where the state lives, those of combinators too; the place of a loader stays with the loader, on the CPU."""
    state = TrainState.create(mlp(2, 1, configure=None).__class__(nn.Linear(2, 1).requires_grad_(requires_grad=False), train_step))
    state.store.memory |= {"ema": {"weight": torch.ones(2)}, "loader": {"generator": torch.ones(2)}}
    path = save(state, tmp_path / "state")
    found = load(path, state.task, device="meta")
    devices = [found.params["weight"], found.memory["ema"]["weight"], found.memory["loader"]["generator"]]
    assert [t.device.type for t in devices] == ["meta", "meta", "cpu"]


@pytest.mark.parametrize("wrong", [None, make_task()])
def test_restore_asks_for_a_state(wrong: Any, tmp_path: Path) -> None:
    """A task given to `restore` is pointed to `load`."""
    with pytest.raises(TypeError, match=r"must be a TrainState, but got \w+; for a Task use fl.load"):
        restore(tmp_path, wrong)


class Late(nn.Module):
    """Buffers in and outside of the state_dict that are None or empty until the first forward, and one that grows."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", None)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("bank", torch.zeros(0, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A layer on centred inputs."""
        if self.mean is None:
            self.mean, self.table = x.mean(0), x.amax(0)
        self.bank = torch.cat([self.bank, x.detach()])
        return self.layer(x - self.mean) * self.table + self.bank.mean()


def test_buffers_that_the_first_forward_fills_are_restored(tmp_path: Path) -> None:
    """A new model, in which they are None or empty, gets them as they were saved, and its next step is bitwise that of the first."""
    state = stepped(Task(Late(), train_step, configure_optimizers=sgd))
    path = save(state, tmp_path / "state")
    for found in (load(path, state.task), restore(path, like=TrainState.create(state.task))):
        assert not list(differences(content(found), content(state)))
        assert not list(differences(content(update(found, torch.ones(3, 2))[0]), content(update(state, torch.ones(3, 2))[0])))


def test_a_run_that_goes_back_gets_the_shapes_of_then(tmp_path: Path) -> None:
    """Buffers that have grown since are as short as they were, and those that were None are None again."""
    first = TrainState.create(Task(Late(), train_step, configure_optimizers=sgd))
    path = save(first, tmp_path / "first")
    state = refill(path, update(first, torch.ones(3, 2))[0])
    assert not list(differences(content(state), content(first)))
    assert (state.store.module.mean, state.store.module.table) == (None, None)


def test_a_buffer_that_is_not_empty_has_the_shape_of_the_model(tmp_path: Path) -> None:
    """Another shape is another model, as for parameters."""
    wide, narrow = Late(), Late()
    wide.bank, narrow.bank = torch.zeros(3, 2), torch.zeros(1, 2)
    path = save(TrainState.create(Task(wide, train_step, configure_optimizers=sgd)), tmp_path / "state")
    with pytest.raises(MismatchError, match=r"bank +float32 \[3, 2\] +float32 \[1, 2\]"):
        load(path, Task(narrow, train_step, configure_optimizers=sgd))
