"""Evaluation and prediction see every batch once, are exact, and leave everything as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fnlight.errors import ConfigError, LoaderError, StepError
from fnlight.gradients import grad
from fnlight.loop import evaluate, predict
from fnlight.metrics import Cat, Mean, Text
from fnlight.pipe import pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply, ema


def train_step(model, batch):
    return F.mse_loss(model(batch), batch)


def eval_step(model, batch):
    return {"loss": Mean(F.mse_loss(model(batch), batch, reduction="sum"), batch.numel()), "mean": train_step(model, batch)}


def created(eval_step=eval_step, predict_step=lambda model, batch: model(batch), model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    task = Task(model, train_step, eval_step, predict_step, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    return TrainState.create(task)


def rows(n=7):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(1))[:n]


def loader(n=7, batch_size=3, **options):
    return DataLoader(rows(n), batch_size=batch_size, **options)


def test_a_mean_is_exact_over_an_uneven_last_batch():
    """Mean(total, weight) over batches equals the value over all data at once; so does a plain mean over a batch, which counts with its samples."""
    state = created()
    found = evaluate(state, loader())
    module = state.module().eval()
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(train_step(module, rows())), rel=1e-6)
    assert found["mean"] == pytest.approx(found["loss"], rel=1e-6)


def test_evaluation_leaves_everything_as_it_was():
    """Weights, buffers, modes, gradients, grad mode and the global generators stay."""
    state = created()
    state.store.module[1].eval()
    modes = [m.training for m in state.store.module.modules()]
    before = {k: v.clone() for k, v in state.store.module.state_dict().items()}
    random = torch.default_generator.get_state()
    evaluate(state, loader(shuffle=True))
    assert [m.training for m in state.store.module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in state.store.module.state_dict().items())
    assert torch.equal(torch.default_generator.get_state(), random)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in state.store.params)


def test_everything_is_put_back_when_an_evaluation_fails():
    """An error in eval_step leaves modes, averaged weights and grad mode as they were."""

    def failing(model, batch):
        raise RuntimeError("no luck")

    state, _ = pipe(train_step, grad(), apply(), ema(0.5))(created(), rows())
    before = state.params["0.weight"].clone()
    with pytest.raises(RuntimeError, match="no luck"):
        evaluate(state, loader(), eval_step=failing, weights="ema")
    assert torch.equal(state.params["0.weight"], before)
    assert state.store.module.training
    assert torch.is_grad_enabled()


def test_an_evaluation_is_the_same_every_time():
    """Random numbers in eval_step are keyed by the seed and the batch."""

    def noisy(model, batch):
        return {"noise": torch.rand(())}

    state = created(noisy)
    first = evaluate(state, loader())
    torch.manual_seed(5)
    assert evaluate(state, loader()) == first


def test_named_loaders_name_the_metrics():
    """A mapping of loaders gives NAME/metric for each."""
    found = evaluate(created(), {"small": loader(3), "large": loader(9)})
    assert sorted(found) == ["large/loss", "large/mean", "small/loss", "small/mean"]


def test_a_limit_takes_the_first_batches():
    """A number counts batches, a fraction is one of them."""
    state = created()
    first = evaluate(state, loader(3))
    assert evaluate(state, loader(), limit=1) == first
    assert evaluate(state, loader(), limit=0.34) == first


def test_averaged_weights_are_used_when_asked():
    """weights="ema" evaluates the average, and puts the parameters back."""
    state = created(model=nn.Linear(3, 3))
    step = pipe(train_step, grad(), apply(), ema(0.5))
    for _ in range(3):
        state, _ = step(state, rows())
    raw, averaged = evaluate(state, loader()), evaluate(state, loader(), weights="ema")
    module = state.module()
    module.load_state_dict(state.memory["ema"])
    with torch.no_grad():
        assert averaged["loss"] == pytest.approx(float(train_step(module, rows())), rel=1e-6)
    assert raw != averaged
    assert evaluate(state, loader()) == raw
    assert torch.equal(next(predict(state, loader(), weights="ema")), module(rows()[:3]).detach())


def test_weights_that_do_not_exist_are_an_error_before_any_batch():
    """The error lists the averages that the state holds."""
    with pytest.raises(ConfigError, match=r"weights='ema' names averaged weights, but the state has none; train with fl.ema"):
        evaluate(created(), loader(), weights="ema")
    with pytest.raises(ConfigError, match=r"weights='ema' names averaged weights"):
        predict(created(), loader(), weights="ema")


def test_a_function_of_all_samples_is_exact():
    """Cat gives the function every sample, in order."""

    def ranks(model, batch):
        return {"spread": Cat(batch[:, 0], lambda x: x.max() - x.min())}

    x = rows()[:, 0]
    assert evaluate(created(ranks), loader())["spread"] == pytest.approx(float(x.max() - x.min()))


def test_media_are_left_out_of_what_evaluate_returns():
    """`evaluate` gives numbers; pictures and texts are for sinks."""
    assert evaluate(created(lambda m, b: {"n": Mean(1.0), "note": Text("hello")}), loader()) == {"n": 1.0}


@pytest.mark.parametrize(
    ("eval_step", "message"),
    [
        (lambda m, b: None, r"must return a dict of metrics, but returned NoneType, at batch 1"),
        (lambda m, b: {}, r"must return a dict of metrics, but returned an empty dict"),
        (lambda m, b: {"out": Cat(b)}, r"metric 'out' must come to one number, but Cat.compute\(\) gave Tensor\[7, 3\]"),
        (lambda m, b: {"out": b}, r"metric 'out' must be one number, but has shape \[3, 3\]"),
    ],
)
def test_an_eval_step_that_returns_something_else_is_told_what_to_return(eval_step, message):
    """Metrics must be a dict of numbers, monoids or media."""
    with pytest.raises(StepError, match=message):
        evaluate(created(eval_step), loader())


def test_names_that_change_between_batches_are_an_error():
    """Every batch must give the same metrics."""
    batches = [torch.zeros(2, 3), torch.ones(2, 3)]
    with pytest.raises(StepError, match=r"must have the same names at every step, \['a'\]; missing now: \['a'\], new: \['b'\]"):
        evaluate(created(lambda m, b: {"a" if b[0, 0] == 0 else "b": 1.0}), batches)


def test_a_missing_step_function_is_named():
    """The error shows how to give it."""
    with pytest.raises(
        ConfigError, match=r"this task has no eval_step; give it one, as in fl.Task\(model, train_step, eval_step=eval_step"
    ):
        evaluate(created(eval_step=None), loader())
    with pytest.raises(ConfigError, match="this task has no predict_step"):
        predict(created(predict_step=None), loader())
    with pytest.raises(ConfigError, match=r"predict takes one loader at a time, but got a mapping of \['a'\]"):
        predict(created(), {"a": loader()})


def test_metrics_have_names():
    """A name is text; something else is refused, not joined with what stands before it."""
    with pytest.raises(TypeError, match="the name of a metric must be a string, but got int: 1"):
        evaluate(created(lambda model, batch: {1: 0.5}), {"a": loader()})


def test_an_empty_loader_is_an_error():
    """A loader without a batch cannot be evaluated on."""
    with pytest.raises(LoaderError, match="empty|no batch"):
        evaluate(created(), [])


def test_a_dataset_of_tuples_is_evaluated_as_it_is():
    """Batches keep the structure that the loader gives them."""
    state = created(lambda m, b: {"n": Mean(len(b[1]), 1)})
    assert evaluate(state, DataLoader(TensorDataset(rows(), rows()), batch_size=7)) == {"n": 7.0}


class Cached(nn.Module):
    """A model that computes a table when it is first called and keeps it, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(3, 3), None

    def forward(self, x):
        self.table = torch.linspace(0, 1, 3) if self.table is None else self.table
        return self.layer(x) * self.table


def test_what_an_evaluation_has_cached_can_be_trained_on():
    """A table that a model made during an evaluation takes part in the next training step."""
    state = created(model=Cached())
    evaluate(state, [rows()])
    assert state.store.module.table is not None
    after, _ = pipe(train_step, grad(), apply())(state, rows())
    assert after.progress.step == 1


def test_a_step_in_inference_mode_is_evaluated_all_the_same():
    """Who wants inference mode decorates the step; the metrics are the same."""
    state = created()
    assert evaluate(state, [rows(), rows(3)], eval_step=torch.inference_mode()(eval_step)) == evaluate(state, [rows(), rows(3)])


class Writing(nn.Module):
    """A model whose forward writes to one buffer, replaces another and fills a third, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("first", None)

    def forward(self, x):
        self.mean.data.lerp_(x.mean(0), 0.5)
        self.count = self.count + 1
        if self.first is None:
            self.first = x[0].clone()
        return self.layer(x - self.mean)


@pytest.mark.parametrize("donate", [None, False, True])
def test_buffers_that_a_forward_writes_are_put_back(donate):
    """evaluate and predict keep the same promise: afterwards each buffer is the same tensor with the same values."""
    state = created(model=Writing())
    before = dict(state.store.module.named_buffers())
    if donate is None:
        evaluate(state, loader())
    else:
        list(predict(state, loader(), donate=donate))
    after = dict(state.store.module.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert after.keys() == before.keys()
    assert not any(tensor.any() for tensor in after.values())
    assert state.store.module.first is None


def test_buffers_are_kept_from_batch_to_batch_of_one_evaluation():
    """Outputs are those of a plain loop over a copy of the model, in evaluate and in predict."""
    state = created(model=Writing())
    module = state.module().eval()
    with torch.no_grad():
        expected = [module(batch) for batch in loader()]
    outputs: list[torch.Tensor] = []
    evaluate(state, loader(), eval_step=lambda m, b: outputs.append(m(b)) or {"n": 1.0})
    for found in (outputs, list(predict(state, loader()))):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Merging(nn.Linear):
    """An adapter that is merged into the weight in eval mode and taken out in train mode, both by an overridden `train`."""

    def __init__(self):
        super().__init__(3, 3)
        self.adapter, self.merged, self.calls = nn.Parameter(torch.full((3, 3), 0.1)), False, []

    def train(self, mode=True):
        self.calls.append(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.adapter.data
            self.merged = not mode
        return nn.Linear.train(self, mode)

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.adapter, self.bias)


@pytest.mark.parametrize("weights", [None, "ema"])
def test_a_train_method_of_the_model_is_called_on_the_way_in_and_back(weights):
    """An adapter is merged for an evaluation only, also into averaged weights, and afterwards every weight is bitwise what it was."""
    state = created(model=nn.Sequential(Merging()))
    state, _ = pipe(train_step, grad(), apply(), ema(0.5))(state, rows())
    inner, average = state.store.module[0], state.memory["ema"]
    inner.calls.clear()
    before = {name: t.clone() for name, t in (*state.params.items(), *((f"ema/{k}", t) for k, t in average.items()))}
    seen: list[bool] = []
    evaluate(state, loader(), weights=weights, eval_step=lambda m, b: seen.append(m[0].merged) or {"n": m(b).sum()})
    assert seen == [True] * 3
    assert (inner.calls, inner.merged) == ([False, True], False)
    after = {**state.params, **{f"ema/{k}": t for k, t in average.items()}}
    assert all(torch.equal(before[name], after[name]) for name in before)


class CachedInEval(nn.Module):
    """A model that keeps its weight from the first batch in eval mode on, until `train()` is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(3, 3), None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return nn.Module.train(self, mode)

    def forward(self, x):
        if not self.training and self.kept is None:
            self.kept = self.layer.weight.detach().clone()
        return F.linear(x, self.layer.weight if self.kept is None else self.kept, self.layer.bias)


def test_a_cache_that_train_clears_is_made_again_in_the_next_evaluation():
    """Every evaluation computes with the weights of its step."""
    state = created(model=CachedInEval())
    step = pipe(train_step, grad(), apply())
    for _ in range(2):
        state, _ = step(state, rows())
        found = evaluate(state, [rows()])["mean"]
        layer = state.store.module.layer
        assert found == pytest.approx(F.mse_loss(layer(rows()), rows()).item(), rel=1e-6)
