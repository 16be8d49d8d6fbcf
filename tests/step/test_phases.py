"""Several optimizers take turns: each trains its own parameters, in its own time, and is saved by its name."""

import copy

import pytest
import torch
from torch import nn

from fnlight import (
    FitConfig,
    Loaders,
    Mean,
    Optim,
    Phase,
    Task,
    TrainState,
    accumulate,
    apply,
    autocast,
    check_finite,
    clip_norm,
    clip_value,
    ema,
    epoch_means,
    evaluate_every,
    fit,
    grad,
    load,
    log_to,
    loss_scale,
    max_steps,
    microbatch,
    pipe,
    plateau,
    restore,
    run,
    save,
    steps,
    stop_when,
    update,
)
from fnlight.data import Item
from fnlight.errors import (
    CheckpointWarning,
    ConfigError,
    MonitorError,
    NonFiniteError,
    OptimizerError,
    OptimizerWarning,
    SeamError,
    StepError,
    TaskCheckError,
)
from fnlight.metrics import Tally
from fnlight.pipe import Combinator
from fnlight.testing import RecordingSink, assert_trees_equal, check_task, tiny_batches
from tests.laws.tasks import TASKS, Adversaries, deceive, tell_apart, two_optimizers

QUIET = {"device": "cpu", "progress": False}
DATA = tiny_batches("mlp", 4, 6)


def both(model):
    return {name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in ("disc", "gen")}


def task_of(disc=tell_apart, gen=deceive, configure=both):
    torch.manual_seed(0)
    return Task(Adversaries(), {"disc": disc, "gen": gen}, configure_optimizers=configure)


def stepped(step, state, count):
    return list(run(pipe(step, stop_when(max_steps(count))), state, DATA))[-1]


def moved(before, after):
    """The parts of a model whose parameters have changed."""
    return {name.split(".")[0] for name, value in before.params.items() if not torch.equal(value, after.params[name])}


def test_a_phase_trains_its_own_parameters_only():
    """In its turn no other parameter requires a gradient, so none gets one; afterwards all are as they were."""
    seen = {}

    def watched(loss_fn, name):
        def watching(model, batch):
            seen[name] = {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
            return loss_fn(model, batch)

        return watching

    for name in ("disc", "gen"):
        losses = {
            key: Phase(watched(fn, key), every=steps(1 if key == name else 9)) for key, fn in (("disc", tell_apart), ("gen", deceive))
        }
        before = TrainState.create(task_of(**losses))
        after, _ = update(before, DATA[0])
        assert moved(before, after) == {name}
        assert all(p.requires_grad and p.grad is None for p in after.store.module.parameters())
    assert seen == {"disc": {"disc"}, "gen": {"gen"}}


def test_later_phases_see_what_earlier_ones_have_done():
    """The order of the mapping is the order of the turns."""
    found = []
    for names in (("disc", "gen"), ("gen", "disc")):
        losses = {"disc": tell_apart, "gen": deceive}
        step = pipe({name: losses[name] for name in names}, grad(), apply())
        after, metrics = step(TrainState.create(task_of()), DATA[0])
        found.append(after.params)
        assert [key.split("/")[0] for key in dict.fromkeys(m.split("/")[0] for m in metrics)] == list(names)
    assert not all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_each_phase_has_its_period_and_its_count():
    """A phase that is not due is left out; progress counts steps, and each optimizer its own updates."""
    due = {"disc": tell_apart, "gen": Phase(deceive, every=steps(3))}
    state, _ = stepped(pipe(task_of(**due).train_step, grad(), apply()), TrainState.create(task_of()), 7)
    assert state.progress.step == 7
    assert state.progress.updates == {"disc": 7, "gen": 2}


def test_a_schedule_counts_the_updates_of_its_own_optimizer():
    """The learning rate of the third update of a phase does not depend on how many others the train step has had."""
    rates = {"disc": [], "gen": []}

    def configure(model):
        return {name: Optim(optimizer, schedule=lambda count: 1 / (1 + count)) for name, optimizer in both(model).items()}

    task = task_of(gen=Phase(deceive, every=steps(2)), configure=configure)
    for state, _ in run(pipe(task.train_step, grad(), apply(), stop_when(max_steps(6))), TrainState.create(task), DATA):
        for name, optim in state.store.optims.items():
            rates[name].append(round(0.1 / optim.optimizer.param_groups[0]["lr"]))
    assert rates == {"disc": [1, 2, 3, 4, 5, 6], "gen": [1, 1, 1, 2, 2, 3]}


def test_the_learning_rates_of_both_are_logged():
    """Sinks are given the rate of each optimizer by its name, and the means of each phase over its own updates."""
    often, log = RecordingSink(), RecordingSink()
    task = task_of(gen=Phase(deceive, every=steps(2)), configure=two_optimizers)
    for sink, every in ((often, 1), (log, 4)):
        state = fit(TrainState.create(task), DATA, FitConfig(max_steps=4, log_every=steps(every), sinks=sink, **QUIET))
    for name, updates in (("disc", [1, 2, 3, 4]), ("gen", [2, 4])):
        losses = often.steps(f"train/{name}/loss")
        assert list(losses) == updates
        assert log.steps(f"train/{name}/loss") == {4: pytest.approx(sum(losses.values()) / len(updates))}
        assert log.steps(f"lr/{name}") == {4: state.store.optims[name].optimizer.param_groups[0]["lr"]}
    assert log.steps("train/disc/fake").keys() == {4}


def test_a_phase_has_combinators_of_its_own():
    """They stand where they belong, and in the place of what is shared under the same name; the step prints what each phase does."""
    step = pipe(
        {"disc": Phase(tell_apart, clip_norm(0.5), every=steps(1)), "gen": deceive},
        grad(),
        clip_value(1.0),
        clip_norm(2.0),
        apply(),
        ema(0.9),
    )
    assert str(step) == (
        "disc(tell_apart > grad > clip_value(1.0) > clip_norm(0.5), every=steps(1)) + gen(deceive > grad > clip_value(1.0) > clip_norm(2.0)) "
        "> apply > ema(0.9)"
    )
    by_pipes = pipe({"disc": pipe(tell_apart, grad(), clip_norm(0.5)), "gen": pipe(deceive, grad())}, apply())
    by_phases = pipe({"disc": Phase(tell_apart, clip_norm(0.5)), "gen": deceive}, grad(), apply())
    assert str(by_pipes) == str(by_phases)
    a, b = (stepped(step, TrainState.create(task_of()), 3)[0] for step in (by_pipes, by_phases))
    assert_trees_equal(a.params, b.params)


def test_what_a_phase_holds_open_is_closed_with_the_run():
    """The phases have the run of the whole step: what a combinator of one of them opens at the start is closed at the end."""
    closed = []

    class Held:
        def close(self, error):
            closed.append(error)

    def start(state):
        state.store.run.resources["held"] = Held()
        return state

    holding = Combinator("holding", lambda grad_fn: grad_fn, "grad", "grad", start=start)
    stepped(pipe({"disc": Phase(tell_apart, holding), "gen": deceive}, grad(), apply()), TrainState.create(task_of()), 2)
    assert closed == [None]


def test_a_step_takes_the_batches_of_the_phase_that_needs_most():
    """A phase that says how many batches it takes is given the first ones of the group, and one that does not is given all."""
    seen = {"disc": 0, "gen": 0}

    def counting(loss_fn, name):
        def counted(model, batch):
            seen[name] += 1
            return loss_fn(model, batch)

        return counted

    step = pipe(
        {"disc": Phase(counting(tell_apart, "disc"), accumulate(1)), "gen": Phase(counting(deceive, "gen"), accumulate({0: 2, 1: 4}))},
        grad(),
        apply(),
    )
    assert step.batches_per_step == {0: 2, 1: 4}
    state, _ = stepped(step, TrainState.create(task_of()), 3)
    assert (state.progress.epoch, seen) == (2, {"disc": 3, "gen": 8})


def test_the_memory_of_a_phases_combinators_is_its_own():
    """Two phases may have combinators of one name; their memory lies apart, and is saved and resumed."""
    step = pipe({"disc": tell_apart, "gen": deceive}, grad(), microbatch("auto"), apply())
    state, _ = stepped(step, TrainState.create(task_of()), 1)
    assert state.memory["phases"] == {"disc": {"microbatch": {"size": None}}, "gen": {"microbatch": {"size": None}}}
    twin = state.copy()
    step(twin, DATA[0])[0].store.phases["gen"].memory["microbatch"]["size"] = 2
    assert state.memory["phases"]["gen"] == {"microbatch": {"size": None}}


def test_a_phase_named_alone_is_a_step_of_its_own():
    """A pipe may hold some of the phases of a task, to train one for a while before the other."""
    step = pipe({"gen": deceive}, grad(), apply())
    before = TrainState.create(task_of())
    after, metrics = step(before.copy(), DATA[0])
    assert moved(before, after) == {"gen"}
    assert (after.progress.updates, list(metrics)) == ({"disc": 0, "gen": 1}, ["gen/loss"])


def test_a_parameter_may_be_in_two_optimizers():
    """A shared trunk is trained by both, with a memory for each."""
    model = nn.ModuleDict({"trunk": nn.Linear(4, 3), "actor": nn.Linear(3, 2), "critic": nn.Linear(3, 1)})

    def loss_of(head):
        return lambda model, batch: model[head](model["trunk"](batch[0])).square().mean()

    def configure(model):
        return {head: torch.optim.Adam([*model["trunk"].parameters(), *model[head].parameters()]) for head in ("actor", "critic")}

    task = Task(model, {head: loss_of(head) for head in ("actor", "critic")}, configure_optimizers=configure)
    after, _ = update(TrainState.create(task), DATA[0])
    assert "trunk.weight" in after.opt_state["actor"]
    assert "trunk.weight" in after.opt_state["critic"]
    assert "actor.weight" not in after.opt_state["critic"]


def test_states_say_which_optimizers_they_have():
    """`print(state)` names each optimizer, and its memory stands under its name."""
    state, _ = update(TrainState.create(task_of(configure=two_optimizers)), DATA[0])
    assert repr(state) == "TrainState(step=1, epoch=0, batch=1, 101 parameters, disc: AdamW, gen: SGD)"
    assert sorted(state.opt_state) == ["disc", "gen"]
    assert sorted(state.opt_state["disc"]["disc.0.weight"]) == ["exp_avg", "exp_avg_sq", "step"]
    twin = state.to("cpu")
    assert_trees_equal(twin, state)
    assert twin.store.phases["gen"].params[0] is twin.store.named["gen.0.weight"]


def test_optimizers_are_restored_by_name(tmp_path):
    """The order does not matter; one that is new starts afresh, one that is gone is reported, and counts follow their names."""
    task = task_of(configure=two_optimizers)
    state = fit(TrainState.create(task), DATA, FitConfig(max_steps=3, **QUIET))
    path = save(state, tmp_path / "a")
    turned = Task(task.model, {"gen": deceive, "disc": tell_apart}, configure_optimizers=two_optimizers)
    assert_trees_equal(load(path, turned).opt_state, state.opt_state)
    renamed = Task(
        task.model,
        {"critic": tell_apart, "gen": deceive},
        configure_optimizers=lambda m: {"critic": two_optimizers(m)["disc"], "gen": two_optimizers(m)["gen"]},
    )
    with pytest.warns(
        CheckpointWarning,
        match=r"the task no longer has the optimizer 'disc'; its state is dropped\n  the checkpoint has no optimizer 'critic'",
    ):
        found = load(path, renamed)
    assert found.progress.updates == {"critic": 0, "gen": 3}
    assert_trees_equal(found.opt_state["gen"], state.opt_state["gen"])


def test_one_optimizer_and_several_do_not_mix(tmp_path):
    """A checkpoint of a task with one optimizer gives its weights to one with several, and the other way round; a warning tells of the rest."""
    several = task_of()
    single = Task(several.model, tell_apart, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    paths = [save(update(TrainState.create(task), DATA[0])[0], tmp_path / name) for task, name in ((several, "a"), (single, "b"))]
    for path, task in ((paths[0], single), (paths[1], several)):
        with pytest.warns(CheckpointWarning, match=r"the optimizers changed: .* now; all optimizer state starts empty"):
            state = load(path, task)
        assert state.progress.step == 1
    assert restore(paths[0], TrainState.create(several)).progress.updates == {"disc": 1, "gen": 1}


def test_what_a_phase_configures_wins_over_the_checkpoint(tmp_path):
    """A learning rate that was changed in the code is used, and the warning names the phase."""
    state = fit(TrainState.create(task_of()), DATA, FitConfig(max_steps=2, **QUIET))

    def faster(model):
        return {**both(model), "gen": torch.optim.SGD(model.gen.parameters(), lr=0.5)}

    with pytest.warns(CheckpointWarning, match=r"gen: lr: 0\.1 in the checkpoint, 0\.5 now; 0\.5 is used"):
        found = load(save(state, tmp_path / "a"), task_of(configure=faster))
    assert [optim.optimizer.param_groups[0]["lr"] for optim in found.store.optims.values()] == [0.1, 0.5]


def none_for_gen(model):
    return {"disc": both(model)["disc"], "gen": None}


def frozen_gen(model):
    model.gen.requires_grad_(False)
    return both(model)


@pytest.mark.parametrize(
    "configure, error, match",
    [
        (None, OptimizerError, r"has the phases disc, gen, but no configure_optimizers"),
        (lambda m: both(m)["disc"], OptimizerError, r"must return a dict with an optimizer for each, but returned SGD"),
        (lambda m: {"disc": both(m)["disc"]}, OptimizerError, r"phases are \['disc', 'gen'\] and configure_optimizers returned \['disc'\]"),
        (none_for_gen, OptimizerError, r"the phase 'gen' has no parameters to train"),
        (frozen_gen, OptimizerError, r"the phase 'gen' has no parameters to train"),
        (lambda m: {**both(m), "gen": "sgd"}, OptimizerError, r"must return a torch\.optim\.Optimizer .* but returned str: 'sgd'"),
    ],
)
def test_optimizers_that_do_not_fit_the_phases(configure, error, match):
    """Every phase needs an optimizer of its name that has something to train."""
    with pytest.raises(error, match=match):
        TrainState.create(task_of(configure=configure))


def test_parameters_that_no_phase_trains_are_warned_of():
    """What requires a gradient and is in none of the optimizers will never change."""

    def configure(model):
        return {**both(model), "gen": torch.optim.SGD(model.gen[0].parameters(), lr=0.1)}

    with pytest.warns(
        OptimizerWarning, match=r"does not hold gen\.1\.weight, gen\.1\.bias, gen\.3\.weight, gen\.3\.bias, which require gradients"
    ):
        TrainState.create(task_of(configure=configure))


@pytest.mark.parametrize(
    "make, error, match",
    [
        (
            lambda: pipe({"disc": tell_apart, "gen": deceive}, grad()),
            SeamError,
            r"apply\(\) joins the phases disc, gen into one step, but there is none",
        ),
        (
            lambda: pipe({"disc": tell_apart}, apply()),
            SeamError,
            r"apply takes a GradFn .* but the phase 'disc' gives a LossFn, .*; put grad\(\)",
        ),
        (lambda: Phase(tell_apart, ema(0.9)), SeamError, r"ema\(0\.9\) gives a whole step, so it cannot be part of one Phase"),
        (lambda: Phase(tell_apart, clip_norm), SeamError, r"got the function clip_norm; call it first"),
        (lambda: Phase(tell_apart, every=5), ConfigError, r"Phase\(every=\.\.\.\) must be a trigger such as steps\(5\), but got 5"),
        (lambda: Task(nn.Linear(1, 1), {}), TypeError, r"has no phases"),
        (lambda: Task(nn.Linear(1, 1), {"a/b": tell_apart}), TypeError, r"strings without a slash, but got the name 'a/b'"),
        (lambda: Task(nn.Linear(1, 1), {"a": 3}), TypeError, r"\{'a': \.\.\.\}\) must be a function or a Phase, but got int"),
    ],
)
def test_phases_that_do_not_fit(make, error, match):
    """What can be known to be wrong is an error where it is written."""
    with pytest.raises(error, match=match):
        make()


def test_a_step_whose_phases_the_task_does_not_have():
    """A step of several phases needs a state that has their optimizers, and a step of one a state that has one."""
    single = Task(nn.Linear(4, 1), tell_apart, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        SeamError, match=r"has the phases disc, but the task has optimizers for none of them; configure_optimizers must return a dict"
    ):
        pipe({"disc": tell_apart}, grad(), apply())(TrainState.create(single), DATA[0])
    with pytest.raises(OptimizerError, match=r"has an optimizer for each of the phases disc, gen, so its step starts from a mapping"):
        pipe(tell_apart, grad(), apply())(TrainState.create(task_of()), DATA[0])


def test_an_error_in_a_phase_says_which():
    """A loss without a graph is found in the phase that gives it, and the model is left trainable."""
    state = TrainState.create(task_of(gen=lambda model, batch: model(batch[0]).mean().detach()))
    with pytest.raises(StepError, match=r"in the phase 'gen': train_step returned a loss without a graph"):
        update(state, DATA[0])
    with pytest.raises(StepError, match=r"in the phase 'gen'"):
        pipe(state.task.train_step, grad(), apply())(state, DATA[0])
    assert all(p.requires_grad for p in state.store.module.parameters())


def test_a_plateau_watches_for_its_own_phase():
    """A schedule that monitors what nothing yields is refused before the first step, in whichever phase it is."""

    def configure(model):
        return {**both(model), "gen": Optim(both(model)["gen"], plateau(), monitor="val/f1")}

    state = TrainState.create(task_of(configure=configure))
    with pytest.raises(MonitorError, match=r"the schedule plateau.* monitors 'val/f1'"):
        list(run(pipe(state.task.train_step, grad(), apply(), stop_when(max_steps(1))), state, DATA))


def test_a_loss_that_is_no_number_is_found_in_any_phase():
    """`check_finite` names the step, whichever phase it was."""

    def breaking(model, batch):
        return deceive(model, batch) * float("nan")

    task = task_of(gen=Phase(breaking, every=steps(3)))
    step = pipe(task.train_step, grad(), apply(), check_finite(every=steps(4)))
    with pytest.raises(NonFiniteError, match=r"the loss was NaN or infinite at step 3 .*noticed at step 4"):
        list(run(step, TrainState.create(task), DATA))


def test_metrics_of_a_phase_come_together_or_not_at_all():
    """A tally takes steps in which a whole phase is missing, and is exact over the others; a name alone must not be missing."""
    tally = Tally()
    for step in range(1, 1001):
        metrics = {"disc/loss": torch.tensor(float(step)), "disc/acc": 0.5}
        tally.add(step, {**metrics, "gen/loss": Mean(torch.tensor(2.0 * step), 2)} if step % 3 == 0 else metrics)
    assert tally.read() == {"disc/loss": 500.5, "disc/acc": 0.5, "gen/loss": sum(range(3, 1001, 3)) / 333}
    with pytest.raises(StepError, match=r"step 1001: .*missing now: \['disc/acc', 'gen/loss'\]"):
        tally.add(1001, {"disc/loss": torch.tensor(1.0)})
    again = copy.deepcopy(tally)
    again.add(1001, metrics)
    assert again.read()["gen/loss"] == tally.read()["gen/loss"]


def test_the_checks_of_a_task_go_over_all_of_its_phases():
    """`check_task` finds a parameter that its phase never reaches, and a phase that seeds for itself."""
    report = check_task(TASKS["two optimizers"].make(), DATA[0])
    assert report.skipped == {"overfit": "the phases of the task may pull against each other"}

    class Unused(Adversaries):
        def __init__(self):
            super().__init__()
            self.gen[0].extra = nn.Linear(1, 1)

    task = Task(Unused(), {"disc": tell_apart, "gen": deceive}, configure_optimizers=both)
    with pytest.raises(TaskCheckError, match=r"gradients: no gradient reaches\n *gen\.0\.extra\.weight"):
        check_task(task, DATA[0], skip=["round_trip"])


def test_evaluation_means_and_logs_of_a_gan_resume_within_a_window(tmp_path):
    """Saved in the middle of a window of metrics, before the generator had its turn in it, a run logs what it would have logged."""
    case = TASKS["two optimizers"]

    def step(log):
        return pipe(
            case.make().train_step, grad(), apply(), evaluate_every(DATA[:1], every=steps(3)), epoch_means(), log_to(log, every=steps(4))
        )

    whole, part = RecordingSink(), RecordingSink()
    stepped(step(whole), TrainState.create(case.make()), 8)
    half, _ = stepped(step(RecordingSink()), TrainState.create(case.make()), 8)
    for k in (1, 5):
        states = run(step(RecordingSink()), TrainState.create(case.make()), DATA)
        for _ in range(k):
            half, _ = next(states)
        part.records.clear()
        resumed, _ = stepped(step(part), load(save(half, tmp_path / f"{k}"), case.make()), 8)
        assert [(r.step, r.metrics) for r in part.records] == [(r.step, r.metrics) for r in whole.records if r.step > k]
    assert resumed.progress.updates == {"disc": 8, "gen": 4}


def test_fit_trains_phases_with_everything_that_it_can(tmp_path):
    """Clipping, averaging, evaluation, checkpoints and `resume=True` work for several optimizers as for one."""
    task = TASKS["two optimizers"].make()
    loaders = Loaders(train=DATA, val=DATA[:1])
    config = {"clip_norm": 0.5, "ema": 0.9, "dir": tmp_path / "run", **QUIET}
    fit(TrainState.create(task), loaders, FitConfig(max_steps=5, **config))
    state = fit(TrainState.create(task), loaders, FitConfig(max_epochs=3, resume=True, **config))
    whole = fit(TrainState.create(task), loaders, FitConfig(max_epochs=3, clip_norm=0.5, ema=0.9, **QUIET))
    assert_trees_equal(state.params, whole.params)
    assert_trees_equal(state.opt_state, whole.opt_state)
    assert state.progress.updates == {"disc": 12, "gen": 6}
    assert Item.of(DATA[0], state=state).epoch == 3


def test_a_phase_whose_gradients_overflow_is_skipped_alone():
    """Each phase has a loss scale of its own; one that overflows counts no update, and the step counts as long as another has made one."""
    case = TASKS["two optimizers"]
    task = case.make()
    losses = {"disc": Phase(tell_apart, autocast(torch.float16), loss_scale(init=2.0**120)), "gen": deceive}
    step = pipe(losses, grad(), apply())
    state, metrics = step(TrainState.create(task), DATA[0])
    assert (state.progress.step, state.progress.skipped, state.progress.updates) == (1, 0, {"disc": 0, "gen": 1})
    assert metrics["disc/skipped"].compute() == 1
    assert float(state.memory["phases"]["disc"]["loss_scale"]["scale"]) == 2.0**119
    alone, _ = pipe({"disc": losses["disc"]}, grad(), apply())(TrainState.create(task), DATA[0])
    assert (alone.progress.step, alone.progress.skipped, alone.progress.updates) == (0, 1, {"disc": 0, "gen": 0})
