"""Laws of `fnlight.optim`: what may be returned, what is chosen by itself, and memory by name."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fnlight.errors import MonitorError, OptimizerError, OptimizerWarning
from fnlight.gradients import grad
from fnlight.optim import OTHER, Optim, monitored, named_groups, named_state, place_slot, prepare, set_lr, to_device
from fnlight.optim.spec import copy_optimizer
from fnlight.pipe import pipe
from fnlight.schedules import exponential, from_torch, plateau
from fnlight.state import History, Record, Task, TrainState
from fnlight.step import apply
from fnlight.tensors import tree

FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]


def net() -> nn.Module:
    """A model with two layers."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def train_step(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean of the squared outputs; the real part where they are complex."""
    return model(batch).abs().pow(2).mean()


def at(step: int = 0, epoch: int = 0) -> Any:
    """Progress, as far as schedules look at it."""
    return SimpleNamespace(step=step, epoch=epoch)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    """The plainest optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def lrs(optim: Optim) -> list[Any]:
    """The learning rate of each group."""
    return [group["lr"] for group in optim.optimizer.param_groups]


def train(model: nn.Module, configure: Callable[[nn.Module], Any], batch: Tensor, steps: int = 2) -> TrainState:
    """A state after some steps."""
    state = TrainState.create(Task(model, train_step, configure_optimizers=configure))
    step = pipe(train_step, grad(), apply())
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_form_is_chosen_where_the_user_did_not_choose(kind: Any) -> None:
    """An optimizer with a fused form uses it, exactly as if it had been made with fused=True."""
    model = net()
    made = prepare(kind(model.parameters(), lr=0.1), model).optimizer
    asked = kind(model.parameters(), lr=0.1, fused=True)
    assert [g["fused"] for g in made.param_groups] == [True]
    assert {**made.param_groups[0], "initial_lr": None} == {**asked.param_groups[0], "initial_lr": None}
    assert made.defaults == asked.defaults
    assert made._step_supports_amp_scaling


@pytest.mark.parametrize("chosen", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"differentiable": True}])
@pytest.mark.parametrize("kind", FUSED)
def test_what_the_user_chose_stays(kind: Any, chosen: dict[str, Any]) -> None:
    """Where the user chose an implementation, nothing is changed."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.1, **chosen)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    made = prepare(optimizer, model).optimizer
    assert {k: v for k, v in made.param_groups[0].items() if k not in ("params", "initial_lr")} == before


def test_a_choice_for_one_group_leaves_all_groups_alone() -> None:
    """The fused form is chosen for all groups or for none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "foreach": True}, {"params": model[1].parameters()}]
    made = prepare(torch.optim.Adam(groups, lr=0.1), model).optimizer
    assert [g["fused"] for g in made.param_groups] == [None, None]


def test_an_optimizer_of_the_user_is_left_alone() -> None:
    """A class derived from one of torch's keeps its own implementation: only classes known to be sound are changed."""

    class Mine(torch.optim.SGD):
        pass

    model = net()
    assert prepare(Mine(model.parameters(), lr=0.1), model).optimizer.param_groups[0]["fused"] is None


def test_complex_parameters_train() -> None:
    """Fused kernels refuse complex parameters, so they are not chosen there."""
    model = nn.Linear(3, 2, dtype=torch.complex64)
    state = train(model, lambda m: torch.optim.Adam(m.parameters(), lr=0.1), torch.ones(2, 3, dtype=torch.complex64))
    assert state.live.optim.optimizer.param_groups[0]["fused"] is None
    assert not tree.equal(dict(state.params), dict(model.named_parameters()))


class Bag(nn.Module):
    """A bag of words with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Embed, then apply the head."""
        return self.head(self.embed(x))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # torch's Adagrad, once a process
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_train(kind: Any) -> None:
    """Fused kernels refuse sparse gradients, so they are not chosen for a model with sparse embeddings."""
    state = train(Bag(), lambda m: kind(m.parameters(), lr=0.1), torch.tensor([0, 2, 2]))
    assert state.live.optim.optimizer.param_groups[0]["fused"] is None
    assert bool((state.params["embed.weight"] - TrainState.create(state.task).params["embed.weight"]).any())


@pytest.mark.parametrize("kind", FUSED)
def test_frozen_parameters_stay_bitwise(kind: Any) -> None:
    """An optimizer that holds frozen parameters trains the others and leaves these as they were."""
    model = net()
    model[0].weight.requires_grad_(False)
    state = train(model, lambda m: kind(m.parameters(), lr=0.1), torch.ones(2, 3))
    assert torch.equal(state.params["0.weight"], model[0].weight)
    assert not torch.equal(state.params["0.bias"], model[0].bias)
    assert "0.weight" not in state.opt_state or kind is torch.optim.Adagrad  # which fills its memory when it is made


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_train_fused(dtype: torch.dtype) -> None:
    """The fused form serves double and half precision too."""
    state = train(net().to(dtype), lambda m: torch.optim.AdamW(m.parameters(), lr=0.1), torch.ones(2, 3, dtype=dtype))
    assert state.live.optim.optimizer.param_groups[0]["fused"] is True
    assert all(torch.isfinite(p).all() for p in state.params.values())


def test_nothing_trainable_needs_no_optimizer() -> None:
    """None is a sound answer where nothing requires a gradient, and a schedule without an optimizer is dropped."""
    frozen = net().requires_grad_(False)
    assert prepare(None, frozen).optimizer is None
    made = prepare(Optim(None, exponential(0.5)), frozen)
    assert (made.optimizer, made.schedule) == (None, None)
    assert (named_state(made, frozen), named_groups(made, frozen)) == ({}, [])


def test_parameters_of_another_model_are_refused() -> None:
    """An optimizer over the model outside, not the one that was given, is the classic slip, and is named."""
    outside = net()
    task = Task(net(), train_step, configure_optimizers=lambda model: sgd(outside))
    message = r"must use the parameters of the model it is given, but SGD holds 4 of another one \(shapes \[\[4, 3\], .*of the argument"
    with pytest.raises(OptimizerError, match=message):
        TrainState.create(task)


def test_trainable_parameters_that_no_optimizer_holds_are_named() -> None:
    """A forgotten parameter is warned of by name, with both ways out."""
    task = Task(net(), train_step, configure_optimizers=lambda model: sgd(model[0]))
    with pytest.warns(OptimizerWarning, match=r"SGD holds no 1.weight, 1.bias, which require gradients .* or freeze them"):
        TrainState.create(task)


def test_many_forgotten_parameters_are_counted() -> None:
    """A long list of names is cut short, and says by how much."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    with pytest.warns(OptimizerWarning, match=r"holds no 0.bias, 1.weight, .*, 4.weight and 2 more, which require"):
        prepare(torch.optim.SGD([model[0].weight, model[5].bias], lr=0.1), model)


GARBAGE: list[tuple[Any, str]] = [
    (None, r"must return an optimizer or Optim, but returned None; trainable: 0.weight, 0.bias, 1.weight, 1.bias"),
    ({"optimizer": 1, "lr_scheduler": 2}, r"or fl.Optim\(optimizer, schedule\), but returned a dict of \['lr_scheduler', 'optimizer'\]"),
    (([1], [2]), r"must return a torch.optim.Optimizer .* but returned a tuple of list, list"),
    (torch.optim.SGD, r"but returned the class SGD; call it, as in SGD\(model.parameters\(\), ...\)"),
    ("adam", r"must return a torch.optim.Optimizer .* but returned str: 'adam'"),
]


@pytest.mark.parametrize("returned, message", GARBAGE)
def test_what_is_no_optimizer_is_refused(returned: Any, message: str) -> None:
    """Whatever configure_optimizers returns instead of an optimizer is described."""
    with pytest.raises(OptimizerError, match=message):
        TrainState.create(Task(net(), train_step, configure_optimizers=lambda model: returned))


def test_configuring_must_not_train() -> None:
    """An optimizer that steps while it is configured is refused, and what it changed is named."""

    def configure(model: nn.Module) -> Any:
        optimizer = sgd(model)
        train_step(model, torch.ones(2, 3)).backward()
        optimizer.step()
        return optimizer

    with pytest.raises(OptimizerError, match=r"must only build an optimizer, but it changed \['0.weight', .*; do not step"):
        TrainState.create(Task(net(), train_step, configure_optimizers=configure))


def test_a_torch_scheduler_as_the_schedule_is_refused() -> None:
    """A scheduler object counts for itself; the error writes the line that is wanted."""
    optimizer = sgd(net())
    for scheduler in (lr_scheduler.StepLR(optimizer, 3), lr_scheduler.ReduceLROnPlateau(optimizer)):
        name = type(scheduler).__name__
        with pytest.raises(OptimizerError, match=rf"got a torch scheduler, {name}, .* fl.from_torch\(lambda optimizer: {name}\(optimizer"):
            Optim(optimizer, scheduler)


def test_an_optimizer_with_a_torch_scheduler_on_it_is_refused() -> None:
    """A scheduler that was made and then forgotten would never step, so it is not silently ignored."""

    def configure(model: nn.Module) -> Any:
        optimizer = sgd(model)
        lr_scheduler.StepLR(optimizer, 3)
        return optimizer

    with pytest.raises(OptimizerError, match=r"a torch scheduler was made on this SGD, and nobody would step it; .*fl.from_torch"):
        TrainState.create(Task(net(), train_step, configure_optimizers=configure))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"schedule": 0.5}, OptimizerError, r"schedule must map completed steps to a factor, but got 0.5"),
    ({"schedule": plateau()}, OptimizerError, r'plateau\(.*\) watches a metric: say which, as Optim\(..., monitor="val/loss"\)'),
    ({"schedule": from_torch(lr_scheduler.ReduceLROnPlateau)}, OptimizerError, r"from_torch\(ReduceLROnPlateau, monitored=True\) watches"),
    ({"monitor": "val/loss"}, OptimizerError, r"monitor='val/loss' is for plateau schedules, but the schedule is None; leave it out"),
    ({"schedule": exponential(0.5), "monitor": "a"}, OptimizerError, r"but the schedule is exponential\(0.5\); leave it out"),
    ({"interval": "batch"}, ValueError, r"'interval' must be in \('step', 'epoch', 'samples'\) \(got 'batch'\)"),
]


@pytest.mark.parametrize("options, kind, message", REFUSED)
def test_an_optim_that_contradicts_itself_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """What does not fit together is refused where it is written."""
    with pytest.raises(kind, match=message):
        Optim(sgd(net()), **options)


def test_a_schedule_needs_a_learning_rate() -> None:
    """An optimizer with lr=None cannot be scheduled, and the error says so whatever the schedule is."""
    model = net()
    for schedule in (exponential(0.5), from_torch(lambda o: lr_scheduler.StepLR(o, 3))):
        optimizer = sgd(model)
        optimizer.param_groups[0]["lr"] = None
        with pytest.raises(OptimizerError, match=r"multiplies a learning rate, but SGD has lr=None; give it one"):
            prepare(Optim(optimizer, schedule), model)


def test_a_schedule_multiplies_the_learning_rate_of_each_group() -> None:
    """The factor at the completed steps multiplies each group's own base, not what stood there last."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.4}, {"params": model[1].parameters()}]
    optim = prepare(Optim(torch.optim.SGD(groups, lr=0.1), exponential(0.5)), model)
    for step in (0, 3, 1):
        set_lr(optim, at(step), ())
        assert lrs(optim) == [0.4 * 0.5**step, 0.1 * 0.5**step]


def test_a_schedule_of_epochs_counts_epochs() -> None:
    """With interval="epoch" a schedule maps completed epochs."""
    model = net()
    optim = prepare(Optim(sgd(model), exponential(0.5), interval="epoch"), model)
    set_lr(optim, at(step=100, epoch=2), ())
    assert lrs(optim) == [0.1 * 0.25]


def test_a_tensor_learning_rate_keeps_its_place() -> None:
    """Captured and compiled steps hold on to the tensor, so it is filled and never replaced."""
    model = net()
    optim = prepare(Optim(torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5)), exponential(0.5)), model)
    held = lrs(optim)[0]
    set_lr(optim, at(1), ())
    assert lrs(optim)[0] is held
    assert held.item() == 0.25
    assert optim.configured[0]["lr"].item() == 0.5


def test_a_plateau_follows_the_history() -> None:
    """The factor is that of the monitored values, whatever other records there are."""
    model, history = net(), History()
    optim = prepare(Optim(sgd(model), plateau(factor=0.5, patience=0), monitor="val/loss"), model)
    seen = []
    for step, metrics in enumerate(
        [{"val/loss": 1.0}, {"train/loss": 9.0}, {"val/loss": 1.0}, {"val/loss": 0.5}, {"val/loss": 0.5}], start=1
    ):
        history = history.add(Record(step, 0, metrics))
        set_lr(optim, at(step), history)
        seen.append(lrs(optim)[0])
    assert seen == [0.1, 0.1, 0.05, 0.05, 0.025]
    set_lr(optim, at(0), History())
    assert lrs(optim) == [0.1]


def test_a_torch_plateau_follows_the_history() -> None:
    """ReduceLROnPlateau through from_torch does what the pure plateau does."""
    model, history = net(), History()
    made = from_torch(lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0))
    optim = prepare(Optim(sgd(model), made, monitor="val/loss"), model)
    for step in range(1, 4):
        history = history.add(Record(step, 0, {"val/loss": 1.0}))
    set_lr(optim, at(3), history)
    assert lrs(optim) == [0.025]


def test_a_torch_scheduler_may_change_more_than_the_learning_rate() -> None:
    """One-cycle through from_torch cycles the momentum of the real optimizer as well."""
    model = net()
    optim = prepare(Optim(sgd(model, momentum=0.9), from_torch(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10))), model)
    set_lr(optim, at(2), ())
    assert optim.optimizer.param_groups[0]["momentum"] == pytest.approx(0.85)
    assert lrs(optim) == pytest.approx([0.5])


def test_training_with_a_torch_scheduler_equals_the_plain_loop_bitwise() -> None:
    """A pipe with from_torch ends with the weights of a loop that steps the scheduler itself."""
    torch.manual_seed(3)
    model, x = net(), torch.ones(2, 3)
    state = train(
        model, lambda m: Optim(sgd(m, momentum=0.9), from_torch(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=6))), x, steps=6
    )
    optimizer = sgd(model, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=6)
    for i in range(6):
        optimizer.zero_grad()
        train_step(model, x).backward()
        optimizer.step()
        if i < 5:
            scheduler.step()
    assert list(tree.differences(dict(state.params), dict(model.named_parameters()))) == []


def test_a_monitor_that_nothing_yields_is_named_with_what_there_is() -> None:
    """Once records of the kind exist, a monitored name that none of them holds is an error."""
    history = (Record(1, 0, {"val/acc": 0.5, "val/nll": 1.0}),)
    with pytest.raises(MonitorError, match=r"'val/loss' is monitored, but no evaluation yields it; there are \['val/acc', 'val/nll'\]"):
        monitored(history, "val/loss")
    assert monitored((Record(1, 0, {"train/loss": 0.5}),), "val/loss") == []


def test_memory_is_listed_by_qualified_name() -> None:
    """Each parameter's slots stand under its name, and what belongs to no parameter under a name of its own."""
    model = net()
    optim = prepare(torch.optim.Adam(model.parameters()), model)
    model(torch.ones(1, 3)).sum().backward()
    optim.optimizer.step()
    optim.optimizer.state["calls"] = 3
    found = named_state(optim, model)
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias", OTHER}
    assert found["1.bias"]["exp_avg"] is optim.optimizer.state[model[1].bias]["exp_avg"]
    assert found[OTHER] == {"calls": 3}


def test_groups_are_listed_with_names() -> None:
    """A group holds names in the place of parameters, tied weights once."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    optim = prepare(sgd(model), model)
    assert [group["params"] for group in named_groups(optim, model)] == [["0.weight", "0.bias", "1.bias"]]
    assert named_groups(optim, model)[0]["lr"] == 0.1


def test_a_copy_of_an_optimizer_follows_the_copied_parameters() -> None:
    """Every attribute is copied, slots are bound to the copied parameters, and the original is untouched."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = train_step(model, torch.ones(2, 3))
        loss.backward()
        return loss

    optimizer.step(closure)
    memo: dict[int, Any] = {}
    twin_model = copy.deepcopy(model, memo)
    twin = copy_optimizer(optimizer, memo)
    assert vars(twin).keys() == vars(optimizer).keys()
    assert [id(p) for p in twin._params] == [id(p) for p in twin_model.parameters()]
    assert list(twin.state) == [twin_model[0].weight]
    kept = copy.deepcopy(optimizer.state_dict())
    twin.param_groups[0]["lr"] = 7.0
    twin.state[twin_model[0].weight]["d"].zero_()
    assert tree.equal(optimizer.state_dict(), kept)


def test_a_copy_leaves_the_patch_of_a_scheduler_behind() -> None:
    """A torch scheduler binds ``step`` to the original; the copy steps its own parameters."""
    model = net()
    optimizer = sgd(model)
    lr_scheduler.StepLR(optimizer, 3)
    memo: dict[int, Any] = {}
    twin_model = copy.deepcopy(model, memo)
    twin = copy_optimizer(optimizer, memo)
    before = model[0].weight.detach().clone()
    twin_model(torch.ones(1, 3)).sum().backward()
    twin.step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(twin_model[0].weight, before)


def test_what_was_configured_is_kept_apart() -> None:
    """What the code configured stays as it was while the groups change."""
    model = net()
    optim = prepare(Optim(sgd(model), exponential(0.5)), model)
    set_lr(optim, at(5), ())
    assert optim.configured[0]["lr"] == 0.1
    assert "params" not in optim.configured[0]
    assert copy.deepcopy(optim).configured is optim.configured


def test_slots_are_placed_where_the_kernel_wants_them() -> None:
    """A step count stays on the CPU unless the kernel is fused or captured; everything else goes to its parameter."""
    param, scalar, moment = torch.zeros(2, device="meta"), torch.tensor(3.0), torch.ones(2)
    assert place_slot("step", scalar, param, {}).device.type == "cpu"
    assert place_slot("step", scalar, param, {"fused": True}).device.type == "meta"
    assert place_slot("step", scalar, param, {"capturable": True}).device.type == "meta"
    assert place_slot("exp_avg", moment, param, {}).device.type == "meta"
    assert place_slot("phase", "SGD", param, {}) == "SGD"


def test_memory_moves_with_its_parameters() -> None:
    """Once parameters are elsewhere, the memory of their optimizer follows in place, and step counts stay."""
    param = nn.Parameter(torch.zeros(2, device="meta"))
    slots = {"exp_avg": torch.ones(2), "step": torch.tensor(1.0), "phase": "Adam"}
    made = SimpleNamespace(param_groups=[{"params": [param, nn.Parameter(torch.zeros(1))]}], state={param: slots})
    to_device(SimpleNamespace(optimizer=made, offload=False))
    assert (slots["exp_avg"].device.type, slots["step"].device.type, slots["phase"]) == ("meta", "cpu", "Adam")
    assert to_device(Optim(None)) is None


def test_a_gradient_that_comes_late_does_not_break_momentum():
    """SGD with momentum is left unfused, since torch's fused kernel cannot take a parameter that joins later."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    module = nn.Module()
    module.first, module.second = first, second
    optim = prepare(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), module)
    assert optim.optimizer.param_groups[0]["fused"] is None
    for grads in ((torch.ones(2), None), (torch.ones(2), torch.ones(2))):
        first.grad, second.grad = grads
        optim.optimizer.step()
    assert second.tolist() == pytest.approx([0.9, 0.9])
