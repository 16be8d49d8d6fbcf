"""Laws of parameter groups by rule: every parameter in one group, what holds for it, and refusals that name parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fnlight.errors import OptimizerError
from fnlight.gradients import grad
from fnlight.optim import frozen, layer_decay, no_decay, param_groups
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply


class OwnRMSNorm(nn.Module):
    """A norm that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Net(nn.Module):
    """Embedding, three blocks with norms and attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4), "norm": OwnRMSNorm()}) for _ in range(12))
        self.attend = nn.MultiheadAttention(4, 1)
        self.recur = nn.GRU(4, 4)
        self.norms = nn.ModuleList(
            [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4)]
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0]["norm"](self.blocks[0]["mix"](self.embed(x))))


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def options(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What holds for each parameter, by its name."""
    return {name: {k: v for k, v in group.items() if k != "params"} for group in groups for name in names(model, group)}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    """Whatever the rules, the groups together hold each trainable parameter once, in an order that is always the same."""
    model = Net()
    model.attend.requires_grad_(False)
    rules = ({"head": {"lr": 1e-2}}, layer_decay(0.5, "embed", "blocks.*", ("attend", "recur", "norms"), "head"), no_decay(nn.Embedding))
    groups = param_groups(model, *rules, lr=1e-3, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)
    assert [(g["name"], names(model, g)) for g in groups] == [
        (g["name"], names(model, g)) for g in param_groups(model, *rules, lr=1e-3, weight_decay=0.1)
    ]


def test_norms_are_known_by_type_and_biases_by_the_end_of_their_name() -> None:
    """No decay for every parameter of a norm, however it is called, and for every bias; decay for every matrix and embedding."""
    model = Net()
    decays = {name: held["weight_decay"] for name, held in options(model, param_groups(model, no_decay(), weight_decay=0.1)).items()}
    spared = {name for name, decay in decays.items() if decay == 0.0}
    expected = {name for name in decays if name.startswith("norms.") or ".norm." in name or "bias" in name}
    assert spared == expected
    assert {"blocks.0.norm.scale", "attend.in_proj_bias", "recur.bias_ih_l0"} <= spared
    assert not {"embed.weight", "head.weight", "attend.in_proj_weight"} & spared


def test_no_decay_takes_further_types_and_patterns() -> None:
    """A type of module spares its own parameters, a pattern those that it means."""
    model = Net()
    held = options(model, param_groups(model, no_decay(nn.Embedding, "recur"), weight_decay=0.1))
    assert {name for name, o in held.items() if o["weight_decay"] == 0.0} >= {"embed.weight", "recur.weight_hh_l0"}
    assert held["head.weight"]["weight_decay"] == 0.1


def test_layer_decay_multiplies_from_the_output_to_the_input() -> None:
    """The last layer has the whole learning rate, each before it the rate times that of the next; blocks count as numbers, not as texts."""
    model = Net()
    rule = layer_decay(0.5, "embed", "blocks.*", ("attend", "recur", "norms"), "head")
    lrs = {name: held["lr"] for name, held in options(model, param_groups(model, rule, lr=1.0)).items()}
    assert (lrs["head.weight"], lrs["recur.bias_ih_l0"]) == (1.0, 0.5)
    assert [lrs[f"blocks.{i}.mix.weight"] for i in range(12)] == [0.5 ** (13 - i) for i in range(12)]
    assert lrs["embed.weight"] == 0.5**14


def test_frozen_layers_count_and_the_others_keep_their_learning_rate() -> None:
    """Freezing the lower layers changes nothing about the learning rates of the upper ones, whichever rule stands first."""
    rule = layer_decay(0.5, "embed", "blocks.*", ("attend", "recur", "norms"), "head")
    for rules in ((frozen("embed", "blocks.0"), rule), (rule, frozen("embed", "blocks.0"))):
        model = Net()
        held = options(model, param_groups(model, *rules, lr=1.0))
        assert held["blocks.1.mix.weight"]["lr"] == 0.5**12
        assert "embed.weight" not in held
        assert not model.embed.weight.requires_grad
        assert not model.blocks[0]["mix"].weight.requires_grad
        assert model.blocks[10]["mix"].weight.requires_grad


def test_a_later_rule_wins() -> None:
    """What a later rule sets holds, so the order of the rules says it all."""
    model = Net()
    first = options(model, param_groups(model, {"head": {"weight_decay": 0.5}}, no_decay(), weight_decay=0.1))
    last = options(model, param_groups(model, no_decay(), {"head": {"weight_decay": 0.5}}, weight_decay=0.1))
    assert (first["head.bias"]["weight_decay"], last["head.bias"]["weight_decay"]) == (0.0, 0.5)
    assert first["head.weight"]["weight_decay"] == last["head.weight"]["weight_decay"] == 0.5


def test_a_group_is_called_by_its_rules() -> None:
    """A name says which rules hold; ``name`` among the options replaces the pattern; the rest is called so."""
    model = Net()
    groups = param_groups(model, {"blocks.*": {"lr": 1.0}, "head": {"name": "top", "lr": 2.0}}, no_decay(), lr=0.1)
    assert {g["name"] for g in groups} == {"rest", "no_decay", "blocks", "blocks/no_decay", "top", "top/no_decay"}


def test_tied_weights_are_in_one_group() -> None:
    """A parameter with two names is held once."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [len(g["params"]) for g in param_groups(model, no_decay(), lr=0.1)] == [1]


def test_groups_train_as_they_say() -> None:
    """In a step of SGD each parameter moves by its own learning rate, and what is frozen stays."""

    def configure(model: nn.Module) -> Any:
        return torch.optim.SGD(param_groups(model, frozen("embed"), {"head": {"lr": 0.5}}, lr=0.1))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    model = Net()
    for part in (model.attend, model.recur, model.norms, model.blocks[1:]):
        part.requires_grad_(False)
    state = TrainState.create(Task(model, loss, configure_optimizers=configure))
    after, _ = pipe(loss, grad(), apply())(state.copy(), torch.tensor([0, 1, 2]))
    expected = Net()
    expected.load_state_dict(model.state_dict())
    loss(expected, torch.tensor([0, 1, 2])).backward()
    for name, p in expected.named_parameters():
        lr = 0.5 if name.startswith("head") else 0.1
        moves = name.startswith(("head", "blocks.0"))
        if moves and p.grad is not None:
            torch.testing.assert_close(after.params[name], p.detach() - lr * p.grad, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(after.params[name], p), name


REFUSED: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda m: param_groups(m, {"haed": {"lr": 1.0}}), r"'haed' of param_groups means no parameter; near to it are \['head'"),
    (
        lambda m: param_groups(m, {"head": {"lr": 1}, "head.b*": {"lr": 2}}),
        r"'head.bias' is meant by two patterns, 'head' and 'head.b\*' \(1 in all",
    ),
    (lambda m: param_groups(m, {"head": 1e-3}), r"'head' must map to options, as in \{'lr': 1e-4\}, but maps to 0.001"),
    (lambda m: param_groups(m, "head"), r"a rule must be no_decay\(...\), .* but got 'head'; options of all groups are given by name"),
    (lambda m: param_groups(m, frozen("*")), r"nothing is left to train: frozen\('\*'\) leaves no trainable parameter"),
    (lambda m: param_groups(m, frozen("trunk")), r"'trunk' of frozen\('trunk'\) means no parameter; near to it are"),
    (lambda m: param_groups(m, frozen("head"), {"head": {"lr": 1}}), r"'head' of param_groups means frozen parameters only"),
    (lambda m: param_groups(m, no_decay("poss")), r"'poss' of no_decay means no parameter; near to it are"),
    (
        lambda m: param_groups(m, layer_decay(0.5, "embed", "head")),
        r"says nothing about \['blocks.0.mix.weight', .* in all\); name their layer",
    ),
    (lambda m: param_groups(m, layer_decay(0.5, "*", "head"), lr=1), r"'\*' of layer_decay\(0.5, '\*', 'head'\) means no parameter"),
    (
        lambda m: param_groups(m, layer_decay(0.5, "embed", ("embed", "head")), lr=1),
        r"'embed.weight' is meant by two layers of layer_decay",
    ),
    (
        lambda m: param_groups(m, layer_decay(0.5, ("embed", "blocks", "attend", "recur", "norms"), "head")),
        r"multiplies 'lr', but for 'embed.weight' it is None; give it, as in param_groups\(..., lr=1e-3\)",
    ),
    (
        lambda m: param_groups(m, {"head": {"lr": 1, "name": "a"}, "embed": {"lr": 2, "name": "a"}}),
        r"two groups are called 'a', but hold other options; give one another name, at 'head.weight'",
    ),
    (lambda m: layer_decay(1.5, "head"), r"layer_decay\(rate\) must be a number above 0 and at most 1, but got 1.5"),
    (lambda m: layer_decay(0.5), r"layer_decay needs the layers from the input to the output"),
    (lambda m: no_decay(3), r"no_decay takes patterns of names and types of modules, but got 3"),
    (lambda m: frozen(), r"frozen takes patterns of names, as in frozen\('backbone'\), but got \(\)"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_rules_that_mean_nothing_or_two_things_are_refused_with_names(make: Callable[[nn.Module], Any], message: str) -> None:
    """What is missed, meant twice or misspelt is named, with what is near to it; and nothing is frozen by half."""
    model = Net()
    with pytest.raises(OptimizerError, match=message):
        make(model)
    assert all(p.requires_grad for p in model.parameters())


def test_rules_print_as_the_code_that_makes_them() -> None:
    """What a rule prints is what was written."""
    assert [repr(no_decay(nn.Embedding, "pos")), repr(frozen("a", "b")), repr(layer_decay(0.5, "a", ("b", "c")))] == [
        "no_decay(Embedding, 'pos')",
        "frozen('a', 'b')",
        "layer_decay(0.5, 'a', ('b', 'c'))",
    ]
