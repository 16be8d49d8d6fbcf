"""Training on XLA: its result, how often it compiles, when it waits, and how states move from and to other devices."""

import os
from itertools import islice

import attrs
import pytest
import torch
from torch import nn

from fnlight import (
    FitConfig,
    Loaders,
    Optim,
    TrainState,
    accumulate,
    apply,
    batches,
    clip_norm,
    cosine,
    ema,
    evaluate,
    fit,
    grad,
    load,
    parallel,
    pipe,
    predict,
    restore,
    run,
    save,
    steps,
    swa,
    update,
    warmup_cosine,
)
from fnlight.errors import CompileWarning, ConfigError, ParallelError
from fnlight.tensors import isolated, seed_generators
from fnlight.testing import RecordingSink, assert_trees_equal, tiny_batches, tiny_task
from tests.laws.tasks import TASKS
from tests.laws.test_accumulation import TRAINED
from tests.repo.source import ROOT
from tests.repo.test_docs import assert_page_runs
from tests.xla.device import num_compiles, on_xla

LEFT_OUT = ("recurrent net", *(() if os.environ.get("FNLIGHT_XLA") == "all" else ("transformer",)))
"""torch_xla replaces nn.GRU by one that does not run on the CPU; a transformer takes long to compile."""


def sgd(model):
    """What makes no gradient larger than it is."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def test_what_is_copied_outlives_what_it_was_copied_from():
    """A state, and averages that begin as its parameters: both are read, the run goes on, and they can be read again."""
    step = pipe(tiny_task().train_step, grad(), apply(), swa(start=0, every=steps(1)))
    state = TrainState.create(tiny_task(), seed=0, place=parallel.xla())
    kept, seen = state.copy(), []
    before = {name: value.cpu() for name, value in kept.params.items()}
    for state, _ in run(step, state, tiny_batches(), donate=True):
        seen.append({name: value.cpu() for name, value in state.memory["swa"]["weights"].items()})
        if state.progress.step == 3:
            break
    assert_trees_equal({name: value.cpu() for name, value in kept.params.items()}, before)
    assert any(not torch.equal(seen[0][name], seen[2][name]) for name in before)


def without_dropout(case):
    """The task, with nothing that draws."""
    task = case.make()
    for module in task.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return attrs.evolve(task, configure_optimizers=sgd)


def trained(record):
    """The metrics of training; those of an evaluation use a running variance, which is torch_xla's own."""
    return {name: value for name, value in record.metrics.items() if name.startswith("train")}


def close(a, b):
    """Within 1e-5, relative to the largest value of each tensor."""
    for name, value in b.params.items():
        scale = float(value.abs().max()) or 1.0
        assert float((a.params[name].cpu() - value.cpu()).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in LEFT_OUT])
def test_training_is_that_of_the_cpu(name):
    """Two epochs with accumulation, clipping and averages end within 1e-5 of eager ones, in weights and in every training metric.

    Without dropout, whose numbers are others, and by SGD: AdamW makes rounding errors, which are all that some gradients are, as large as any.
    """
    case = TASKS[name]
    task = without_dropout(case)
    found, logs = [], (RecordingSink(), RecordingSink())
    for place, sink in zip((None, parallel.xla()), logs, strict=True):
        config = FitConfig(max_epochs=2, accumulate=2, clip_norm=0.5, ema=0.9, log_every=steps(1), sinks=sink, progress=False)
        state = TrainState.create(task, seed=3, place=place)
        found.append(fit(state, Loaders(train=case.batches(), val=case.batches(1)), config))
    cpu, xla = found
    assert (xla.device.type, cpu.device.type) == ("xla", "cpu")
    close(xla, cpu)
    for one, two in zip(logs[1].records, logs[0].records, strict=True):
        assert trained(one) == pytest.approx(trained(two), rel=1e-5, abs=1e-6)


PIPES = {
    "AdamW with a schedule": (lambda m: Optim(torch.optim.AdamW(m.parameters(), lr=0.01), warmup_cosine(warmup=4, total=12)), ()),
    "SGD with momentum, clipped": (
        lambda m: Optim(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), cosine(total=12)),
        (clip_norm(0.1),),
    ),
    "a rate that is a tensor": (
        lambda m: Optim(torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), capturable=True), cosine(total=12)),
        (),
    ),
    "betas with a schedule": (
        lambda m: Optim(torch.optim.AdamW(m.parameters(), lr=0.01), schedules={"weight_decay": cosine(total=12)}),
        (),
    ),
}


@pytest.mark.parametrize("kind", PIPES)
def test_a_step_is_compiled_twice_at_most(kind):
    """In the first step, and when the optimizer has its memory; never again, whatever the schedule does, dropout and averages included.

    What copies weights for the averages before the first step is no step, and compiled once.
    """
    configure, stages = PIPES[kind]
    task = attrs.evolve(tiny_task(), configure_optimizers=configure)
    step = pipe(task.train_step, grad(), accumulate(2), *stages, apply(), ema(0.9))
    state, rates = TrainState.create(task, place=parallel.xla()), set()
    before = num_compiles()
    state = step.start(state)
    counts = [num_compiles()]
    assert counts[0] - before <= 1
    with isolated(state.device):
        for item in islice(batches(tiny_batches(num_batches=8), state, step.batches_per_step, device=state.device), 10):
            state, _ = step.fn(state, item)
            counts.append(num_compiles())
            rates |= {float(value) for value in state.store.reported().values()}
    assert counts[2] - counts[0] <= 2 + (kind == "a rate that is a tensor")  # which a test reads, on the device
    assert len(set(counts[2:])) == 1
    assert len(rates) > 1


def test_a_run_compiles_nothing_after_its_second_epoch():
    """Evaluations, logs, averages, saves and the smaller last batch included."""
    counts = []

    def count(record):
        counts.append((record.epoch, num_compiles()))

    loaders = Loaders(train=TASKS["convnet"].batches(), val=TASKS["convnet"].batches(2))
    config = FitConfig(max_epochs=6, ema=0.9, clip_norm=1.0, sinks=count, log_every=steps(3), progress=False)
    fit(TrainState.create(tiny_task("convnet"), place=parallel.xla()), loaders, config)
    assert {epoch for epoch, _ in counts} >= {3, 4, 5, 6}
    assert len({number for epoch, number in counts if epoch >= 2}) == 1


def test_nothing_is_read_from_the_device_between_two_logs():
    """Metrics wait on the device; a log reads them in one copy for each kind of number."""
    from torch_xla.debug.metrics import metric_data

    def reads():
        found = metric_data("TransferFromDeviceTime")
        return 0 if found is None else found[0]

    task, at = tiny_task(), {}
    step = pipe(task.train_step, grad(), clip_norm(1.0), apply(), ema(0.9))
    for state, metrics in run(step, TrainState.create(task, place=parallel.xla()), tiny_batches(num_batches=5)):
        at[state.progress.step], loss = reads(), metrics["loss"]
        if state.progress.step == 20:
            break
    assert len(set(at.values())) == 1
    assert float(loss) > 0
    assert reads() == at[20] + 1


@pytest.mark.parametrize(("first", "then"), [("cpu", "xla"), ("xla", "cpu")])
def test_a_run_goes_on_on_another_device(first, then, tmp_path):
    """From XLA to the CPU and back: what is loaded is bitwise what was saved, and the run ends within 1e-5 of one that stayed."""
    case = TASKS["convnet"]
    places, loaders = {"cpu": None, "xla": parallel.xla()}, Loaders(train=case.batches(), val=case.batches(1))

    def config(epochs):
        return FitConfig(max_epochs=epochs, ema=0.9, clip_norm=0.5, dir=tmp_path / first, resume=True, progress=False)

    begun = fit(TrainState.create(case.make(), place=places[first]), loaders, config(2))
    assert begun.device.type == first
    taken = restore(tmp_path / first, like=TrainState.create(case.make(), place=places[then]))
    assert taken.device.type == then
    assert_trees_equal(
        [taken.params, taken.opt_state, taken.memory, taken.history], [begun.params, begun.opt_state, begun.memory, begun.history]
    )
    ended = fit(TrainState.create(case.make(), place=places[then]), loaders, config(4))
    assert (ended.device.type, ended.progress.epoch) == (then, 4)
    stayed = fit(TrainState.create(case.make()), loaders, FitConfig(max_epochs=4, ema=0.9, clip_norm=0.5, progress=False))
    close(ended, stayed)
    assert [r.metrics for r in ended.history][-1] == pytest.approx(stayed.history[-1].metrics, rel=1e-5)


def test_a_state_moves_there_and_back(tmp_path):
    """Tied weights stay tied, the optimizer follows, kernels are chosen anew, and a step there is a step here."""
    case = TASKS["tied weights"]
    task, place = case.make(), parallel.xla()
    step = pipe(task.train_step, grad(), apply())
    state, _ = step(TrainState.create(task), case.batches()[0])
    there, kept = state.to("xla"), state.copy()
    assert there.store.module.head.weight is there.store.module.embed.weight
    assert there.store.optim.optimizer.param_groups[0]["fused"] is None
    after, _ = step(there, on_xla(case.batches()[1]))
    back = after.to("cpu")
    assert back.store.optim.optimizer.param_groups[0]["fused"] is True
    close(back, step(state, case.batches()[1])[0])
    assert load(save(after, tmp_path / "a"), task, device="xla").device.type == "xla"
    assert fit(kept, case.batches(), FitConfig(max_steps=2, device="xla", progress=False)).device == there.device
    assert place.place(task.model) is None


def test_random_numbers_of_the_device_follow_from_the_key():
    """Equal keys give equal numbers, whole keys count, and what a caller had is put back."""
    parallel.xla()
    device = torch.device("xla", 0)

    def drawn(key):
        seed_generators(key, device)
        return torch.rand(4, device=device).cpu()

    torch.xla.manual_seed(7)
    with isolated(device):
        one, two, three = drawn(5), drawn(5), drawn(5 + (1 << 40))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    first = torch.rand(4, device=device).cpu()
    torch.xla.manual_seed(7)
    assert torch.equal(first, torch.rand(4, device=device).cpu())


def test_dropout_depends_on_the_seed_only():
    """Two states of one seed draw the same, of two seeds they do not; the state that went in is left as it was."""
    case, place = TASKS["mlp with BatchNorm and dropout"], parallel.xla()
    batch = on_xla(case.batches()[0])
    found = [update(TrainState.create(case.make(), seed=seed, place=place), batch)[0] for seed in (1, 1, 2)]
    assert_trees_equal(found[0].params, found[1].params)
    assert not torch.equal(found[0].params["0.weight"].cpu(), found[2].params["0.weight"].cpu())


def test_evaluations_and_predictions_are_those_of_the_cpu():
    """Every sample once, in order; the metrics within 1e-5."""
    case = TASKS["convnet"]
    here, there = TrainState.create(case.make()), TrainState.create(case.make(), place=parallel.xla())
    assert evaluate(there, case.batches()) == pytest.approx(evaluate(here, case.batches()), rel=1e-5)
    outputs = [torch.cat([out.cpu() for out in predict(state, case.batches())]) for state in (here, there)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_xla_compiles_by_itself():
    """A graph of fnlight's own is asked for in vain, which a warning says."""
    config = FitConfig(max_steps=2, compile="trace", progress=False)
    with pytest.warns(CompileWarning, match=r"the device 'xla:0' compiles steps itself; continuing without a graph"):
        fit(TrainState.create(tiny_task("convnet"), place=parallel.xla()), tiny_batches("convnet"), config)


def test_a_mesh_of_other_devices_is_refused():
    """The error says how many there are, and how more are had on the CPU; a mesh that means nothing is one, too."""
    match = r"xla\(mesh=\{'data': 3\}\) needs 3 devices, but there are 1; give a mesh of all of them"
    with pytest.raises(ParallelError, match=match + (r", or set CPU_NUM_DEVICES=3" if os.environ["PJRT_DEVICE"] == "CPU" else "")):
        parallel.xla(mesh={"data": 3})
    with pytest.raises(ConfigError, match=r"such as \{'data': 4\}, but got \{\}"):
        parallel.xla(mesh={})
    with pytest.raises(ConfigError, match=r"names the axes \['model'\], but the axes of the mesh are none"):
        parallel.xla(shard={"0": ("model", None)})


def test_the_page_runs():
    """The programs of docs/xla.md."""
    assert_page_runs(ROOT / "docs" / "xla.md")
