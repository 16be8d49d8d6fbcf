"""A run that resumes with changed code: every row of the table in ``docs/resume.md`` is a test of the same name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fnlight as fl
from tests.repo.source import ROOT

OTHERS = ("test_every_row_of_the_table_has_its_test", "test_differences_that_nobody_knows_are_refused")
PAGE = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")


class Rows(Dataset[Any]):
    """Samples that say which they are, with noise of their own."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.full((2,), i / 24) + 0.01 * torch.rand(2), torch.tensor([i / 24])


def net(**parts: nn.Module) -> nn.Module:
    """A network whose parts have names."""
    torch.manual_seed(1)
    model = nn.Sequential()
    for name, part in (parts or {"body": nn.Linear(2, 4), "drop": nn.Dropout(0.2), "head": nn.Linear(4, 1)}).items():
        model.add_module(name, part)
    return model


def train_step(model: nn.Module, batch: Any) -> Any:
    """The squared error."""
    x, y = batch
    return (model(x.to(next(model.parameters()).dtype)) - y).square().mean()


def eval_step(model: nn.Module, batch: Any) -> Any:
    """The same, as a metric."""
    return {"loss": train_step(model, batch)}


def adam(model: nn.Module) -> Any:
    """The optimizer of the first part of a run."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def make(model: nn.Module | None = None, configure: Callable[[Any], Any] = adam) -> fl.Task:
    """A task."""
    return fl.Task(net() if model is None else model, train_step, eval_step, configure_optimizers=configure)


def data(size: int = 4, workers: int = 0) -> DataLoader[Any]:
    """The training data in batches."""
    return DataLoader(Rows(), batch_size=size, shuffle=True, num_workers=workers)


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run that was saved after nine steps, three batches into its second epoch."""
    train(str(tmp_path / "run"), max_steps=9, resume=False)
    return str(tmp_path / "run")


def train(dir: str | None, task: fl.Task | None = None, loader: Any = None, **options: Any) -> fl.TrainState:
    """A run, or the rest of one."""
    options = {"max_steps": 15, "ema": 0.5, "resume": True, **options}
    loaders = fl.Loaders(train=data() if loader is None else loader, val=data(8))
    state = fl.TrainState.create(make() if task is None else task, seed=3)
    return fl.fit(state, loaders, fl.FitConfig(dir=dir, progress=False, device="cpu", **options))


def same(a: fl.TrainState, b: fl.TrainState) -> bool:
    """Whether two runs ended in the same bits."""
    return fl.testing.trees_equal([dict(a.params), a.memory["ema"]], [dict(b.params), b.memory["ema"]])


def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which samples are read from now on."""
    read: list[int] = []
    real = Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda self, i: (read.append(i), real(self, i))[1])
    return read


def whole() -> fl.TrainState:
    """The run that was never interrupted, nor changed."""
    return train(None, resume=False)


def test_no_change(run: str) -> None:
    """The run ends in the very bits."""
    assert same(train(run), whole())


def test_workers(run: str) -> None:
    """Samples do not depend on who reads them."""
    assert same(train(run, loader=data(workers=1)), whole())


def test_batch_size(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the epoch that were not seen are seen, once each."""
    first = seen(monkeypatch)
    train(None, max_steps=9, resume=False, ema=None, limit_eval=1, eval_every=None)
    begun = first[24:36]
    rest = seen(monkeypatch)
    state = train(run, loader=data(6), max_steps=None, max_epochs=2, eval_every=None)
    assert sorted(begun + rest[: 24 - 12]) == list(range(24))
    assert (state.progress.step, state.progress.epoch, state.progress.samples) == (11, 2, 48)


def test_batch_size_within_a_batch(run: str) -> None:
    """Where no batch of the new size ends, the place is refused; when allowed, the run goes back to where one does."""
    with pytest.raises(
        fl.errors.LoaderError, match=r"12 samples into epoch 1, .* after 8 and 16 samples, .*batch_size.*allow=\(.batch_size"
    ):
        train(run, loader=data(8))
    with pytest.warns(fl.errors.CheckpointWarning, match="goes back from sample 12 of epoch 1 to sample 8"):
        state = train(run, loader=data(8), allow="batch_size", max_steps=None, max_epochs=2)
    assert (state.progress.step, state.progress.samples) == (11, 48)


def test_accumulation(run: str) -> None:
    """Groups of another size begin where the run stands: twelve samples are left, which are three batches, two and one."""
    state = train(run, accumulate=2, max_steps=None, max_epochs=2)
    assert (state.progress.step, state.progress.samples) == (11, 48)
    assert train(run, accumulate={0: 1, 2: 3}, max_steps=None, max_epochs=3).progress.step == 11 + 2


def test_schedule(run: str) -> None:
    """The learning rate is that of the new schedule at the count of steps that are done."""
    halved = lambda model: fl.Optim(adam(model), schedule=lambda step: 0.5 if step < 100 else 1.0)
    state = train(run, make(configure=halved))
    assert state.store.optim.optimizer.param_groups[0]["lr"] == 0.005


def test_learning_rate(run: str) -> None:
    """The code wins over the checkpoint, and says so."""
    with pytest.warns(fl.errors.CheckpointWarning, match=r"lr: 0\.01 in the checkpoint, 0\.05 now; 0\.05 is used"):
        state = train(run, make(configure=lambda model: torch.optim.Adam(model.parameters(), lr=0.05)))
    assert state.store.optim.optimizer.param_groups[0]["lr"] == 0.05


def test_patience(run: str) -> None:
    """A rule is a function of the history, the part before the change as well."""
    state = train(run, stop=fl.reached("val/loss", 0.0))
    assert state.progress.step == 9
    assert state.stopped
    assert "val/loss" in state.stopped


def test_limits(run: str) -> None:
    """They count all that was done, before the change as well."""
    assert train(run, max_steps=9).progress.step == 9
    assert train(run, max_steps=None, max_epochs=2).progress.step == 12


def test_combinator_added(run: str) -> None:
    """One with a memory starts it, and says so."""
    folder = f"{run}-plain"
    train(folder, ema=None, max_steps=9, resume=False)
    with (
        pytest.warns(fl.errors.MemoryWarning, match=r"ema\(0\.5\) starts with new memory at step 9"),
        pytest.warns(fl.errors.MemoryWarning, match=r"step 10: the metrics \['grad_norm'\] are new since the state was saved"),
    ):
        state = train(folder, clip_norm=1.0)
    assert state.progress.step == 15


def test_combinator_removed(run: str) -> None:
    """What it remembered is kept as it is, and said."""
    with pytest.warns(fl.errors.MemoryWarning, match=r"holds the memory of \['ema'\], which no combinator of this pipe uses"):
        state = train(run, ema=None)
    assert "ema" in state.memory


def test_optimizer(run: str) -> None:
    """Another one is refused, and starts afresh when allowed."""
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(fl.errors.MismatchError, match=r"optimizer changed: .*Adam, but the task now has .*SGD.*allow=\(.optimizer"):
        train(run, make(configure=sgd))
    with pytest.warns(fl.errors.CheckpointWarning, match="optimizer changed: .*its state starts empty"):
        state = train(run, make(configure=sgd), allow=("optimizer",))
    assert state.progress.step == 15


@pytest.mark.parametrize(
    "kind, options, slot",
    [
        (torch.optim.Adam, {"amsgrad": True}, "max_exp_avg_sq"),
        (torch.optim.RMSprop, {"centered": True}, "grad_avg"),
        (torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
    ],
)
def test_option_switched_on(tmp_path: Path, kind: Any, options: dict[str, Any], slot: str) -> None:
    """What the option needs begins with zeros and a warning, so the next step is that of torch with such a slot."""
    folder = str(tmp_path / "other")
    train(folder, make(configure=lambda model: kind(model.parameters(), lr=0.01)), max_steps=9, resume=False)
    (option,) = options
    with pytest.warns(fl.errors.CheckpointWarning, match=f"{option} was off in the checkpoint and is on now: its {slot} begins with zeros"):
        state = train(folder, make(configure=lambda model: kind(model.parameters(), lr=0.01, **options)))
    assert state.progress.step == 15
    assert all(slots[slot].any() for slots in state.opt_state.values())


def test_parameters_renamed(run: str) -> None:
    """Weights, slots and averages follow their new names, and the run ends in the bits that it would have ended in."""
    model = net(trunk=nn.Linear(2, 4), drop=nn.Dropout(0.2), out=nn.Linear(4, 1))
    names = {"body": "trunk", "head.weight": "out.weight", "head.bias": "out.bias"}
    with pytest.raises(fl.errors.MismatchError, match=r"(?s)from another model.*body\.weight.*rename="):
        train(run, make(model))
    state, expected = train(run, make(model), rename=names), whole()
    turned = {"body": "trunk", "head": "out"}
    old = {re.sub(r"^\w+", lambda m: turned[m[0]], name): p for name, p in expected.params.items()}
    average = {re.sub(r"^\w+", lambda m: turned[m[0]], name): p for name, p in expected.memory["ema"].items()}
    assert fl.testing.trees_equal([dict(state.params), state.memory["ema"]], [old, average])
    assert same(train(run, make(model), rename=names, max_steps=15), state)


def test_parameters_added(run: str) -> None:
    """They are refused; when allowed they start as the model makes them, with their average, and the others go on."""
    model = lambda: net(body=nn.Linear(2, 4), extra=nn.Linear(4, 4), head=nn.Linear(4, 1))
    with pytest.raises(fl.errors.MismatchError, match=r"(?s)extra\.weight.*allow=\(.model"):
        train(run, make(model()))
    with pytest.warns(fl.errors.CheckpointWarning, match="only the matching weights were loaded"):
        state = train(run, make(model()), allow=("model",))
    assert state.memory["ema"].keys() == state.params.keys()
    assert {int(slots["step"]) for name, slots in state.opt_state.items() if "extra" in name} == {6}
    assert {int(slots["step"]) for name, slots in state.opt_state.items() if "extra" not in name} == {15}


def test_parameters_removed(run: str) -> None:
    """They are refused; when allowed they are left out, with their slots and averages."""
    model = lambda: net(body=nn.Linear(2, 4))
    with pytest.raises(fl.errors.MismatchError, match=r"(?s)head\.weight.*allow=\(.model"):
        train(run, make(model()))
    with pytest.warns(fl.errors.CheckpointWarning, match="only the matching weights were loaded"):
        state = train(run, make(model()), allow=("model",))
    assert state.memory["ema"].keys() == state.params.keys()


def test_frozen(run: str) -> None:
    """What is frozen now loses its slots, which is said; its weights stay."""
    model = net()
    model.body.requires_grad_(requires_grad=False)
    with pytest.warns(
        fl.errors.CheckpointWarning, match=r"no longer has these parameters; their state is dropped: body\.weight, body\.bias"
    ):
        state = train(run, make(model))
    assert torch.equal(state.params["body.weight"], train(None, max_steps=9, resume=False).params["body.weight"])


def test_unfrozen(tmp_path: Path) -> None:
    """What is trained anew starts its slots, which is said."""
    model = net()
    model.body.requires_grad_(requires_grad=False)
    train(str(tmp_path), make(model), max_steps=9, resume=False)
    with pytest.warns(fl.errors.CheckpointWarning, match=r"has no optimizer state for these; it starts empty: body\.bias, body\.weight"):
        state = train(str(tmp_path))
    assert int(state.opt_state["body.weight"]["step"]) == 6


def test_dtype(run: str) -> None:
    """Another one is refused; when allowed weights, slots and averages are converted."""
    with pytest.raises(fl.errors.MismatchError, match=r"(?s)float64.*convert the weights with allow=\(.dtype"):
        train(run, make(net().double()))
    with pytest.warns(fl.errors.CheckpointWarning, match="converted to the dtypes of the model"):
        state = train(run, make(net().double()), allow=("dtype",))
    tensors = [*state.params.values(), *state.memory["ema"].values(), *(slots["exp_avg"] for slots in state.opt_state.values())]
    assert {t.dtype for t in tensors} == {torch.float64}


def test_seed(run: str) -> None:
    """That of the checkpoint goes on, for the order of the data follows from it, and this is said."""
    state = fl.TrainState.create(make(), seed=4)
    with pytest.warns(fl.errors.CheckpointWarning, match="has seed 3, .* but the given state has 4; 3 is used"):
        found = fl.fit(state, fl.Loaders(data(), data(8)), fl.FitConfig(max_steps=15, ema=0.5, dir=run, resume=True, progress=False))
    assert same(found, whole())


def test_every_row_of_the_table_has_its_test() -> None:
    """The page names nothing that is not tested, and nothing is tested that it does not name."""
    rows = re.findall(r"^\| .* \| `(test_\w+)` \|$", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(name for name in globals() if name.startswith("test_") and name not in OTHERS)


def test_differences_that_nobody_knows_are_refused(run: str) -> None:
    """A typing error is no permission."""
    with pytest.raises(fl.errors.ConfigError, match="allow=...\\) must be some of .*'optimizer', but got 'optimiser'"):
        train(run, allow="optimiser")
    with pytest.raises(fl.errors.ConfigError, match="only matters for a resumed run, but resume is False"):
        train(f"{run}-other", allow="optimizer", resume=False)
    with pytest.raises(fl.errors.CheckpointError, match=r"allow= takes some of .*, but got \['batch_size'\]"):
        fl.restore(run, fl.TrainState.create(make()), allow=("batch_size",))
    config = fl.FitConfig(max_steps=1, dir=run, resume=True, allow="dtype", rename={"a": "b"})
    assert fl.FitConfig.from_json(config.to_json()) == config
