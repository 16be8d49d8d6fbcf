"""Laws of optimizers by name: what a name means, what is refused, and Lookahead against its definition."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import nn

import fnlight as fl
from fnlight.errors import CheckpointWarning, OptimizerError
from fnlight.optim import optimizer_class, optimizer_classes

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(8)]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean of the squared outputs."""
    return model(batch).square().mean()


def net() -> nn.Module:
    """A model, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def trained(configure: Callable[[nn.Module], Any], steps: int, *combinators: fl.Combinator) -> fl.TrainState:
    """A state after some steps."""
    state = fl.TrainState.create(fl.Task(net(), loss, configure_optimizers=configure))
    step = fl.pipe(loss, fl.grad(), *combinators, fl.apply())
    for batch in BATCHES[:steps]:
        state, _ = step(state, batch)
    return state


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "adam_w", "adam-w", "torch.optim.adamw"])
def test_a_name_is_read_generously(name: str) -> None:
    """Letters, hyphens and underscores make no difference."""
    assert optimizer_class(name) is torch.optim.AdamW


def test_the_first_source_that_knows_a_name_wins_and_a_prefix_chooses() -> None:
    """What torch has is torch's; the package in front of a name asks for another one."""
    assert optimizer_class("radam") is torch.optim.RAdam
    assert optimizer_class("torch_optimizer.radam") is torch_optimizer.RAdam
    assert optimizer_class("yogi") is torch_optimizer.Yogi


def test_a_name_takes_a_model_groups_or_parameters() -> None:
    """A model gives its trainable parameters, groups stay groups, and anything else is handed on."""
    model = net()
    model[0].weight.requires_grad_(False)
    assert len(fl.optimizer("sgd", model, lr=0.1).param_groups[0]["params"]) == 3
    groups = fl.optimizer("sgd", fl.param_groups(model, fl.no_decay(), lr=0.1)).param_groups
    assert [group["name"] for group in groups] == ["no_decay", "rest"]
    assert len(fl.optimizer("sgd", model[2].parameters(), lr=0.1).param_groups[0]["params"]) == 2


REFUSED: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda m: fl.optimizer("adamww", m), r"there is no optimizer called 'adamww'; the closest names are torch.optim.AdamW, "),
    (
        lambda m: fl.optimizer("torch_optimizer.yoggi", m),
        r"no optimizer called 'torch_optimizer.yoggi'; the closest names are torch_optimizer.Yogi",
    ),
    (lambda m: fl.optimizer("apex.adam", m), r"there is no source 'apex' of optimizers; there are torch.optim, torch_optimizer, "),
    (lambda m: fl.optimizer(torch.optim.SGD, m), r"takes a name such as 'adamw', but got type: <class 'torch.optim.sgd.SGD'>"),
    (lambda m: fl.optimizer("sgd", m, learning_rate=0.1), r"'sgd' takes no learning_rate; it takes lr, momentum, dampening, "),
    (lambda m: fl.optimizer("sgd", m, lr=-1.0), r"'sgd' \(torch.optim.sgd.SGD\) cannot be made with \{'lr': -1.0\}: Invalid learning rate"),
    (
        lambda m: fl.optimizer("sgd", [{"params": m.parameters()}, {"params": m[2].weight, "name": "head"}], lr=0.1),
        r"the groups 0 and 'head' share a parameter of shape \[1, 5\]; every parameter belongs to one group",
    ),
    (lambda m: fl.Lookahead("adamw"), r"Lookahead\(base\) must be an optimizer, but got str: 'adamw'"),
    (lambda m: fl.optimizer("lookahead", m, k=0), r"Lookahead\(k\) must be a whole number of at least 1, but got 0"),
    (lambda m: fl.optimizer("lookahead", m, alpha=0.0), r"Lookahead\(alpha\) must be a number above 0 and at most 1, but got 0.0"),
    (lambda m: fl.optimizer("pytorch_optimizer.LOMO", m), r"LOMO updates the weights during the backward pass and has no step"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_cannot_be_made_is_refused_with_what_there_is(make: Callable[[nn.Module], Any], message: str) -> None:
    """An unknown name brings the closest ones, an unknown option those that there are."""
    with pytest.raises(OptimizerError, match=message):
        make(net())


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optional packages a name of theirs is refused with the command that installs them."""
    for name in ("schedulefree", "pytorch_optimizer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert optimizer_classes("schedulefree") == {}
    with pytest.raises(
        OptimizerError, match=r"'SOAP'; the closest .*; schedulefree and pytorch_optimizer not installed: pip install fnlight\[optimizers\]"
    ):
        fl.optimizer("SOAP", net())


WRAPPERS = [lambda m: torch_optimizer.Lookahead(torch.optim.SGD(m.parameters(), lr=0.1))]


@pytest.mark.parametrize("configure", WRAPPERS)
def test_a_wrapper_that_could_not_be_saved_is_refused_before_any_work(configure: Callable[[nn.Module], Any]) -> None:
    """An optimizer around another one whose memory is kept apart would lose half of it, so it is not accepted."""
    with pytest.raises(OptimizerError, match=r"torch_optimizer.Lookahead wraps another optimizer, .*fl.optimizer\(\"lookahead\", model"):
        trained(configure, 0)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adabelief"])
def test_lookahead_is_what_its_paper_says(base: str) -> None:
    """Fast weights make k steps of the optimizer inside; slow ones go the part alpha of the way; both go on from there, bitwise."""
    k, alpha = 3, 0.25
    state = trained(lambda m: fl.optimizer("lookahead", m, base=base, lr=0.05, k=k, alpha=alpha), 8)
    model = net()
    fast, slow = (
        fl.optimizer(base, model, lr=0.05, **({"fused": True} if base != "adabelief" else {})),
        [p.detach().clone() for p in model.parameters()],
    )
    for i, batch in enumerate(BATCHES, 1):
        fast.zero_grad()
        loss(model, batch).backward()
        fast.step()
        if i % k == 0:
            with torch.no_grad():
                for p, held in zip(model.parameters(), slow, strict=True):
                    p.copy_(held.lerp_(p, alpha))
    torch.testing.assert_close(dict(state.params), {n: p.detach() for n, p in model.named_parameters()}, rtol=1e-6, atol=1e-7)
    assert torch.equal(state.opt_state["0.weight"]["slow"], slow[0]) or base != "adabelief"


def test_the_optimizer_inside_is_a_part_of_what_a_checkpoint_is_of(tmp_path: Any) -> None:
    """Another optimizer inside Lookahead starts its memory afresh, and says so, rather than taking that of the other."""
    saved = fl.save(trained(lambda m: fl.optimizer("lookahead", m, base="adamw"), 3), tmp_path / "a")
    other = fl.Task(net(), loss, configure_optimizers=lambda m: fl.optimizer("lookahead", m, base="radam"))
    with pytest.warns(
        CheckpointWarning, match=r"optimizer changed: fnlight.optim.lookahead.Lookahead\[torch.optim.adamw.AdamW\] in the checkpoint"
    ):
        state = fl.restore(saved, fl.TrainState.create(other), allow=("optimizer",))
    assert not any(state.opt_state.values())


def test_a_second_order_optimizer_trains_through_accumulation_and_clipping() -> None:
    """Gradients that keep their graph go through the stages as others do, and leave no graph behind."""
    configure = lambda m: fl.optimizer("adahessian", m, lr=0.05)
    state = fl.TrainState.create(fl.Task(net(), loss, configure_optimizers=configure))
    step = fl.pipe(loss, fl.grad(), fl.accumulate(2), fl.clip_norm(0.5), fl.apply())
    first = copy.deepcopy(dict(state.params))
    for i in range(0, 8, 2):
        state, metrics = step(state, fl.data.Item.of(*BATCHES[i : i + 2], state=state))
    assert all(bool((p != first[name]).any()) and bool(torch.isfinite(p).all()) for name, p in state.params.items())
    assert all((p.grad is None and not p.is_leaf) or p.grad is None for p in state.live.params)
    assert not any(v.requires_grad for v in metrics.values() if isinstance(v, torch.Tensor))


def test_an_optimizer_of_the_user_may_ask_for_a_closure() -> None:
    """A class whose step demands a closure is given one, and one that does not say so can be told with closure=True."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert closure is not None
            closure()
            return torch.optim.SGD.step(self, closure)

    state = trained(lambda m: fl.Optim(Twice(m.parameters(), lr=0.1), closure=True), 2)
    plain = trained(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, foreach=False), 2)
    torch.testing.assert_close(dict(state.params), dict(plain.params))
