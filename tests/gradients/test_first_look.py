"""A step that does not train the model that it is given is an error at its first update; everything that does train is left in peace."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fnlight as fl
from fnlight.errors import StepError, TaskWarning

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
DATA = [(X[i : i + 4], X[i : i + 4].sum(1, keepdim=True)) for i in range(0, 16, 4)]


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def trained(model, train_step=mse, configure=sgd, **config):
    """The state after two epochs."""
    task = fl.Task(model, train_step, configure_optimizers=configure)
    return fl.fit(fl.TrainState.create(task), DATA, fl.FitConfig(max_epochs=2, progress=False, **config))


class Post(nn.Module):
    """A lambda that keeps `self`."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 1), nn.Parameter(torch.ones(1))
        self.post = lambda x: x * self.scale

    def forward(self, x):
        return self.post(self.layer(x))


class Hooked(nn.Module):
    """A hook that writes into `self`."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.features = nn.Linear(4, 4), nn.Linear(4, 1), {"layer": torch.zeros(4, 4)}
        self.layer.register_forward_hook(lambda module, args, out: self.features.update(layer=out))

    def forward(self, x):
        self.layer(x)
        return self.head(self.features["layer"])


@pytest.mark.parametrize("config", [{}, {"accumulate": 2}, {"microbatch": 2}, {"precision": "bf16"}, {"clip_norm": 1.0}], ids=str)
def test_a_step_that_trains_another_model_is_an_error(config):
    """The error names the step function and where it is, before anything is trained for nothing."""
    other = nn.Linear(4, 1)

    def my_step(model, batch):
        return mse(other, batch)

    with pytest.raises(
        StepError, match=r"loss of .*my_step \(.*test_first_look.py:\d+\) does not depend on the model.*shapes \[1, 4\], \[1\]"
    ):
        trained(nn.Linear(4, 1), my_step, **config)


@pytest.mark.parametrize("level", ["trace", "model"])
def test_a_compiled_step_that_trains_another_model_is_an_error(level):
    """The graph of a step is looked at when it is made."""
    other = nn.Linear(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(StepError, match=r"does not depend on the model that it is given"):
            trained(nn.Linear(4, 1), lambda model, batch: mse(other, batch), compile=level)


def test_a_loss_of_the_tasks_own_model_is_an_error_and_leaves_no_gradient():
    """The task's model is the one that is copied; it is left as it was."""
    model = nn.Linear(4, 1)
    with pytest.raises(StepError, match=r"computes with the task's own model.*gradients went to \['weight', 'bias'\] there"):
        trained(model, lambda _, batch: mse(model, batch))
    assert model.weight.grad is None


@pytest.mark.parametrize("config", [{}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize(("model", "name"), [(Post, "scale"), (Hooked, "features.layer")])
def test_functions_that_keep_the_task_model_are_an_error(model, name, config):
    """A copy of a model keeps the lambdas and hooks of the model that was copied: what they use would never be trained."""
    with pytest.raises(StepError, match=rf"computes with the task's own model.*\['{name}'\].*make it a method of the class"):
        trained(model(), **config)


def test_a_manual_step_that_trains_the_tasks_model_is_an_error():
    """Whoever calls backward() may take the wrong model, too."""
    model = nn.Linear(4, 1)

    def kernel(store, batches, key):
        loss = mse(model, batches[0])
        loss.backward()
        store.optims[""].optimizer.step()
        return {"loss": loss}

    with pytest.raises(StepError, match=r"kernel .* computes with the task's own model"):
        trained(model, fl.pipe(kernel, fl.manual()))


def test_a_phase_that_trains_nothing_is_an_error():
    """Every phase is looked at when it has its first turn."""
    other, model = nn.Linear(4, 1), nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    steps = {"a": lambda model, batch: mse(model["a"], batch), "b": lambda model, batch: mse(other, batch)}
    with pytest.raises(StepError, match=r"in the phase 'b'.*does not depend on the model"):
        trained(model, steps, lambda m: {name: sgd(m[name]) for name in "ab"})


def test_parameters_outside_of_the_model_are_warned_of_once():
    """A list of layers is no part of a model: its parameters get gradients, but no optimizer has them."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.more = nn.Linear(4, 4), [nn.Linear(4, 1)]

        def forward(self, x):
            return self.more[0](self.first(x))

    with pytest.warns(TaskWarning, match=r"gradients of 2 parameters outside of the model, of the shapes .*nn.ModuleList") as caught:
        trained(Listed())
    assert len(caught) == 1


def teacher_step(freeze):
    teacher = nn.Linear(4, 1)
    teacher.requires_grad_(not freeze)

    def train_step(model, batch):
        with torch.no_grad():
            wanted = teacher(batch[0])
        return F.mse_loss(model(batch[0]), wanted)

    return train_step


def physics(model, batch):
    """A loss with a derivative by its input."""
    x = batch[0].clone().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    return slope.square().mean() + mse(model, batch)


def reentrant(model, batch):
    return F.mse_loss(checkpoint(model, batch[0].clone().requires_grad_(), use_reentrant=True), batch[1])


class Parted(nn.Module):
    """A model of which a step uses only some parts, and some are frozen."""

    def __init__(self):
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1), nn.Linear(4, 1)
        self.tied = self.used

    def forward(self, x):
        return self.used(self.frozen(x))


@pytest.mark.parametrize(
    ("model", "step"),
    [
        (nn.Linear(4, 1), teacher_step(freeze=True)),
        (nn.Linear(4, 1), teacher_step(freeze=False)),
        (nn.Linear(4, 1), physics),
        (nn.Linear(4, 1), reentrant),
        (Parted(), mse),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 1)), mse),
    ],
)
@pytest.mark.parametrize("config", [{}, {"accumulate": 2}, {"ema": 0.9}], ids=str)
def test_what_trains_its_model_is_left_in_peace(model, step, config):
    """Teachers, inputs with gradients, recomputed and partly used models train without a word: warnings are errors here."""
    state = trained(model, step, **config)
    assert any(not torch.equal(p, before) for p, before in zip(state.params.values(), model.parameters(), strict=True))


def test_only_the_first_step_of_a_run_is_looked_at():
    """The look is gone after the first step, and a later run has one of its own."""
    task = fl.Task(nn.Linear(4, 1), mse, configure_optimizers=sgd)
    step = fl.pipe(mse, fl.grad(), fl.apply(), fl.stop_when(fl.max_epochs(1)))
    for _ in range(2):
        seen = ["first_look" in state.store.run.resources for state, _ in fl.run(step, fl.TrainState.create(task), DATA)]
        assert seen == [False] * 4
