"""Laws of `fnlight.state`: values that stay what they were, and a store that is never read too late."""

import copy
import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from fnlight.checkpoint import load, save
from fnlight.errors import DonatedStateError, OptimizerError
from fnlight.gradients import grad
from fnlight.metrics import Tally
from fnlight.optim import Optim
from fnlight.pipe import pipe
from fnlight.schedules import from_torch
from fnlight.state import Progress, Record, Store, Task, TrainState
from fnlight.step import apply, ema, update
from fnlight.tensors import tree


class Net(nn.Module):
    """A model with tied weights, a buffer, one that is not saved, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm, self.frozen = nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed, normalise, and score."""
        return self.head(self.norm(self.frozen(self.embed(x)))) * self.scale


def train_step(model: nn.Module, batch: Tensor) -> Tensor:
    """Predict the input."""
    return nn.functional.cross_entropy(model(batch), batch)


def configure(model: nn.Module) -> Any:
    """Adam with a schedule that has a replay."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return Optim(optimizer, from_torch(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20)))


BATCH = torch.tensor([0, 1, 2, 4])
STEP = pipe(train_step, grad(), apply(), ema(0.9))


def task(**more: Any) -> Task:
    """The task of these tests."""
    return Task(**({"model": Net(), "train_step": train_step, "configure_optimizers": configure} | more))


def trained(steps: int = 2) -> TrainState:
    """A state after some steps."""
    state = TrainState.create(task(), seed=1)
    for _ in range(steps):
        state, _ = STEP(state, BATCH)
    return state


def values(state: TrainState) -> dict[str, Any]:
    """All tensors of a state, cloned."""
    opt_state = {name: dict(slots) for name, slots in state.opt_state.items()}
    held = {"params": dict(state.params), "buffers": dict(state.buffers), "opt_state": opt_state, "ema": state.memory.get("ema")}
    return tree.map_tensors(torch.clone, held)


READS: dict[str, Callable[[TrainState], Any]] = {
    "params": lambda state: state.params,
    "buffers": lambda state: state.buffers,
    "opt_state": lambda state: state.opt_state,
    "memory": lambda state: state.memory,
    "module": lambda state: state.module(),
    "copy": lambda state: state.copy(),
    "to": lambda state: state.to("cpu"),
    "moved": lambda state: state.moved("cpu"),
    "live": lambda state: state.live,
    "a step": lambda state: STEP(state, BATCH),
}


@pytest.mark.parametrize("read", READS)
def test_a_donated_state_is_never_readable(read: str) -> None:
    """Once a step has taken a state, every way to its tensors raises, and says what to do."""
    before = trained(1)
    STEP(before, BATCH)
    message = (
        r"the state of step 1 was donated to a later step, .*; use the state that the step returned, keep state.copy\(\) .* fl.pure\(step\)"
    )
    with pytest.raises(DonatedStateError, match=message):
        READS[read](before)


def test_what_is_no_tensor_stays_readable_in_a_donated_state() -> None:
    """Progress, seed, history and the printed form hold no tensors."""
    before = trained(1).recorded({"val/loss": 1.0})
    STEP(before, BATCH)
    assert (before.progress.step, before.seed, before.history[0].metrics) == (1, 1, {"val/loss": 1.0})
    assert repr(before).startswith("TrainState(step=1,")
    assert before.device == torch.device("cpu")


def test_a_step_that_fails_leaves_no_readable_state() -> None:
    """Should a step break half-way, its input is gone too, since nobody knows what was overwritten."""
    state = trained(1)

    def broken(store: Store, batches: Any, key: int) -> Any:
        raise ZeroDivisionError("half-way")

    with pytest.raises(ZeroDivisionError, match="half-way"):
        apply()(broken)(state, BATCH)
    with pytest.raises(DonatedStateError, match="or failed half-way"):
        state.params


def test_a_copy_is_independent_in_everything() -> None:
    """Parameters, buffers, optimizer and memory of a copy stay while the original trains on; and the other way round."""
    state = trained()
    kept, held = state.copy(), values(state)
    after, _ = STEP(state, BATCH)
    assert tree.equal(values(kept), held)
    reached = values(after)
    again, _ = STEP(kept, BATCH)
    assert tree.equal(values(after), reached)
    assert list(tree.differences(values(again), reached)) == []


def test_the_optimizer_of_a_copy_trains_the_copy() -> None:
    """The copied optimizer holds the copied parameters and their memory, not the original's."""
    state = trained()
    twin = state.copy()
    own = {id(p) for p in twin.live.module.parameters()}
    assert {id(p) for group in twin.live.optim.optimizer.param_groups for p in group["params"]} <= own
    assert {id(p) for p in twin.live.optim.optimizer.state} <= own
    assert own.isdisjoint({id(p) for p in state.live.module.parameters()})
    assert [id(p) for p in twin.live.params] == [id(p) for p in twin.live.module.parameters() if p.requires_grad]


def test_tied_weights_stay_tied_in_a_copy() -> None:
    """Two names of one parameter are one parameter in every copy."""
    for module in (trained().copy().live.module, trained().module()):
        assert module.head.weight is module.embed.weight
        assert not any(name == "head.weight" for name, _ in module.named_parameters())


def test_hooks_of_a_copied_module_see_the_copy() -> None:
    """Hooks are copied with the module and are called with the copy."""
    model, seen = Net(), []
    model.register_forward_hook(lambda module, args, output: seen.append(module))
    state = TrainState.create(task(model=model), seed=1)
    twin = state.copy()
    STEP(twin, BATCH)
    assert seen == [twin.store.module]


def threefold(parameter: Any) -> None:
    """A hook that changes a gradient in place."""
    parameter.grad.mul_(3)


@pytest.mark.parametrize(("kind", "hook"), [("register_hook", lambda grad: 3 * grad), ("register_post_accumulate_grad_hook", threefold)])
def test_hooks_on_gradients_follow_the_copies(kind: str, hook: Callable[[Any], Any]) -> None:
    """What changes a gradient where it arises does so whether or not a state is copied, and however often."""
    ends = []
    for donate in (True, False):
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        getattr(model.weight, kind)(hook)
        task = Task(model, lambda model, batch: model(batch).sum(), configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        state = TrainState.create(task, donate=donate)
        state, _ = pipe(task.train_step, grad(), apply())(state if donate else state.copy().copy(), torch.ones(1, 2))
        ends.append(state.params["weight"].tolist())
    assert ends[0] == ends[1] == [[pytest.approx(0.7), pytest.approx(0.7)]]


def test_a_copy_of_a_donated_state_s_successor_is_a_state_of_its_own() -> None:
    """Versions count a store's steps; a copy has a new store and may be read while the old goes on."""
    state = trained(3)
    twin = state.copy()
    assert (state.version, twin.version) == (6, 0)
    assert tree.equal(values(twin), values(state))


def test_creating_leaves_the_task_and_the_world_alone() -> None:
    """The caller's module, the global generators and the modes are what they were; training never touches the module."""
    given = task(configure_optimizers=lambda model: (torch.rand(3), random.random(), configure(model))[2])
    given.model.eval()
    before, state, python = copy.deepcopy(given.model.state_dict()), torch.get_rng_state(), random.getstate()
    created = TrainState.create(given, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    for _ in range(2):
        created, _ = STEP(created, BATCH)
    assert tree.equal(given.model.state_dict(), before)
    assert all(p.grad is None for p in given.model.parameters())
    assert not given.model.training


def test_creating_twice_gives_the_same() -> None:
    """A state before its first step is a function of task and seed."""
    given = task()
    assert tree.equal(values(TrainState.create(given, seed=3)), values(TrainState.create(given, seed=3)))


def test_gradients_left_by_configuring_do_not_count() -> None:
    """What configure_optimizers or the task's owner left in `.grad` is not added to the first gradients."""

    def curious(model: nn.Module) -> Any:
        train_step(model.eval(), BATCH).backward()
        model.train()
        return configure(model)

    given = task()
    train_step(given.model.eval(), BATCH).backward()
    given.model.train()
    plain, _ = STEP(TrainState.create(given), BATCH)
    other, _ = STEP(TrainState.create(task(model=given.model, configure_optimizers=curious)), BATCH)
    assert list(tree.differences(dict(other.params), dict(plain.params))) == []


def test_mappings_of_a_state_are_read_only() -> None:
    """Nobody changes a state through what it shows."""
    state = trained()
    for mapping in (state.params, state.buffers, state.opt_state, state.opt_state["embed.weight"], state.memory):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["new"] = 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError, match=r"can.t set attribute"):
        state.seed = 5
    assert not any(p.requires_grad for p in state.params.values())


def test_names_are_qualified_and_complete() -> None:
    """Parameters, buffers and optimizer memory stand under the module's own names; frozen ones have no memory."""
    state = trained()
    assert set(state.params) == {"embed.weight", "norm.weight", "norm.bias", "frozen.weight", "frozen.bias"}
    assert set(state.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "scale"}
    assert set(state.opt_state) == {"embed.weight", "norm.weight", "norm.bias"}


def test_a_module_of_its_own() -> None:
    """`module()` gives a module with these weights and modes that training on does not change."""
    state = trained()
    module = state.module()
    expected = copy.deepcopy(module.state_dict())
    STEP(state, BATCH)
    assert tree.equal(module.state_dict(), expected)
    assert module.training


def test_moving_keeps_every_value_and_goes_on_the_same() -> None:
    """`to` gives a copy, `moved` the very state; both go on bitwise as the original does, and settle what waits."""
    state = trained()
    window = Tally()
    window.add(1, {"loss": torch.tensor(2.0)})
    state.store.memory["window"] = window
    copied = state.to("cpu")
    assert tree.equal(values(copied), values(state))
    assert copied.memory["window"].read() == {"loss": 2.0}
    expected = values(STEP(copied.copy(), BATCH)[0])
    moved = copied.moved(torch.device("cpu"))
    with pytest.raises(DonatedStateError, match=r"the state of step 2"):
        copied.params
    assert list(tree.differences(values(STEP(moved, BATCH)[0]), expected)) == []


def test_moving_brings_the_memory_of_combinators_and_leaves_a_loader_s_place() -> None:
    """Tensors of every tree go to the device; where a loader stands stays on the CPU, as it was given."""
    state = TrainState.create(Task(nn.Identity(), lambda model, batch: batch))
    state.store.memory["ema"] = {"w": torch.ones(2), "parts": (torch.ones(1), [torch.ones(1)]), "n": 3}
    state.store.step.position = lambda: {"seen": torch.tensor(4)}
    memory = state.moved("meta").memory
    assert [leaf.device.type for _, leaf in tree.leaves(memory["ema"]) if isinstance(leaf, Tensor)] == ["meta"] * 3
    assert memory["ema"]["n"] == 3
    assert memory["loader"]["seen"].item() == 4


def test_settling_asks_the_loader_for_its_place_once() -> None:
    """The place of a loader that keeps its own is taken into the memory when somebody reads, and is then a value."""
    state, asked = trained(), []
    state.store.step.position = lambda: asked.append(1) or {"batch": 7}
    assert state.memory["loader"] == {"batch": 7}
    assert state.copy().memory["loader"] == {"batch": 7}
    assert len(asked) == 1


def test_creating_on_a_device() -> None:
    """`device=` moves the copy before the optimizer is made, so that its memory lies there too."""
    state = TrainState.create(task(), device="cpu")
    assert (state.device, state.store.params[0].device) == (torch.device("cpu"), torch.device("cpu"))
    meta = TrainState.create(Task(nn.Linear(2, 2).requires_grad_(False), train_step), device="meta")
    assert meta.device.type == "meta"


def test_a_model_without_tensors_is_on_the_cpu() -> None:
    """Where nothing lies anywhere, the device is the CPU."""
    state = TrainState.create(Task(nn.Identity(), lambda model, batch: batch))
    assert (state.device.type, dict(state.params), dict(state.opt_state)) == ("cpu", {}, {})


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: TrainState.create(Net()), r"TrainState.create\(task\) must be a Task, but got Net; write fl.Task\(model, train_step, ...\)"),
    (lambda: TrainState.create(task(), seed=-1), "seed must be a non-negative integer, but got -1"),
    (lambda: TrainState.create(task(), seed=0.5), "seed must be a non-negative integer, but got 0.5"),
    (lambda: TrainState.create(task(), seed=True), "seed must be a non-negative integer, but got True"),
    (
        lambda: TrainState.create(task(model=nn.Sequential(nn.LazyLinear(3)))),
        r"lazy tensors without a shape, \['0.weight', '0.bias'\]; call the model once on a batch before fl.Task\(model",
    ),
    (
        lambda: TrainState.create(task(model=nn.LazyBatchNorm1d(affine=False))),
        r"lazy tensors without a shape, \['running_mean', 'running_var'\]",
    ),
]


@pytest.mark.parametrize("make, message", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_state_that_cannot_work_is_refused(make: Callable[[], Any], message: str) -> None:
    """What is wrong is said before any work, with what was expected and what came."""
    with pytest.raises(TypeError, match=message):
        make()


def test_a_task_without_an_optimizer_can_be_evaluated_only() -> None:
    """A state without an optimizer is sound, and a step on it says what is missing."""
    state = TrainState.create(task(configure_optimizers=None))
    assert "no optimizer" in repr(state)
    with pytest.raises(OptimizerError, match="its parameters require gradients, but it has no configure_optimizers"):
        STEP(state, BATCH)


def test_a_state_prints_where_it_stands() -> None:
    """The printed form says how far training is, how large the model is and why it stopped."""
    state = trained()
    assert repr(state) == "TrainState(step=2, epoch=0, batch=2, 33 parameters, Adam)"
    assert repr(attrs.evolve(state, stopped="max_steps(2)")).endswith("Adam, stopped: max_steps(2))")


def test_time_does_not_count_in_comparisons() -> None:
    """Two trainings that did the same work stand at the same place, however long they took."""
    assert Progress(step=3, seconds=1.0) == Progress(step=3, seconds=2.0)
    assert Progress(step=3) != Progress(step=4)


def test_recording_leaves_the_state_as_it_was() -> None:
    """`recorded` gives a state with one record more, on the same store."""
    state = trained()
    later = state.recorded({"val/loss": 1.0})
    assert (len(state.history), later.history[0]) == (0, Record(2, 0, {"val/loss": 1.0}))
    assert later.live is state.live


class Tied(nn.Module):
    """Two layers of one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


def test_a_donated_model_lies_in_the_very_memory_of_the_state():
    """Nothing is copied: parameters, tied ones and buffers are those of the model, and the training is that of a copy."""

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, batch):
        return model(batch).square().mean()

    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    places = {name: t.data_ptr() for name, t in model.state_dict().items()}
    state = TrainState.create(Task(model, step, configure_optimizers=sgd), donate=True)
    assert {name: t.data_ptr() for name, t in state.store.module.state_dict().items()} == places
    assert state.store.module.second.weight is state.store.module.first.weight
    found, _ = update(state, torch.ones(2, 3))
    expected, _ = update(TrainState.create(Task(twin, step, configure_optimizers=sgd)), torch.ones(2, 3))
    assert all(torch.equal(p, expected.params[name]) for name, p in found.params.items())


def test_a_donated_model_makes_no_other_state(tmp_path):
    """A task whose model is gone says so, rather than beginning with weights that have been trained."""
    task = Task(nn.BatchNorm1d(2), lambda model, batch: model(batch).sum())
    state = TrainState.create(task, donate=True)
    with pytest.raises(
        TypeError, match=r"lazy tensors without a shape, \['weight', 'bias', .*or create a new model if this one was donated"
    ):
        TrainState.create(task)
    with pytest.raises(TypeError, match="create a new model if this one was donated"):
        load(save(state, tmp_path / "state"), state.task)
    assert torch.equal(state.copy().params["weight"], torch.ones(2))


def test_a_model_that_is_refused_is_not_taken():
    """Where the optimizer does not fit, the model keeps its tensors."""
    model = nn.Linear(2, 1)
    task = Task(model, lambda model, batch: model(batch).sum(), configure_optimizers=lambda m: 3)
    with pytest.raises(OptimizerError, match="must return"):
        TrainState.create(task, donate=True)
    assert model.weight.shape == (1, 2)
