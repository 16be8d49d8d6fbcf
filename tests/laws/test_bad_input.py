"""Bad input gets a clear error before any work, and nothing is lost: state, module, generators and checkpoints are as they were."""

import errno
import os
import warnings
from contextlib import contextmanager

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fnlight import (
    CheckpointError,
    ConfigError,
    DonatedStateError,
    FitConfig,
    LoaderError,
    Loaders,
    Mean,
    MismatchError,
    MonitorError,
    NonFiniteError,
    Optim,
    OptimizerError,
    OptimizerWarning,
    SeamError,
    StepError,
    Task,
    TrainState,
    apply,
    best,
    ema,
    evaluate,
    evaluate_every,
    fit,
    grad,
    load,
    log_to,
    max_epochs,
    max_steps,
    patience,
    pipe,
    plateau,
    reached,
    restore,
    run,
    save,
    steps,
    stop_when,
    verify,
)
from fnlight.errors import TaskCheckError
from fnlight.testing import RecordingSink, assert_trees_equal, check_task, tiny_batches, tiny_task
from fnlight.testing.compare import next_numbers, snapshot

QUIET = {"device": "cpu", "progress": False}


@contextmanager
def nothing_is_lost(state, dir=None):
    """What the caller holds, and every file of a run, is bitwise the same afterwards; the state still trains."""
    kept, drawn = snapshot([state, state.task.model]), next_numbers()
    files = {path: path.read_bytes() for path in sorted(dir.rglob("*")) if path.is_file()} if dir else {}
    yield
    assert_trees_equal(kept, [state, state.task.model])
    assert next_numbers() == drawn
    assert {path: path.read_bytes() for path in files} == files
    if dir:
        assert {path for path in dir.rglob("*") if path.is_file()} == set(files)
    task = attrs.evolve(state, task=tiny_task()) if state.store.optim.monitor is None else None
    assert (
        task is None
        or fit(task, tiny_batches(), FitConfig(max_steps=state.progress.step + 1, **QUIET)).progress.step == state.progress.step + 1
    )


def trained(**given):
    """A state that has come some way, of a task that may be given other functions from here on."""
    state = fit(TrainState.create(tiny_task()), Loaders(train=tiny_batches(), val=tiny_batches()), FitConfig(max_steps=4, **QUIET))
    return attrs.evolve(state, task=attrs.evolve(state.task, **given))


def counted(train_step=None):
    """A train_step, and how often it was called."""
    calls = []

    def train_step_of_the_user(model, batch):
        calls.append(1)
        return (train_step or tiny_task().train_step)(model, batch)

    return train_step_of_the_user, calls


def plain_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


BAD_LOSSES = {
    "none": (lambda model, batch: None, r"train_step returned no loss: it must return a scalar tensor.*is a `return` missing\?"),
    "a number": (lambda model, batch: 0.5, r"must return a scalar tensor as the loss, but returned float: 0\.5"),
    "a vector": (lambda model, batch: model(batch[0]).mean(1), r"scalar loss of shape \[\], but its shape is \[6\]; reduce it"),
    "detached": (lambda model, batch: plain_loss(model, batch).detach(), r"a loss without a graph: no gradient can flow"),
    "whole numbers": (lambda model, batch: plain_loss(model, batch).long(), r"real floating-point numbers, but its dtype is torch.int64"),
    "under no_grad": (torch.no_grad()(plain_loss), r"a loss without a graph"),
    "a dict": (lambda model, batch: {"loss": plain_loss(model, batch)}, r"as the loss, but returned dict"),
    "three things": (lambda model, batch: (plain_loss(model, batch), {}, 3), r"a tuple of Tensor, dict, int"),
    "metrics that are no dict": (lambda model, batch: (plain_loss(model, batch), 0.5), r"a tuple of Tensor, float"),
    "a metric called loss": (lambda model, batch: (plain_loss(model, batch), {"loss": 1.0}), r"a metric called 'loss'"),
    "a metric of several numbers": (
        lambda model, batch: (plain_loss(model, batch), {"x": batch[0]}),
        r"metric 'x' must be one number, but has shape",
    ),
    "a mean without a graph": (lambda model, batch: Mean(torch.ones(()), 3), r"a loss without a graph"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_step_that_returns_no_proper_loss(kind, tmp_path):
    """The message says what was returned and what to return; the state that was given is untouched, and no checkpoint is written."""
    train_step, match = BAD_LOSSES[kind]
    state = trained(train_step=train_step)
    with nothing_is_lost(state, tmp_path), pytest.raises(StepError, match=match):
        fit(state, tiny_batches(), FitConfig(max_epochs=9, **QUIET))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(value, tmp_path):
    """The first such step is named, and the newest checkpoint is from before it."""
    train_step, calls = counted()

    def breaking(model, batch):
        loss, metrics = train_step(model, batch)
        return loss * (value if len(calls) == 5 else 1.0), metrics

    state = trained(train_step=breaking)
    config = FitConfig(max_epochs=9, dir=tmp_path / "run", save_every=steps(2), **QUIET)
    with (
        nothing_is_lost(state),
        pytest.raises(
            NonFiniteError,
            match=r"the loss was NaN or infinite at step 9 \(in epoch 2, up to its batch 3; noticed at step 9\); by now.*clip_norm",
        ),
    ):
        fit(state, tiny_batches(), config)
    resumed = load(tmp_path / "run", tiny_task())
    assert resumed.progress.step == 8
    assert all(bool(torch.isfinite(p).all()) for p in resumed.params.values())


def test_metrics_whose_names_change(tmp_path):
    """The step, the missing and the new names are told."""
    train_step, calls = counted()

    def changing(model, batch):
        loss, metrics = train_step(model, batch)
        return loss, metrics if len(calls) < 3 else {"f1": metrics["acc"]}

    state = trained(train_step=changing)
    with (
        nothing_is_lost(state),
        pytest.raises(StepError, match=r"step 7: .*\['acc', 'loss'\]; missing now: \['acc'\], new: \['f1'\].*Mean\(0\.0, 0\)"),
    ):
        fit(state, tiny_batches(), FitConfig(max_epochs=9, **QUIET))


@pytest.mark.parametrize(
    "given",
    [
        {"stop": patience("val/f1", 3)},
        {"stop": max_steps(9) | reached("val/f1", 0.9)},
        {"keep": best("val/f1", 2)},
    ],
    ids=str,
)
def test_a_monitor_that_no_evaluation_yields(given, tmp_path):
    """Rules and retentions that watch a name that does not exist are refused before the first step, with the names that do exist."""
    train_step, calls = counted()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=train_step))
    config = FitConfig(max_epochs=3, **({"dir": tmp_path / "run"} if "keep" in given else {}), **given, **QUIET)
    match = r"'val/f1' is monitored, but no evaluation yields it; there are \['val/acc', 'val/loss'\]"
    with nothing_is_lost(state, tmp_path), pytest.raises(MonitorError, match=match):
        fit(state, Loaders(train=tiny_batches(), val=tiny_batches()), config)
    assert not calls


def test_a_plateau_that_watches_what_does_not_exist():
    """The same holds for a schedule."""
    train_step, calls = counted()
    task = attrs.evolve(
        tiny_task(),
        train_step=train_step,
        configure_optimizers=lambda m: Optim(torch.optim.SGD(m.parameters(), lr=0.1), plateau(), monitor="val/f1"),
    )
    state = TrainState.create(task)
    with nothing_is_lost(state), pytest.raises(MonitorError, match=r"'val/f1' is monitored, .*\['val/acc', 'val/loss'\]"):
        fit(state, Loaders(train=tiny_batches(), val=tiny_batches()), FitConfig(max_epochs=3, **QUIET))
    assert not calls


@pytest.mark.parametrize(
    "loaders, stop, match",
    [
        (
            Loaders(train=tiny_batches()),
            patience("val/loss", 3),
            r"monitors 'val/loss', but nothing in this pipe yields it, so it could never fire",
        ),
        (
            Loaders(train=tiny_batches(), val=tiny_batches()),
            patience("test/loss", 3),
            r"monitors 'test/loss', but nothing .* \['val/\.\.\.', 'train/\.\.\.'\]",
        ),
    ],
)
def test_a_rule_that_can_never_fire(loaders, stop, match):
    """A rule about data that nobody evaluates on is refused before the first step."""
    train_step, calls = counted()
    state = trained(train_step=train_step)
    state = attrs.evolve(state, history=type(state.history)())
    with nothing_is_lost(state), pytest.raises(MonitorError, match=match):
        fit(state, loaders, FitConfig(max_epochs=9, stop=stop, **QUIET))
    assert not calls


def test_a_rule_whose_evaluation_comes_too_late():
    """A rule that watches an evaluation beyond the end of the run could never fire either."""
    train_step, calls = counted()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=train_step))
    config = FitConfig(max_steps=10, stop=patience("val/loss", 3), eval_every=steps(100), **QUIET)
    with (
        nothing_is_lost(state),
        pytest.raises(ConfigError, match=r"the first evaluation would be after 100 steps .* ends after 10: it could never fire"),
    ):
        fit(state, Loaders(train=tiny_batches(), val=tiny_batches()), config)
    assert not calls


def test_an_optimizer_that_misses_parameters():
    """A trainable parameter that no optimizer holds is warned of by name, and the rest trains."""
    task = attrs.evolve(tiny_task(), configure_optimizers=lambda model: torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.warns(
        OptimizerWarning, match=r"SGD holds no 1\.weight, 1\.bias, 4\.weight, 4\.bias, which require gradients but will never change"
    ):
        state = TrainState.create(task)
    with nothing_is_lost(state):
        after = fit(state, tiny_batches(), FitConfig(max_steps=2, **QUIET))
    assert not torch.equal(after.params["0.weight"], state.params["0.weight"])
    assert torch.equal(after.params["4.weight"], state.params["4.weight"])


def stepping(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def initialising(model):
    nn.init.zeros_(model[0].weight)
    return torch.optim.SGD(model.parameters(), lr=0.1)


OTHER = tiny_task(seed=1).model

BAD_OPTIMIZERS = {
    "of another model": (
        lambda model: torch.optim.SGD(OTHER.parameters(), lr=0.1),
        r"must use the parameters of the model it is given, but SGD holds 6 of another",
    ),
    "of both models": (
        lambda model: torch.optim.SGD([*model.parameters(), OTHER[0].weight], lr=0.1),
        r"SGD holds 1 of another one \(shapes \[\[8, 4\]\]\)",
    ),
    "that stepped": (stepping, r"configure_optimizers must only build an optimizer, but it changed \['0\.weight'"),
    "that initialised": (initialising, r"but it changed \['0\.weight'\]; do not step or initialise there"),
    "none": (lambda model: None, r"must return an optimizer or Optim, but returned None; trainable: 0\.weight"),
    "a dict": (
        lambda model: {"optimizer": 1},
        r"must return a torch\.optim\.Optimizer or fl\.Optim\(optimizer, schedule\), but returned a dict of \['optimizer'\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_OPTIMIZERS)
def test_an_optimizer_that_does_not_fit(kind):
    """Foreign parameters, steps and initialisation in `configure_optimizers`, and things that are no optimizer, are refused at once."""
    configure, match = BAD_OPTIMIZERS[kind]
    task = attrs.evolve(tiny_task(), configure_optimizers=configure)
    kept, drawn = snapshot([task.model, OTHER]), next_numbers()
    with pytest.raises(OptimizerError, match=match):
        TrainState.create(task)
    assert_trees_equal(kept, [task.model, OTHER])
    assert next_numbers() == drawn


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        yield from zip(*tiny_batches(num_batches=1)[0], strict=True)


def dataset(count):
    x, y = tiny_batches(num_batches=1, batch_size=max(count, 1))[0]
    return TensorDataset(x[:count], y[:count])


@pytest.mark.parametrize(
    "loader, match",
    [
        (list, r"list .*no batch"),
        (lambda: DataLoader(dataset(0)), r"DataLoader .*0 samples"),
        (lambda: DataLoader(dataset(3), batch_size=4, drop_last=True), r"3 samples do not fill one of batch_size=4 and drop_last is True"),
    ],
)
@pytest.mark.parametrize("use", ["train", "val"])
def test_an_empty_loader(loader, match, use, tmp_path):
    """A loader that has no batch is refused before the first step, with the likely reason."""
    train_step, calls = counted()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=train_step))
    given = Loaders(**{"train": tiny_batches(), "val": tiny_batches(), use: loader()})
    with nothing_is_lost(state, tmp_path), pytest.raises(LoaderError, match=match):
        fit(state, given, FitConfig(max_epochs=1, **QUIET))
    assert not calls


def test_an_iterator_that_is_used_up(tmp_path):
    """What can be gone over only once is found to be empty in the second epoch; the checkpoint of the first one stands."""
    state, used = TrainState.create(tiny_task()), iter(tiny_batches())
    with (
        nothing_is_lost(state),
        pytest.raises(LoaderError, match=r"no batch in epoch 1: it is an iterator, which can be gone over only once"),
    ):
        fit(state, used, FitConfig(max_epochs=2, dir=tmp_path / "run", **QUIET))
    assert load(tmp_path / "run", state.task).progress.epoch == 1


def test_an_iterator_for_an_evaluation_that_is_tried_first(tmp_path):
    """A batch that was tried would be missing in the evaluation, which nobody would notice."""
    for val in (iter(tiny_batches()), {"a": tiny_batches(), "b": iter(tiny_batches())}):
        state = TrainState.create(tiny_task())
        with (
            nothing_is_lost(state, tmp_path),
            pytest.raises(LoaderError, match=r"the loader '(val|b)' is an iterator .* tried before the first step"),
        ):
            fit(state, Loaders(train=tiny_batches(), val=val), FitConfig(max_epochs=1, sanity_batches=1, **QUIET))


@pytest.mark.parametrize("given", [{"limit_train": 0.5}, {"limit_eval": 0.5}], ids=str)
def test_a_fraction_of_something_without_a_length(given):
    """A fraction limit on an unsized loader is refused before the first step."""
    train_step, calls = counted()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=train_step))
    stream = DataLoader(Stream(), batch_size=3)
    with (
        nothing_is_lost(state),
        pytest.raises(LoaderError, match=r"limit=0\.5 is a fraction, but this DataLoader has no length.*give a number of batches"),
    ):
        fit(state, Loaders(train=stream, val=stream), FitConfig(max_epochs=1, **given, **QUIET))
    assert not calls


@pytest.mark.parametrize(
    "combinators, match",
    [
        ((grad(), apply(), ema(0.9), ema(0.99)), r"two combinators of one name, ema\(0\.9\) and ema\(0\.99\)"),
        ((grad(), apply(), evaluate_every([1]), evaluate_every([2])), r"two combinators of one name, evaluate_every"),
        ((grad(), apply(), log_to(print), log_to(print)), r"two combinators of one name, log_to.*give one its own name="),
        ((grad(), apply(), stop_when(max_steps(1)), stop_when(max_epochs(1))), r"two combinators of one name, stop_when"),
    ],
)
def test_two_combinators_of_one_name(combinators, match):
    """A pipe that could not tell two memories apart is refused when it is made."""
    with pytest.raises(SeamError, match=match):
        pipe(tiny_task().train_step, *combinators)


def test_a_state_of_another_task(tmp_path):
    """Every name and shape that differs is listed; neither the state nor the checkpoint is touched."""
    state = trained()
    path = save(state, tmp_path / "state")
    other = TrainState.create(Task(nn.Linear(4, 5), plain_loss, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))
    wider = tiny_task()
    wider.model[4] = nn.Linear(8, 7)
    with nothing_is_lost(state, tmp_path):
        with pytest.raises(MismatchError, match=r"(?s)another model.*0\.weight.*weight.*allow=\(.model"):
            load(path, other.task)
        with pytest.raises(MismatchError, match=r"(?s)4\.weight.*\[3, 8\].*\[7, 8\]"):
            load(path, wider)
        with pytest.raises(MismatchError, match=r"another model"):
            restore(path, like=other)
    assert other.progress.step == 0


def test_fit_does_not_go_on_from_a_run_of_another_task(tmp_path):
    """`resume=True` with another model in the directory fails before any work, and the run that was there can still go on."""
    config = FitConfig(max_epochs=2, dir=tmp_path / "run", resume=True, **QUIET)
    state = fit(TrainState.create(tiny_task()), tiny_batches(), config)
    other = TrainState.create(tiny_task("tokens"))
    with nothing_is_lost(state, tmp_path), pytest.raises(MismatchError, match=r"(?s)another model.*embed\.weight"):
        fit(other, tiny_batches("tokens"), config)
    assert fit(TrainState.create(tiny_task()), tiny_batches(), attrs.evolve(config, max_epochs=3)).progress.epoch == 3


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path):
    """Without `resume` a directory with a run in it is refused, and the run stays as it was."""
    config = FitConfig(max_epochs=1, dir=tmp_path / "run", **QUIET)
    state = fit(TrainState.create(tiny_task()), tiny_batches(), config)
    with nothing_is_lost(state, tmp_path), pytest.raises(ConfigError, match=r"holds a run already, up to step-00000003; .*resume=True"):
        fit(TrainState.create(tiny_task()), tiny_batches(), config)


def test_a_directory_that_cannot_be_written(tmp_path):
    """That is known before the first step."""
    train_step, calls = counted()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=train_step))
    (tmp_path / "file").write_text("not a directory", encoding="utf-8")
    with (
        nothing_is_lost(state, tmp_path),
        pytest.raises(CheckpointError, match=r"cannot write .*file.*choose a path whose parents are directories"),
    ):
        fit(state, tiny_batches(), FitConfig(max_epochs=1, dir=tmp_path / "file" / "run", **QUIET))
    assert not calls


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """A save that runs out of space fails with what to do; the old checkpoint stands, nothing is left of the new one, and training resumes."""
    folder = tmp_path / "run"
    state = fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_epochs=1, dir=folder, **QUIET))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write = os.write

    def full(file, data):
        if len(data) > 100:
            write(file, data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    config = FitConfig(max_epochs=2, dir=folder, resume=True, **QUIET)
    with nothing_is_lost(state), monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(
            CheckpointError, match=r"cannot write .*step-00000006: .*No space left.*free some space and save again\. Older checkpoints are"
        ):
            fit(state, tiny_batches(), config)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.json"} == {
        path: data for path, data in before.items() if path.name != "config.json"
    }
    assert verify(folder / "checkpoints" / "step-00000003") == []
    assert fit(state, tiny_batches(), config).progress.step == 6


def test_a_read_of_a_donated_state():
    """The error of a state whose tensors were overwritten says how to keep one."""
    task = tiny_task()
    before = TrainState.create(task)
    after, _ = pipe(task.train_step, grad(), apply())(before, tiny_batches()[0])
    with (
        nothing_is_lost(after),
        pytest.raises(DonatedStateError, match=r"keep state\.copy\(\) before the step, or make the step pure with fl\.pure"),
    ):
        evaluate(before, tiny_batches())


@pytest.mark.parametrize(
    "train_step, match",
    [
        (lambda model, batch: plain_loss(model, (batch[0].mul_(2), batch[1])), r"batch: train_step changes the batch"),
        (
            lambda model, batch: plain_loss(vars(model).update(last=batch[0]) or model, batch),
            r"model: train_step changes the model.*\n.*last",
        ),
        (lambda model, batch: plain_loss(model[4].weight.data.mul_(0.5) is None or model, batch), r"4\._parameters/weight/value"),
    ],
)
def test_a_step_that_changes_what_is_not_its_own(train_step, match):
    """`check_task` finds a step that changes its batch, or the model outside of its buffers."""
    state = trained(train_step=train_step)
    with nothing_is_lost(state), pytest.raises(TaskCheckError, match=match):
        check_task(state.task, tiny_batches()[0])


@pytest.mark.parametrize(
    "given, match",
    [
        ({}, r"must bound the run: give max_epochs, max_steps, max_time or stop"),
        ({"max_epochs": -1}, r"FitConfig\(max_epochs=\.\.\.\) must be None for no limit, a whole number of at least 0, but got -1"),
        ({"max_steps": 1, "clip_norm": 0}, r"clip_norm.*above 0"),
        ({"max_steps": 1, "precision": "int8"}, r"precision=\.\.\.\) must be one of 'fp32', 'bf16', 'fp16'.*but got 'int8'"),
        ({"max_steps": 1, "compile": "graphs"}, r"compile=...\) must be one of None, 'trace', 'step', 'graph', 'model', but got 'graphs'"),
        ({"max_steps": 1, "save_every": steps(1)}, r"is about checkpoints, but there is no dir"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_mean_anything(given, match):
    """A configuration is refused when it is made."""
    with pytest.raises(ConfigError, match=match):
        FitConfig(**given)


def test_a_failure_in_the_middle_of_a_run_keeps_what_was_saved(tmp_path):
    """An error of the user's own comes through as it is; sinks are closed, and the run goes on from the last checkpoint."""
    train_step, calls = counted()

    def failing(model, batch):
        if len(calls) == 5:
            raise KeyError("label")
        return train_step(model, batch)

    sink = RecordingSink()
    state = TrainState.create(attrs.evolve(tiny_task(), train_step=failing))
    config = FitConfig(max_epochs=3, dir=tmp_path / "run", save_every=steps(1), resume=True, sinks=sink, **QUIET)
    with nothing_is_lost(state), pytest.raises(KeyError, match="label"):
        fit(state, tiny_batches(), config)
    assert sink.closed == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = fit(TrainState.create(tiny_task()), tiny_batches(), config)
    whole = fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_epochs=3, **QUIET))
    assert_trees_equal([resumed.params, resumed.opt_state, resumed.history], [whole.params, whole.opt_state, whole.history])


def test_a_loop_of_ones_own_is_as_safe():
    """`run` refuses what `fit` refuses, and leaves its input as it was."""
    state = trained(train_step=lambda model, batch: None)
    with nothing_is_lost(state), pytest.raises(StepError, match="returned no loss"):
        next(run(pipe(state.task.train_step, grad(), apply()), state, tiny_batches()))
