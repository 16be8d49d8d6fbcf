"""Sparse gradients: every stage does with them what it does with dense ones, or refuses them by name."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.errors import StepError

X = torch.randint(0, 10, (28, 5), generator=torch.Generator().manual_seed(0))
Y = X.float().mean(1, keepdim=True)
DATA = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 28, 8)]  # rows come more than once in a batch, and some in none


class Table(nn.Module):
    """An embedding, whose gradient is sparse or dense."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def created(sparse, configure=sgd):
    return fl.TrainState.create(fl.Task(Table(sparse), mse, configure_optimizers=configure))


def trained(sparse, *stages, configure=sgd, data=DATA):
    """The state after an epoch, and the metrics of its steps."""
    step = fl.pipe(mse, fl.grad(), *stages, fl.stop_when(fl.max_epochs(1)))
    found = list(fl.run(step, created(sparse, configure), data))
    return found[-1][0], [metrics for _, metrics in found]


STAGES = {
    "none": [],
    "accumulate": [fl.accumulate(2)],
    "microbatch": [fl.microbatch(3)],
    "clip_norm": [fl.clip_norm(0.3)],
    "clip_value": [fl.clip_value(0.05)],
    "clip_each": [fl.clip_each(0.2)],
    "clip_quantile": [fl.clip_quantile(0.5)],
    "skip_nonfinite": [fl.skip_nonfinite(), fl.clip_norm(0.3)],
    "accumulated and clipped": [fl.accumulate(2), fl.clip_norm(0.3)],
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_gradient_trains_as_the_dense_one_does(stages):
    """Repeated rows count as their sum, in norms and limits too."""
    (sparse, seen), (dense, expected) = (trained(kind, *stages, fl.apply(), fl.ema(0.9)) for kind in (True, False))
    for name, p in dense.params.items():
        torch.testing.assert_close(sparse.params[name], p)
        torch.testing.assert_close(sparse.memory["ema"][name], dense.memory["ema"][name])
    assert [float(m.get("grad_norm", 0.0)) for m in seen] == pytest.approx([float(m.get("grad_norm", 0.0)) for m in expected])


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_clipped_sparse_gradient_gives_a_plain_loop_bitwise(clip):
    """The loop that a PyTorch user writes, with the norm of the coalesced gradient."""
    model = Table(sparse=True)
    optimizer = sgd(model)
    for batch in DATA:
        optimizer.zero_grad()
        mse(model, batch).backward()
        if clip is not None:
            grad = model.table.weight.grad = model.table.weight.grad.coalesce()
            held = [grad._values(), *(p.grad for p in model.head.parameters())]
            norm = torch.nn.utils.get_total_norm(held)
            torch._foreach_mul_(held, torch.clamp(clip / (norm + 1e-6), max=1.0))
        optimizer.step()
    state, _ = trained(True, *([] if clip is None else [fl.clip_norm(clip)]), fl.apply())
    assert all(torch.equal(state.params[name], p) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_run_with_sparse_gradients_resumes_bitwise(tmp_path):
    """The optimizer's state and the averages of rows are saved like all others."""

    def configure(model):
        return {"rows": torch.optim.SparseAdam(model.table.parameters(), lr=0.1), "rest": torch.optim.Adam(model.head.parameters(), lr=0.1)}

    def adagrad(model):
        return torch.optim.Adagrad(model.parameters(), lr=0.1)

    step = fl.pipe(mse, fl.grad(), fl.accumulate(2), fl.clip_norm(0.3), fl.apply(), fl.ema(0.9))
    whole = [state.copy() for state, _ in islice(fl.run(step, created(True, adagrad), DATA), 4)]
    loaded = fl.load(fl.save(whole[1], tmp_path / "a"), whole[1].task)
    rest = [state.copy() for state, _ in islice(fl.run(step, loaded, DATA), 2)]
    fl.testing.assert_trees_equal(dict(rest[-1].params), dict(whole[-1].params))
    fl.testing.assert_trees_equal(rest[-1].memory["ema"], whole[-1].memory["ema"])
    phases = fl.Task(Table(sparse=True), {"rows": mse, "rest": mse}, configure_optimizers=configure)
    state = fl.fit(fl.TrainState.create(phases), DATA, fl.FitConfig(max_epochs=1, progress=False, clip_norm=0.3))
    assert state.progress.updates == {"rows": 4, "rest": 4}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (fl.clip_adaptive(0.1), r"clip_adaptive compares the rows.*gradients of table.weight are sparse.*clip_norm or clip_each"),
        (fl.grad_noise(0.1), r"grad_noise adds noise to every entry.*gradients of table.weight are sparse"),
    ],
)
def test_what_needs_every_entry_refuses_sparse_gradients_by_name(stage, message):
    """A stage that would make them dense, or compare them with dense weights, says so."""
    with pytest.raises(StepError, match=message):
        trained(True, stage, fl.apply())


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to_sparse_csr()], ids=["COO", "CSR"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_parameter_is_refused_by_name(make):
    """torch can neither copy nor save it as a parameter; a dense one gives CSR products whose gradients are dense."""
    model = nn.Linear(3, 3)
    model.table = nn.Parameter(make(torch.eye(3)))
    with pytest.raises(TypeError, match=r"the parameters \['table'\] are sparse.*weight.to_sparse_csr\(\)"):
        fl.TrainState.create(fl.Task(model, mse, configure_optimizers=sgd))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_product_with_a_csr_matrix_trains():
    """A dense parameter that is made CSR in the forward pass has a dense gradient, which is clipped as any other."""

    def train_step(model, batch):
        return torch.sparse.mm(model.weight.to_sparse_csr(), batch).square().mean()

    task = fl.Task(nn.Linear(3, 3, bias=False), train_step, configure_optimizers=sgd)
    before = fl.TrainState.create(task)
    step = fl.pipe(train_step, fl.grad(), fl.clip_norm(1.0), fl.apply())
    after, _ = fl.pure(step)(before, torch.ones(3, 2))
    assert not torch.equal(after.params["weight"], before.params["weight"])
