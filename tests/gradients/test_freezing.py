"""What is frozen is passed over by backward and by the optimizer, and what thaws later trains as if it had just come."""

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.checkpoint import load, save
from fnlight.errors import ConfigError, OptimizerError
from fnlight.gradients import freeze, grad, unfreeze_at
from fnlight.loop import run, stop_when
from fnlight.optim import Optim, param_groups
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.step import apply, ema
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from fnlight.triggers import max_epochs, max_steps
from tests.repo.source import ROOT
from tests.repo.test_docs import assert_page_runs


def trained(*combinators, task=None, state=None, rule=None):
    task = task or tiny_task()
    step = pipe(task.train_step, grad(), apply(), *combinators, stop_when(rule or max_epochs(3)))
    return [(state, state.module(), set(state.opt_state)) for state, _ in run(step, state or TrainState.create(task), tiny_batches())]


def test_what_is_frozen_stays_and_has_no_memory():
    """Frozen parameters are bitwise what they were, weight decay included, and the optimizer remembers nothing of them."""
    before = TrainState.create(tiny_task())
    seen = trained(freeze("0", "1.bias"))
    state = seen[-1][0]
    moved = {name for name, value in state.params.items() if not torch.equal(value, before.params[name])}
    assert moved == {"1.weight", "4.weight", "4.bias"} == set(state.opt_state)


def test_what_thaws_is_trained_as_a_plain_loop_would():
    """Bitwise a hand-written loop that switches gradients on at the end of an epoch, the optimizer holding all from the beginning."""
    task = tiny_task()
    task = attrs.evolve(task, model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    state = trained(unfreeze_at({"0": 2}), task=task)[-1][0]
    module = TrainState.create(task).module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    for epoch in range(3):
        module[0].requires_grad_(epoch >= 2)
        for x, y in tiny_batches():
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert_trees_equal(dict(state.params), {n: p.detach() for n, p in module.named_parameters()})
    assert state.opt_state["0.weight"]["step"] == 3


def test_a_frozen_part_may_be_in_eval_mode():
    """With `eval_mode`, statistics of a frozen BatchNorm stay and its dropout is off; without, they go on. Modes are put back."""
    for eval_mode in (False, True):
        before = TrainState.create(tiny_task())
        state, module, _ = trained(freeze("1", eval_mode=eval_mode))[-1]
        assert torch.equal(state.buffers["1.running_mean"], before.buffers["1.running_mean"]) == eval_mode
        assert module.training
        assert module[1].training
    calls = []
    task = tiny_task()

    def looking(model, batch):
        calls.append([m.training for m in model])
        return task.train_step(model, batch)

    trained(unfreeze_at({"3": 1, "1.*": 1}, eval_mode=True), task=attrs.evolve(task, train_step=looking, model=named_dropout(task)))
    assert calls[0] == [True, False, True, False, True]
    assert calls[-1] == [True] * 5


def named_dropout(task):
    """The same net, whose dropout has a parameter that does nothing, so that a pattern can mean it."""
    model = task.model
    model[3].register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return model


def test_nothing_of_freezing_is_left_behind():
    """After a step, and after one that fails, every parameter requires gradients again: a later part of the training sees no trace."""
    state = trained(freeze("0"))[-1][0]
    assert all(p.requires_grad for p in state.store.named.values())
    assert len(state.store.params) == len(state.store.named)
    step = pipe(state.task.train_step, grad(), apply(), freeze("0"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(state, (torch.zeros(2, 9), torch.zeros(2).long()))
    assert all(p.requires_grad for p in state.store.named.values())


@pytest.mark.parametrize("at", [1, 3, 5, 6, 7])
def test_thawing_goes_on_from_a_file_bitwise(at, tmp_path):
    """From before, at and behind the epoch at which a part thaws, with averaged weights and a schedule of its own group."""
    task = tiny_task()

    def configure(model):
        groups = param_groups(model, {"0": {"lr": 1e-3}})
        return Optim(torch.optim.AdamW(groups, lr=1e-2), lambda step: 0.9**step)

    task = attrs.evolve(task, configure_optimizers=configure)
    parts = (unfreeze_at({"0": 2}, eval_mode=True), ema(0.9))
    whole = trained(*parts, task=task)[-1][0]
    part = trained(*parts, task=task, rule=max_steps(at))[-1][0]
    loaded = load(save(part, tmp_path / "a"), task)
    assert_trees_equal(trained(*parts, task=task, state=loaded)[-1][0], whole)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: freeze(), ConfigError, "freeze takes patterns of names"),
        (lambda: unfreeze_at({}), ConfigError, "unfreeze_at takes patterns of names with epochs"),
        (lambda: unfreeze_at({"0": -1}), ConfigError, r"whole number of at least 0, but got -1"),
        (lambda: trained(freeze("backbone")), ConfigError, r"'backbone' of freeze means no parameter; near to it are"),
        (
            lambda: trained(unfreeze_at({"0": 1}), task=partly()),
            OptimizerError,
            r"trains '0' from epoch 1 on, but the optimizer does not hold 0.weight",
        ),
        (lambda: trained(unfreeze_at({"0": 1}), task=still()), ConfigError, r"the task has frozen all of that itself"),
    ],
)
@pytest.mark.filterwarnings("ignore:AdamW holds no")
def test_freezing_that_means_nothing_is_refused(make, error, message):
    """Before the first step, with what to do about it."""
    with pytest.raises(error, match=message):
        make()


def partly():
    return attrs.evolve(tiny_task(), configure_optimizers=lambda model: torch.optim.AdamW(model[4].parameters()))


def still():
    task = tiny_task()
    task.model[0].requires_grad_(False)
    return task


def test_the_recipe_for_lora_runs_with_the_real_package(tmp_path):
    """The page on finetuning, with its block on peft as a program: adapters are trained, saved, loaded, exported and merged."""
    pytest.importorskip("peft", reason='needs peft: pip install "fnlight[lora]"')
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    recipe = "```text\nfrom peft import"
    assert text.count(recipe) == 1
    page = tmp_path / "finetuning.md"
    page.write_text(text.replace(recipe, "```python\nfrom peft import"), encoding="utf-8")
    assert_page_runs(page)
