"""`to_fp8` converts the right linear layers; missing hardware or packages are errors before any work."""

import sys
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight import FitConfig, Loaders, TrainState, fit, load, save, update
from fnlight.errors import ConfigError
from fnlight.precision import to_fp8
from fnlight.state import Task
from fnlight.testing import assert_trees_equal

BATCHES = [
    (torch.randn(32, 16, generator=torch.Generator().manual_seed(i)), torch.randint(4, (32,), generator=torch.Generator().manual_seed(i)))
    for i in range(4)
]


class Net(nn.Module):
    """Layers that can be converted, and some that cannot."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 4)  # 4 is not a multiple of 16

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net()


def train_step(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def task(model=None):
    return Task(net() if model is None else model, train_step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))


class Float8Linear(nn.Linear):
    """The converted linear layer of the fake package."""


def stand_in(monkeypatch):
    """A fake package that records its calls and converts layers as the real one does."""
    asked = []

    @attrs.define
    class Float8LinearConfig:
        recipe: str

        @classmethod
        def from_recipe_name(cls, name):
            return cls(name)

    def convert_to_float8_training(module, *, module_filter_fn, config):
        for name, m in list(module.named_modules()):
            if isinstance(m, nn.Linear) and module_filter_fn(m, name):
                asked.append((name, config.recipe))
                with torch.device("meta"):
                    twin = Float8Linear(m.in_features, m.out_features)
                twin.weight, twin.bias = m.weight, m.bias
                module.set_submodule(name, twin)
        return module

    found = SimpleNamespace(Float8LinearConfig=Float8LinearConfig, convert_to_float8_training=convert_to_float8_training)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(float8=found))
    monkeypatch.setitem(sys.modules, "torchao.float8", found)
    return asked


def gpu(monkeypatch, capability):
    """A machine that claims to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card 3000")


def test_without_a_gpu_fp8_is_an_error_before_any_work(monkeypatch):
    """`fit` and `to_fp8` say what to use instead; the state does not change."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = TrainState.create(task())
    with pytest.raises(
        ConfigError, match=r"fp8 needs a GPU with fp8 matrix products \(compute capability 8.9: .*\), but there is none; use bf16"
    ):
        fit(state, BATCHES, FitConfig(max_epochs=1, precision="fp8", device="cpu", progress=False))
    with pytest.raises(ConfigError, match=r"fp8 needs a GPU .* fl.to_fp8\(model, emulate=True\)"):
        to_fp8(net())
    assert state.progress.step == 0
    assert all(type(m) is not Float8Linear for m in state.module().modules())


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    """The error has the compute capability of the GPU and the one that fp8 needs."""
    gpu(monkeypatch, (8, 0))
    with pytest.raises(ConfigError, match=r"fp8 needs compute capability 8.9 or more, but Card 3000 has 8.0; use bf16"):
        to_fp8(net())


def test_the_error_of_a_missing_package_names_its_extra(monkeypatch):
    """With suitable hardware, and for the emulation."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r'fp8 needs the package torchao \(.*\); pip install "fnlight\[fp8\]", or use bf16'):
        to_fp8(net(), emulate=True)
    gpu(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match="fp8 needs the package torchao"):
        to_fp8(net())


def test_suitable_layers_are_converted(monkeypatch):
    """Layers with sizes that are multiples of 16, and not excluded, are converted with the given recipe; parameters and names stay."""
    asked = stand_in(monkeypatch)
    gpu(monkeypatch, (9, 0))
    model = net()
    names, own = list(model.state_dict()), list(model.parameters())
    found = to_fp8(model, exclude=["blocks.1"], recipe="rowwise")
    assert asked == [("embed", "rowwise"), ("blocks.0", "rowwise")]
    assert list(found.state_dict()) == names
    assert all(a is b for a, b in zip(found.parameters(), own, strict=True))
    assert to_fp8(found) is found  # a second call changes nothing
    assert len(asked) == 2


def test_fp8_by_configuration_converts_only_the_trained_state(monkeypatch):
    """The layers are converted before the first step, on a suitable GPU only; the caller's state does not change."""
    stand_in(monkeypatch)
    gpu(monkeypatch, (9, 0))
    state = TrainState.create(task())
    with pytest.raises(ConfigError, match=r"FitConfig\(precision='fp8'\) needs a GPU, but the state is on cpu; train on a GPU"):
        fit(state, BATCHES, FitConfig(max_epochs=1, precision="fp8", device="cpu", progress=False))
    assert [type(m) for m in state.store.module.modules() if isinstance(m, nn.Linear)] == [nn.Linear] * 4


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 8)), {}, r"no layer can compute in fp8: .* multiples of 16, but the model has \[\[8, 3\]\]"),
        (net, {"exclude": ["blocks", "embed"]}, r"no layer can compute in fp8"),
        (
            net,
            {"exclude": "tail"},
            r"to_fp8\(exclude=...\) has the pattern 'tail', but no linear layer of the model matches it; there are \['embed', 'blocks.0'",
        ),
        (net, {"recipe": "magic"}, r"recipe must be one of \('tensorwise', 'rowwise', 'rowwise_with_gw_hp'\), but got 'magic'"),
    ],
    ids=["too narrow", "all left out", "misspelt", "no such recipe"],
)
def test_a_model_or_arguments_that_fp8_cannot_use_are_refused(monkeypatch, model, options, match):
    """A model without suitable layers, patterns without a match and an unknown recipe are errors."""
    stand_in(monkeypatch)
    gpu(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match=match):
        to_fp8(model(), **options)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_real_package_trains_in_emulated_fp8(recipe, tmp_path):
    """With torchao the numbers differ from bf16, and the model trains; checkpoints hold plain weights, and the resumed run is bit-identical."""
    pytest.importorskip("torchao.float8", reason='needs torchao: pip install "fnlight[fp8]"')
    given = task(to_fp8(net(), recipe=recipe, emulate=True))
    config = FitConfig(max_epochs=20, device="cpu", progress=False)
    losses = [
        [record.metrics["train/loss"] for record in fit(TrainState.create(each), Loaders(train=BATCHES), config).history]
        for each in (given, task())
    ]
    assert losses[0] != losses[1]
    assert losses[0][-1] < 0.6 * losses[0][0]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.25)
    state = fit(TrainState.create(given), BATCHES, attrs.evolve(config, max_epochs=2))
    path = save(state, tmp_path / "a")
    assert load(path, task()).params.keys() == state.params.keys()
    ends = [update(each, BATCHES[0])[0] for each in (load(path, given), state)]
    assert_trees_equal(*ends)
