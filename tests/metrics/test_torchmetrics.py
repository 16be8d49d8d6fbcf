"""Metrics of torchmetrics that an eval step updates and returns are merged exactly, fresh in every evaluation."""

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight.errors import StepError
from fnlight.metrics import read_torchmetrics, states_of

torchmetrics = pytest.importorskip("torchmetrics", reason='needs torchmetrics: pip install "fnlight[metrics]"')

X = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
Y = (torch.arange(22) * 7) % 3
DATA = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 22, 8)]  # the last one is smaller


def metrics():
    """Means, counts, lists of values and running statistics: every way in which torchmetrics merges."""
    return {
        "acc": torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro"),
        "auroc": torchmetrics.AUROC(task="multiclass", num_classes=3),
        "both": torchmetrics.MetricCollection(
            {
                "f1": torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro"),
                "precision": torchmetrics.Precision(task="multiclass", num_classes=3, average="macro"),
            }
        ),
        "pearson": torchmetrics.PearsonCorrCoef(),
        "largest": torchmetrics.MaxMetric(),
    }


def take(held, model, batch):
    """Update all of them on a batch."""
    logits = model(batch[0])
    for name in ("acc", "auroc", "both"):
        held[name].update(logits.softmax(-1), batch[1])
    held["pearson"].update(logits[:, 0], batch[1].float())
    held["largest"].update(logits[:, 0])


def created(held, model=None):
    torch.manual_seed(0)

    def eval_step(model, batch):
        take(held, model, batch)
        return {"loss": model(batch[0]).mean(), **held}

    return fl.TrainState.create(fl.Task(model or nn.Linear(3, 3), lambda model, batch: model(batch[0]).sum(), eval_step))


def expected(state):
    """What torchmetrics gives of all data at once."""
    held = metrics()
    with torch.no_grad():
        take(held, state.module(), (X, Y))
    found = {name: metric.compute() for name, metric in held.items()}
    both = found.pop("both")
    return {name: float(value) for name, value in found.items()} | {f"both/{name}": float(value) for name, value in both.items()}


def test_an_evaluation_reads_them_once_over_all_batches():
    """The values are those of torchmetrics on all data at once; plain numbers beside them are as ever."""
    state = created(metrics())
    found = fl.evaluate(state, DATA)
    assert found.pop("loss") == pytest.approx(float(state.module()(X).detach().mean()), abs=1e-6)
    assert found == pytest.approx(expected(state), abs=1e-6)


def test_every_evaluation_begins_afresh():
    """Neither what was there before nor an evaluation that failed half-way counts, and nothing is left in the objects."""
    held = metrics()
    state = created(held)
    take(held, state.module(), DATA[0])
    first = fl.evaluate(state, DATA)
    with pytest.raises(ValueError, match="mine"):
        fl.evaluate(state, [DATA[0], DATA[1], (X, torch.full((22,), 9))], eval_step=lambda m, b: _failing(held, m, b))
    assert fl.evaluate(state, DATA) == first
    assert held["acc"].update_count == 0


def _failing(held, model, batch):
    if batch[1].max() > 2:
        raise ValueError("mine")
    take(held, model, batch)
    return held


def test_metrics_of_several_ranks_are_those_of_one():
    """Each rank has its part of the batches; together they come to what one process has."""
    state, mine, other = created(metrics()), metrics(), metrics()
    with torch.no_grad():
        for i, batch in enumerate(DATA):
            take(other if i == 1 else mine, state.module(), batch)
    answers = [lambda states: [states, states_of(other), {}], lambda found: [found]]  # a third rank had no batch
    found = read_torchmetrics(mine, lambda given: answers.pop(0)(given))
    assert found == pytest.approx(expected(state), abs=1e-6)


def test_a_collection_may_be_all_that_an_eval_step_returns():
    """Its own names are then the names of the metrics."""
    collection = metrics()["both"]

    def eval_step(model, batch):
        collection.update(model(batch[0]), batch[1])
        return collection

    assert fl.evaluate(created({}), DATA, eval_step=eval_step).keys() == {"f1", "precision"}


@pytest.mark.parametrize(
    ("eval_step", "message"),
    [
        (lambda m, b: {"acc": metrics()["acc"]}, r"MulticlassAccuracy 'acc' without an update"),
        (lambda m, b: _each(torchmetrics.MeanMetric(), b), r"must update and return the same torchmetrics objects.*\['new'\].*at batch 2"),
        (
            lambda m, b: _each(CLASSES, m(b[0]), b[1]),
            r"metric 'new' must come to one number, but its compute\(\) gave a tensor of shape \[3\]",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(eval_step, message):
    """The error says which metric, and what to do."""
    with pytest.raises(StepError, match=message):
        fl.evaluate(created({}), DATA, eval_step=eval_step)


CLASSES = torchmetrics.Accuracy(task="multiclass", num_classes=3, average="none")


def _each(metric, *given):
    metric.update(*(given if metric is CLASSES else (given[0][0],)))
    return {"new": metric}


def test_in_a_train_step_they_are_refused():
    """Metrics of a step are read many times in a run; the error says where such objects are read."""
    held = metrics()["largest"]

    def train_step(model, batch):
        loss = model(batch[0]).mean()
        held.update(loss.detach())
        return loss, {"largest": held}

    task = fl.Task(nn.Linear(3, 3), train_step, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    with pytest.raises(StepError, match=r"metric 'largest' must be a number.*torchmetrics are read in eval_step only"):
        fl.fit(fl.TrainState.create(task), DATA, fl.FitConfig(max_steps=1, progress=False))
