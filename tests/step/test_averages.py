"""Averages of weights are what their formulas say, and what torch's own averages are."""

import copy

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from fnlight.checkpoint import load, save
from fnlight.errors import CheckpointError, ConfigError, MismatchError
from fnlight.gradients import grad
from fnlight.loop import evaluate, run, stop_when
from fnlight.pipe import pipe
from fnlight.protocols import Gradients
from fnlight.state import Task, TrainState
from fnlight.step import apply, average_checkpoints, averaged, ema, ema_warmup, refresh_batch_norm, swa
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from fnlight.triggers import epochs, max_epochs, steps


def loss_fn(model, batch):
    """A mean loss."""
    return F.mse_loss(model(batch), batch)


def created():
    torch.manual_seed(0)
    task = Task(nn.Linear(3, 3), loss_fn, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return TrainState.create(task, seed=0)


def data(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_ema_is_the_recurrence():
    """average = decay * average + (1 - decay) * params, from the initial parameters on."""
    state = created()
    step = pipe(loss_fn, grad(), apply(), ema(0.9))
    average = {name: p.clone() for name, p in state.params.items()}
    for i in range(3):
        state, _ = step(state, data(seed=i))
        average = {name: torch.lerp(value, state.params[name], 1 - 0.9) for name, value in average.items()}
    assert all(torch.equal(state.memory["ema"][name], value) for name, value in average.items())


def without_dropout():
    """A tiny net with BatchNorm, and nothing that draws."""
    tiny = tiny_task()
    return attrs.evolve(tiny, model=nn.Sequential(*(m for m in tiny.model if not isinstance(m, nn.Dropout))))


def finished(*combinators, num_epochs=3):
    """A state after some epochs, with the module of every step on the way."""
    task = without_dropout()
    step = pipe(task.train_step, grad(), apply(), *combinators, stop_when(max_epochs(num_epochs)))
    seen = [(state, state.module()) for state, _ in run(step, TrainState.create(task), tiny_batches())]
    return seen[-1][0], [module for _, module in seen]


def same_params(tree, module):
    named = dict(module.named_parameters())
    return tree.keys() == named.keys() and all(torch.allclose(value, named[name], rtol=1e-6, atol=1e-7) for name, value in tree.items())


def test_ema_is_that_of_torch():
    """`AveragedModel` with torch's own exponential average comes to the same weights."""
    state, modules = finished(ema(0.8))
    other = AveragedModel(copy.deepcopy(modules[0]), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    other.module.load_state_dict(TrainState.create(without_dropout()).module().state_dict())
    other.n_averaged.fill_(1)
    for module in modules:
        other.update_parameters(module)
    assert same_params(state.memory["ema"], other.module)


def test_ema_now_and_then_is_that_of_those_steps():
    """`every` leaves out the steps between, and a decay may be a function of completed steps."""
    decay = ema_warmup(0.9)
    state, modules = finished(ema(decay, every=steps(2)))
    average = {n: p.detach().clone() for n, p in TrainState.create(without_dropout()).params.items()}
    for number, module in enumerate(modules, 1):
        if number % 2 == 0:
            named = dict(module.named_parameters())
            average = {n: torch.lerp(value, named[n].detach(), 1 - decay(number)) for n, value in average.items()}
    assert_trees_equal(state.memory["ema"], average)


def test_the_warm_up_rises_to_its_decay():
    """(1 + n) / (10 + n), and never above the decay."""
    assert [ema_warmup(0.99)(n) for n in (0, 8, 10**6)] == [0.1, 0.5, 0.99]
    assert repr(ema_warmup(0.9, 20)) == "ema_warmup(0.9, 20)"


def test_swa_is_that_of_torch():
    """The mean of the ends of epochs from the start on, and, measured anew, its statistics of BatchNorm are those of `update_bn`."""
    state, modules = finished(swa(start=2), num_epochs=5)
    other = AveragedModel(copy.deepcopy(modules[0]))
    for module in modules[5::3]:  # three batches an epoch: the ends of the second and every later epoch
        other.update_parameters(module)
    assert state.memory["swa"]["count"] == 4
    assert same_params(state.memory["swa"]["weights"], other.module)
    before = {n: b.clone() for n, b in state.buffers.items()}
    refreshed = refresh_batch_norm(state, tiny_batches(), weights="swa")
    update_bn([x for x, _ in tiny_batches()], other)
    expected = dict(other.module.named_buffers())
    for name, value in averaged(refreshed, "swa").buffers.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert_trees_equal(dict(refreshed.buffers), before)
    assert_trees_equal(dict(state.buffers), before)
    other.eval()
    found = evaluate(refreshed, tiny_batches(seed=1), weights="swa")["loss"]
    by_hand = sum(F.cross_entropy(other(x), y, reduction="sum").item() for x, y in tiny_batches(seed=1)) / 18
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_statistics_are_measured_for_the_weights_themselves_too():
    """Without an average the state's own buffers are those of `update_bn`, and training modes and momenta stay."""
    state, modules = finished()
    other = copy.deepcopy(modules[-1])
    update_bn([x for x, _ in tiny_batches()], other)
    refreshed = refresh_batch_norm(state, tiny_batches())
    assert_trees_equal(dict(refreshed.buffers), dict(other.named_buffers()))
    norm = refreshed.module()[1]
    assert (norm.training, norm.momentum) == (True, 0.1)


def test_an_average_goes_on_behind_a_refresh():
    """Statistics that lie beside an average do not disturb it when training goes on, from a file too."""
    for combinator, name in ((ema(0.5), "ema"), (swa(start=1, every=epochs(1)), "swa")):
        state, _ = finished(combinator)
        refreshed = refresh_batch_norm(state, tiny_batches(), weights=name)
        step = pipe(state.task.train_step, grad(), apply(), combinator, stop_when(max_epochs(4)))
        plain, further = (list(run(step, s, tiny_batches()))[-1][0] for s in (state, refreshed))
        tree, other = ((s.memory[name]["weights"] if name == "swa" else s.memory[name]) for s in (plain, further))
        assert len(other) == len(tree) + 3
        assert_trees_equal({n: other[n] for n in tree}, dict(tree))


def test_a_mean_that_has_not_begun_is_the_parameters_themselves():
    """Before the first count, `weights="swa"` evaluates the parameters."""
    state, _ = finished(swa(start=9))
    assert evaluate(state, tiny_batches(), weights="swa") == evaluate(state, tiny_batches())


def test_the_mean_of_checkpoints_is_that_of_their_weights(tmp_path):
    """From a list or the last of a run's directory; parameters and statistics are means, and the state is otherwise what it was."""
    state, modules = finished()
    paths = []
    for i, module in enumerate(modules[-4:]):
        each = state.copy()
        each.store.module.load_state_dict(module.state_dict())
        paths.append(save(each, tmp_path / "checkpoints" / f"step-{i:08d}"))
    for mean in (average_checkpoints(state, paths[1:]), average_checkpoints(state, tmp_path, last=3)):
        for name, value in {**mean.params, **mean.buffers}.items():
            parts = [module.state_dict()[name].double() for module in modules[-3:]]
            expected = parts[-1] if name.endswith("tracked") else sum(parts) / 3
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert mean.progress == state.progress
        assert_trees_equal(mean.opt_state, state.opt_state)
    with pytest.raises(CheckpointError, match=r"last=9\) found 4 checkpoints"):
        average_checkpoints(state, tmp_path, last=9)
    with pytest.raises(MismatchError, match="weights do not match the model"):
        average_checkpoints(TrainState.create(tiny_task("convnet")), paths)


def test_both_weights_are_in_a_checkpoint(tmp_path):
    """A state that is loaded can be evaluated with its parameters and with their average."""
    state, _ = finished(ema(0.9))
    loaded = load(save(state, tmp_path / "a"), state.task)
    for weights in (None, "ema"):
        assert evaluate(loaded, tiny_batches(), weights=weights) == evaluate(state, tiny_batches(), weights=weights)
    assert_trees_equal(dict(averaged(loaded).params), dict(state.memory["ema"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema(1.0), r"ema must be a decay of at least 0 and below 1, but got 1.0"),
        (lambda: ema_warmup(1), r"ema_warmup must be a decay"),
        (lambda: ema_warmup(0.9, 0), r"offset must be a number of at least 1, but got 0"),
        (lambda: swa(start=-1), r"swa\(start=...\) must be completed epochs"),
        (lambda: refresh_batch_norm(created(), [data()]), r"found no BatchNorm layer in training mode"),
        (lambda: average_checkpoints(created(), [], last=0), r"must be a whole number of at least 1, or None for all, but got 0"),
        (lambda: averaged(created()), r"weights='ema' names averaged weights"),
    ],
)
def test_an_average_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()


class Kinds(nn.Module):
    """Parameters of every kind of number, and one that is shared under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.plain.weight
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.brain = nn.Parameter(torch.full((3,), 256.0, dtype=torch.bfloat16))
        self.short = nn.Parameter(torch.randn(3).half())
        self.tiny = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("wavy", torch.randn(3, dtype=torch.complex64))

    def forward(self, x):
        out = self.tied(self.plain(x)) * (self.wave + self.wavy).abs() + self.wide.float() + self.short.float() + self.tiny.float()
        return out + self.brain.float() * 0.01


def of_kinds():
    task = Task(
        Kinds(), loss_fn, configure_optimizers=lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    )
    return TrainState.create(task)


def by_hand(history, decay):
    """The average of each parameter, in float64."""
    average = {name: p.clone() for name, p in history[0].items()}
    for params in history[1:]:
        average = {name: decay * average[name] + (1 - decay) * p for name, p in params.items()}
    return average


def exact(state):
    return {name: p.clone().to(torch.complex128 if p.is_complex() else torch.float64) for name, p in state.params.items()}


@pytest.mark.parametrize("every", [steps(1), steps(2)], ids=str)
def test_an_average_covers_parameters_of_every_kind(every, tmp_path):
    """Complex, half, bf16, float8 and shared parameters are averaged as a plain loop does in float64, and come back in their own dtype."""
    step = pipe(loss_fn, grad(), apply(), ema(0.9, every=every))
    start = of_kinds()
    history, data = [exact(start)], [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    state = start
    for taken, (state, _) in enumerate(run(step, start, data), 1):
        if taken % (2 if every == steps(2) else 1) == 0:
            history.append(exact(state))
        if taken == 8:
            break
    expected = by_hand(history, 0.9)
    assert state.memory["ema"].keys() == expected.keys()
    for name, value in state.memory["ema"].items():
        assert value.dtype == {"wave": torch.complex64, "wide": torch.float64}.get(name, torch.float32)
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-5, atol=1e-6)
    used = averaged(load(save(state, tmp_path / "a"), state.task))
    for name, p in used.params.items():
        assert p.dtype == state.params[name].dtype
        torch.testing.assert_close(p.to(expected[name].dtype), expected[name].to(p.dtype).to(expected[name].dtype), rtol=1e-2, atol=1e-2)
    before = {name: p.clone() for name, p in state.params.items()}
    found = evaluate(state, data, eval_step=lambda m, b: {"loss": loss_fn(m, b)}, weights="ema")
    assert found == pytest.approx(evaluate(used, data, eval_step=lambda m, b: {"loss": loss_fn(m, b)}))
    assert all(torch.equal(p.float(), before[n].float()) if p.itemsize < 4 else torch.equal(p, before[n]) for n, p in state.params.items())
    assert all(p.dtype == before[n].dtype for n, p in state.params.items())


def test_the_average_of_a_bf16_parameter_moves():
    """With bf16's eight bits a step of a thousandth of the way would be rounded away for ever; the average is kept in float32."""
    state = of_kinds()
    tree = ema(0.999).init(state.store)
    with torch.no_grad():
        state.store.module.brain.fill_(260.0)
    state.store.memory["ema"] = tree
    step = ema(0.999).wrap(apply()(lambda store, batches, key: _no_gradients(store)))
    state, _ = step(state, torch.zeros(1, 3))
    assert state.memory["ema"]["brain"].tolist() == pytest.approx([256.004] * 3, abs=1e-4)


def _no_gradients(store):
    return Gradients([None] * len(store.params), torch.zeros(()), 1.0, {})


def test_a_mean_over_epochs_and_a_soup_cover_complex_parameters(tmp_path):
    """swa and average_checkpoints leave no parameter as it happens to be."""
    step = pipe(loss_fn, grad(), apply(), swa(start=1), stop_when(max_epochs(3)))
    paths, seen = [], []
    for state, _ in run(step, of_kinds(), [torch.ones(4, 3), torch.zeros(4, 3)]):
        if state.progress.batch == 0:
            paths.append(save(state, tmp_path / str(state.progress.step)))
            seen.append(exact(state))
    mean = {name: sum(each[name] for each in seen) / 3 for name in seen[0]}
    for name, value in state.memory["swa"]["weights"].items():
        torch.testing.assert_close(value, mean[name].to(value.dtype), rtol=1e-5, atol=1e-6)
    soup = average_checkpoints(of_kinds(), [str(p) for p in paths])
    for name, p in soup.params.items():
        torch.testing.assert_close(p.to(mean[name].dtype), mean[name].to(p.dtype).to(mean[name].dtype), rtol=0, atol=1e-6)
    assert soup.store.module.tied.weight is soup.store.module.plain.weight
