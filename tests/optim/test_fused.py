"""The direct step of torch's fused optimizers is bit-identical to torch's own, and is not used in cases where it could differ."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import profiler

import fnlight as fl
from fnlight.optim import take_step
from fnlight.optim.fused import fused_step

ADAM = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-6},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
    {"capturable": True},
]
KINDS = {
    **{f"Adam {options}": (torch.optim.Adam, {"lr": 0.01, **options}) for options in [*ADAM, {"decoupled_weight_decay": True}]},
    **{f"AdamW {options}": (torch.optim.AdamW, {"lr": 0.01, **options}) for options in ADAM},
    **{
        f"SGD {options}": (torch.optim.SGD, {"lr": 0.1, **options})
        for options in [
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.3},
            {"weight_decay": 0.1},
            {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
        ]
    },
    **{
        f"Adagrad {options}": (torch.optim.Adagrad, {"lr": 0.1, **options})
        for options in [
            {},
            {"lr_decay": 0.1},
            {"weight_decay": 0.1},
            {"initial_accumulator_value": 0.5, "eps": 1e-6, "maximize": True},
        ]
    },
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def twins(kind, options, dtype=torch.float32, split=False):
    """Two equal models, each with an optimizer, optionally with several groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    made = []
    for each in (model, copy.deepcopy(model)):
        params = list(each.parameters())
        groups = [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "weight_decay": 0.2}] if split else params
        made.append((each, kind(groups, fused=True, **options)))
    return made


def backward(model, seed):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().sum().backward()


def same(one, other):
    (a, opt_a), (b, opt_b) = one, other
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert len(opt_a.state) == len(opt_b.state)
    for slots, others in zip(opt_a.state.values(), opt_b.state.values(), strict=True):
        assert slots.keys() == others.keys()
        assert all(slots[k] is others[k] is None or torch.equal(slots[k], others[k]) for k in slots)


def directly(optimizer, memo):
    """Take the direct step if possible, else that of torch; return which one it was."""
    done = fused_step(optimizer, memo)
    if not done:
        optimizer.step()
    return done


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", KINDS)
def test_the_direct_step_is_bit_identical_to_torchs_own(name, split):
    """Parameters and optimizer state are equal after each of six steps, with one group and with two; all but the first are direct."""
    for dtype in DTYPES[: 2 if KINDS[name][1].get("momentum") else 3]:  # torch's own kernel is not reproducible for bf16 with momentum
        (ours, theirs), memo, direct = twins(*KINDS[name], dtype=dtype, split=split), {}, []
        for i in range(6):
            backward(ours[0], i)
            backward(theirs[0], i)
            direct.append(directly(ours[1], memo))
            theirs[1].step()
            same(ours, theirs)
        assert all(direct[1:])


@pytest.mark.parametrize("name", KINDS)
def test_options_can_change_between_steps(name):
    """Options are read from the groups at every step, so every option can have a schedule."""
    (ours, theirs), memo = twins(*KINDS[name]), {}
    changes = {"lr": 0.003, "weight_decay": 0.05, "eps": 1e-4, "betas": (0.5, 0.6), "maximize": True, "lr_decay": 0.2, "dampening": 0.2}
    for i, key in enumerate(["lr", *changes]):
        for model, optimizer in (ours, theirs):
            group = optimizer.param_groups[0]
            if i and key in group and not (key == "dampening" and group["nesterov"]):
                group[key] = changes[key]
            backward(model, i)
        taken = directly(ours[1], memo)
        assert taken or not i
        theirs[1].step()
        same(ours, theirs)


@pytest.mark.parametrize("name", ["Adam {}", "AdamW {'amsgrad': True}", "SGD {}", "Adagrad {}"])
def test_a_step_can_be_skipped_on_the_device(name):
    """With ``found_inf``, as for loss scaling, the direct step skips the same steps as torch."""
    (ours, theirs), memo = twins(*KINDS[name]), {}
    for i in range(6):
        for model, optimizer in (ours, theirs):
            backward(model, i)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(i in (2, 4)))
        directly(ours[1], memo)
        theirs[1].step()
        same(ours, theirs)
    assert memo["bound"].holds(ours[1])


@pytest.mark.parametrize("name", ["AdamW {}", "SGD {}", "Adagrad {}"])
def test_parameters_without_a_gradient_are_skipped(name):
    """Frozen parameters do not change, and torch creates the state of an unfrozen one."""
    (ours, theirs), memo, direct = twins(*KINDS[name]), {}, []
    for i in range(8):
        for model, _ in (ours, theirs):
            model[0].requires_grad_(i >= 4)
            backward(model, i)
        direct.append(directly(ours[1], memo))
        theirs[1].step()
        same(ours, theirs)
    assert direct[1:4] == direct[5:] == [True] * 3
    assert direct[4] is (name != "AdamW {}")  # the others have no state to create at that time


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_slot(optimizer):
    slots = next(iter(optimizer.state.values()))
    slots["exp_avg"] = slots["exp_avg"].clone()


def new_slots(optimizer):
    key = next(iter(optimizer.state))
    optimizer.state[key] = {name: value.clone() for name, value in optimizer.state[key].items()}


def new_state(optimizer):
    optimizer.state.clear()


def another_group(optimizer):
    *params, last = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = params
    optimizer.add_param_group({"params": [last], "lr": 0.2})


def fewer_parameters(optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop())


@pytest.mark.parametrize("change", [load, new_slot, new_slots, new_state, another_group, fewer_parameters])
def test_the_lookup_is_repeated_after_a_change(change):
    """Loaded state, replaced tensors, other groups and other parameters are detected at the next step."""
    (ours, theirs), memo = twins(*KINDS["AdamW {}"]), {}
    for i in range(8):
        for model, optimizer in (ours, theirs):
            backward(model, i)
            if i == 4:
                change(optimizer)
        directly(ours[1], memo)
        theirs[1].step()
        same(ours, theirs)
    assert memo["bound"].holds(ours[1])


class Doubled(torch.optim.AdamW):
    """A user's step."""


def tensor_lr(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


def unfused(optimizer):
    optimizer.param_groups[0]["fused"] = False


def sparse(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    p.grad = p.grad.to_sparse()


def scaled(optimizer):
    optimizer.grad_scale = torch.tensor(2.0)


def other_class(optimizer):
    optimizer.__class__ = Doubled


@pytest.mark.parametrize("change", [tensor_lr, unfused, sparse, scaled, other_class])
def test_unsupported_cases_use_the_step_of_torch(change):
    """For tensor learning rates, other kernels, sparse or scaled gradients and user classes, the direct step does nothing."""
    (model, optimizer), _ = twins(*KINDS["AdamW {}"])
    memo = {}
    for i in range(3):
        backward(model, i)
        directly(optimizer, memo)
    backward(model, 3)
    assert fused_step(optimizer, memo)
    backward(model, 3)
    change(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    assert not fused_step(optimizer, memo)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_hooks_patches_and_profilers_see_every_step():
    """Hooks, a patched step and a profiler see every step, also if they are added later."""
    (model, optimizer), _ = twins(*KINDS["AdamW {}"])
    memo, heard = {}, []

    def step(i):
        backward(model, i)
        take_step(optimizer, memo)

    step(0), step(1)
    hook = optimizer.register_step_post_hook(lambda *_: heard.append("hook"))
    step(2)
    hook.remove()
    optimizer.step = lambda: heard.append("patch")
    step(3)
    del optimizer.step
    with profiler.profile() as profile:
        step(4)
    step(5)
    assert heard == ["hook", "patch"]
    assert any("Optimizer.step" in event.name for event in profile.function_events)


def test_a_patched_class_is_called(monkeypatch):
    """If the step of an optimizer class is replaced, the replacement is called, although it wraps the one of torch."""
    (model, optimizer), _ = twins(*KINDS["AdamW {}"])
    memo, heard, own = {}, [], torch.optim.AdamW.step

    def patched(self, closure=None):
        heard.append("patch")
        return own(self, closure)

    patched.__wrapped__, patched.hooked = own, True
    backward(model, 0)
    directly(optimizer, memo)
    monkeypatch.setattr(torch.optim.AdamW, "step", patched)
    backward(model, 1)
    assert not fused_step(optimizer, memo)
    optimizer.step()
    assert heard == ["patch"]


def test_several_dtypes_in_one_group_use_the_step_of_torch():
    """Parameters of two dtypes in one group need separate kernels, which torch handles."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not fused_step(optimizer, {})


def test_grad_mode_is_restored():
    """The direct step restores grad mode, also after an error."""
    (model, optimizer), _ = twins(*KINDS["SGD {}"])
    for mode in (True, False):
        backward(model, 0)
        with torch.set_grad_enabled(mode):
            assert fused_step(optimizer, {})
            assert torch.is_grad_enabled() is mode


def state_after(steps, start=None):
    """A run with an optimizer that fnlight makes fused."""

    def train_step(model, batch):
        return (model(batch) - batch.mean()).square().mean()

    torch.manual_seed(0)
    task = fl.Task(nn.Linear(4, 2), train_step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    return fl.fit(start or fl.TrainState.create(task), data, fl.FitConfig(max_steps=steps, progress=False)), task


def test_a_copy_of_a_state_does_not_share_the_lookup():
    """The lookup is not copied: a copy trains its own tensors, and the original does not change."""
    state, _ = state_after(5)
    assert state.store.optim.bound["bound"] is not None
    twin = state.copy()
    assert not twin.store.optim.bound
    before = {name: p.clone() for name, p in state.params.items()}
    further, _ = state_after(10, twin)
    assert all(torch.equal(p, before[name]) for name, p in state.params.items())
    assert not torch.equal(further.params["weight"], before["weight"])


def test_a_loaded_run_continues_bit_identically(tmp_path):
    """Steps 1 to 10 equal steps 1 to 5, save, load and steps 6 to 10; both parts use the direct step."""
    whole, task = state_after(10)
    half, _ = state_after(5)
    fl.save(half, tmp_path / "half")
    resumed, _ = state_after(10, fl.load(tmp_path / "half", task))
    assert resumed.store.optim.bound["bound"].holds(resumed.store.optim.optimizer)
    for name, p in whole.params.items():
        assert torch.equal(p, resumed.params[name])
        slots, others = whole.opt_state[name], resumed.opt_state[name]
        assert all(torch.equal(slots[key], others[key]) for key in slots)
