"""What can be known to be wrong is found before the first step, and costs no training."""

import pytest
import torch
from torch import nn

from fnlight.errors import CheckpointError, ConfigError, MonitorError, ParallelError, TaskWarning
from fnlight.fit import fit
from fnlight.triggers import at_end, epochs, patience, reached, steps
from tests.small_runs import both, config, counted, created, loader


def test_sanity_batches_find_a_broken_eval_step_first():
    """Evaluation is tried before the first training step, and touches no state."""
    fn, calls = counted()

    def broken(model, batch):
        raise RuntimeError("broken evaluation")

    with pytest.raises(RuntimeError, match="broken evaluation"):
        fit(created(fn, broken), both(), config(max_epochs=1, sanity_batches=1))
    assert calls == []
    sane = fit(created(), both(), config(max_epochs=1, sanity_batches=2))
    assert sane.history == fit(created(), both(), config(max_epochs=1)).history


def test_a_monitor_that_no_evaluation_yields_is_found_before_training():
    """One batch is evaluated to learn the names; the error lists them."""
    fn, calls = counted()
    with pytest.raises(
        MonitorError, match=r"'val/accuracy' is monitored, but no evaluation has this metric; the metrics are \['val/loss'\]"
    ):
        fit(created(fn), both(), config(max_epochs=1, stop=patience("val/accuracy", 3)))
    with pytest.raises(
        MonitorError, match=r"monitors 'val/loss', but this run does not record it, .*give fl.Loaders\(train=..., val=...\)"
    ):
        fit(created(fn), loader(), config(max_epochs=1, stop=patience("val/loss", 3)))
    assert calls == []


def test_a_rule_that_can_never_fire_is_refused():
    """An evaluation that would come after the end of the run cannot be monitored."""
    with pytest.raises(
        ConfigError, match=r"the first evaluation would be after 100 steps .* and the run ends after 10, so it would never have a value"
    ):
        fit(created(), both(), config(max_steps=10, eval_every=steps(100), stop=reached("val/loss", 0.1, "min")))
    with pytest.raises(ConfigError, match="after 5 epochs"):
        fit(created(), both(), config(max_epochs=2, eval_every=epochs(5), stop=reached("val/loss", 0.1, "min")))
    assert fit(created(), both(), config(max_steps=2, eval_every=steps(100) | at_end, stop=patience("val/loss", 1))).stopped


def test_several_processes_that_cannot_meet_are_refused_rather_than_trained_apart(monkeypatch):
    """A process that is one of two, and does not know which, trains alone only if told so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="does not give a valid rank and number of processes"):
        fit(created(), both(), config(max_steps=1))
    assert fit(created(), both(), config(max_steps=1, parallel=None)).progress.step == 1


def test_a_model_in_eval_mode_is_trained_as_it_is_with_a_warning():
    """Modes are the user's, but dropout that is off by oversight is worth a word."""
    with pytest.warns(TaskWarning, match=r"the model is in eval mode: dropout is off, .*call model.train\(\)"):
        state = fit(created(model=nn.Linear(3, 3).eval()), both(), config(max_steps=1))
    assert not state.store.module.training


class Unsaved(nn.Linear):
    """A layer whose extra state is a set, which is no data for a checkpoint."""

    def get_extra_state(self):
        return {1, 2}

    def set_extra_state(self, state):
        pass


def sparse(make):
    """A model with a sparse buffer."""
    model = nn.Linear(3, 3)
    model.register_buffer("adjacency", make(torch.eye(3)))
    return model


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Unsaved(3, 3), "^extra/ has type set: .*a checkpoint holds only dicts"),
        (lambda: sparse(torch.Tensor.to_sparse), "^adjacency is sparse"),
        (lambda: sparse(torch.Tensor.to_sparse_csr), "^adjacency is sparse"),
    ],
    ids=["extra state", "COO", "CSR"],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(make, message, tmp_path):
    """With its name; a run that saves nothing trains."""
    fn, calls = counted()
    with pytest.raises(CheckpointError, match=message):
        fit(created(fn, model=make()), loader(), config(max_steps=1, dir=str(tmp_path / "run")))
    assert calls == []
    assert fit(created(fn, model=make()), loader(), config(max_steps=1)).progress.step == 1
