"""Micro-batches give the gradient of the whole batch; after out of memory the result is bit-identical to that size from the start."""

import json
from collections import defaultdict
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch

from fnlight import Combinator, FitConfig, Mean, TrainState, accumulate, apply, fit, grad, load, microbatch, pipe, run, save
from fnlight.data import Item, Part
from fnlight.errors import ConfigError, FaultWarning, StepError
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.laws.tasks import TASKS
from tests.parallel.launch import ran as launched

TRAINED = [name for name, case in TASKS.items() if case.trains and case.kind == "loss"]


def fitting(train_step, most, error=None, fails=None):
    """A step function that computes, writes its buffers, and then runs out of memory if there are too many samples."""

    def limited(model, batch):
        out = train_step(model, batch)
        if len(batch[0]) > most and (fails is None or fails.pop(0)):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out

    return limited


def plain(tree):
    """Losses and metrics as `Mean`s."""
    if isinstance(tree, Mean):
        return (float(tree.total), tree.weight)
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    return [plain(v) for v in tree] if isinstance(tree, list | tuple) else tree


def calm(case):
    task = case.make()
    task.model.eval()
    return task


def ran(task, size, batches, *others, steps=4, train_step=None):
    step = pipe(train_step or task.train_step, grad(), *others, microbatch(size), apply())
    return list(islice(run(step, TrainState.create(task, seed=3), batches), steps))[-1][0]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("name", TRAINED)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, size):
    """Without layers that mix samples, gradients, loss and metrics agree to 1e-6 relative, for plain and for weighted losses."""
    case = TASKS[name]
    task, found = calm(case), []
    for stages in ([], [microbatch(size)]):
        fn = pipe(task.train_step, grad(), accumulate(3), *stages)
        g = fn(TrainState.create(task).store, tuple(case.batches()), 0)
        found.append((torch.cat([v.double().flatten() for v in g.values]), g.metrics))
    (expected, one), (parts, many) = found
    assert (parts - expected).norm() <= 1e-6 * expected.norm()
    assert float(many["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
    assert float(many["acc"]) == pytest.approx(float(one["acc"]), rel=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_that_fits_is_not_split(name):
    """A size as large as the batch, and `auto` with enough memory, are bit-identical to a step without micro-batches."""
    task, batches = TASKS[name].make(), TASKS[name].batches()
    whole = list(islice(run(pipe(task.train_step, grad(), apply()), TrainState.create(task, seed=3), batches), 4))[-1][0]
    assert_trees_equal(ran(task, 6, batches), whole)
    auto = ran(task, "auto", batches)
    assert auto.store.memory.pop("microbatch") == {"size": None}
    assert_trees_equal(auto, whole)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_auto_is_bit_identical_to_the_chosen_size(name, group):
    """With BatchNorm, dropout and accumulation: `auto` that halves twice equals `microbatch(2)` from the start."""
    task, batches = TASKS[name].make(), TASKS[name].batches()
    others = [accumulate(group)] if group > 1 else []
    expected = ran(task, 2, batches, *others)
    with pytest.warns(FaultWarning, match=r"out of memory with (whole batches|micro-batches of 3 samples): the step is repeated") as caught:
        found = ran(task, "auto", batches, *others, train_step=fitting(task.train_step, 2))
    assert [w.category for w in caught] == [FaultWarning, FaultWarning]
    assert found.store.memory.pop("microbatch") == {"size": 2}
    assert_trees_equal(found, expected)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=repr,
)
def test_every_out_of_memory_error_is_recognised(error):
    """Each library and device has its own error for out of memory."""
    task = tiny_task()
    with pytest.warns(FaultWarning, match="in micro-batches of at most 3 samples"):
        found = ran(task, "auto", tiny_batches(), train_step=fitting(task.train_step, 3, error))
    assert found.memory["microbatch"] == {"size": 3}


def test_a_real_cpu_out_of_memory_error_is_recognised():
    """The error of torch's allocator for a request that is too large."""

    def train_step(model, batch):
        torch.empty((1 << 60) if len(batch[0]) > 3 else 1, dtype=torch.uint8)
        return model(batch[0]).square().mean()

    with pytest.warns(FaultWarning, match="in micro-batches of at most 3 samples"):
        found = ran(tiny_task(), "auto", tiny_batches(), train_step=train_step)
    assert found.progress.step == 4


def test_other_errors_are_not_treated_as_out_of_memory():
    """An error of the user's code is raised unchanged."""
    task = tiny_task()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ran(task, "auto", tiny_batches(), train_step=fitting(task.train_step, 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_a_sample_that_does_not_fit_alone_is_an_error():
    """If one sample does not fit, the error of the allocator is raised with a note about the sizes that were tried."""
    task = TASKS["recurrent net"].make()
    with (
        pytest.warns(FaultWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught,
    ):
        ran(task, "auto", TASKS["recurrent net"].batches(), train_step=fitting(task.train_step, 0))
    assert caught.value.__notes__ == [
        "microbatch='auto' has tried one sample at a time, which does not fit either; use a smaller model or shorter samples",
        "This happened in step 1, after 0 steps were completed.",
    ]


def test_the_size_that_fits_is_saved_and_a_resumed_run_is_the_same(tmp_path):
    """After a split during a run, a resume from every later checkpoint is bit-identical and does not run out of memory again."""
    task, batches = tiny_task(), tiny_batches()
    begun = TrainState.create(task, seed=3)

    def step():
        fails = [False, False, True]
        return pipe(fitting(task.train_step, 3, fails=fails), grad(), microbatch("auto"), apply())

    def saved():
        return [save(state, tmp_path / f"{state.progress.step}") for state, _ in islice(run(step(), begun, batches), 6)]

    with pytest.warns(FaultWarning, match="at most 3 samples; 1 normalises over one micro-batch only from now on"):
        state = load(saved()[-1], task)
    assert state.memory["microbatch"] == {"size": 3}
    for k in (3, 4, 5):
        resumed = list(
            islice(run(pipe(task.train_step, grad(), microbatch("auto"), apply()), load(tmp_path / f"{k}", task), batches), 6 - k)
        )
        assert_trees_equal(resumed[-1][0], state)


def test_fit_splits_its_batches():
    """`FitConfig(microbatch=...)` adds the combinator after `accumulate`, and can be read back from JSON."""
    task = tiny_task()
    config = FitConfig(max_epochs=2, microbatch="auto", accumulate=2, clip_norm=1.0, device="cpu", progress=False)
    assert FitConfig.from_json(config.to_json()) == config
    with pytest.warns(FaultWarning, match="at most 3 samples"):
        found = fit(TrainState.create(attrs.evolve(task, train_step=fitting(task.train_step, 3))), tiny_batches(), config)
    chosen = fit(TrainState.create(task), tiny_batches(), attrs.evolve(config, microbatch=3))
    found.store.memory.pop("microbatch")
    assert_trees_equal(found, chosen)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "all", None])
def test_a_wrong_size_is_refused(size):
    """The combinator and the configuration refuse it; None in the configuration means no micro-batches."""
    with pytest.raises(ConfigError, match=r'microbatch must be a number of samples >= 1 or "auto"'):
        microbatch(size)
    if size is not None:
        with pytest.raises(ConfigError, match=r"FitConfig\(microbatch=...\) must be"):
            FitConfig(max_epochs=1, microbatch=size)


def seen(batch, size):
    """The micro-batches that a gradient function gets."""
    found = []

    def grad_fn(store, batches, key):
        found.extend(batches)

    microbatch(size)(grad_fn)(SimpleNamespace(place=None), (batch,), 0)
    return found


def test_batches_of_any_structure_are_split():
    """Tensors are split along their first dimension and lists of strings by sample; numbers and single values stay; sizes are even."""
    batch = {"x": torch.arange(7), "pair": [torch.arange(14).view(7, 2), torch.tensor(0.5)], "names": list("abcdefg"), "task": "digits"}
    parts = seen(batch, 3)
    assert [p.share for p in parts] == [2 / 7, 2 / 7, 3 / 7]
    assert [p.batch["names"] for p in parts] == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert torch.equal(torch.cat([p.batch["x"] for p in parts]), batch["x"])
    assert torch.equal(torch.cat([p.batch["pair"][0] for p in parts]), batch["pair"][0])
    assert {(p.batch["pair"][1].item(), p.batch["task"]) for p in parts} == {(0.5, "digits")}


class Named(NamedTuple):
    x: Any
    texts: list[str]


def test_containers_of_every_type_are_split_with_their_texts_and_arrays():
    """Named tuples, attrs objects, mappings with defaults and NumPy arrays keep their types, and everything in them is split."""
    batch = defaultdict(list, named=Named(torch.arange(4), list("abcd")), array=np.arange(8).reshape(4, 2), pair=("v1", 3))
    first, second = (p.batch for p in seen(batch, 2))
    assert (type(first), type(first["named"])) == (defaultdict, Named)
    assert (first["named"].texts, second["named"].texts) == (["a", "b"], ["c", "d"])
    assert (second["named"].x.tolist(), second["array"].tolist(), second["pair"]) == ([2, 3], [[4, 5], [6, 7]], ("v1", 3))


def test_a_batch_that_cannot_be_split_is_an_error():
    """A tensor whose first dimension is not the samples is never split wrongly."""
    with pytest.raises(StepError, match=r"a batch of 4 samples cannot be split: it has a tensor of shape \[5, 5\]"):
        seen((torch.ones(4, 2), torch.ones(5, 5)), 2)


def test_a_micro_batch_counts_with_its_share():
    """A `Mean` keeps its weight; plain losses and metrics are weighted by the share; wrong values reach the later check unchanged."""

    def taken(out):
        return plain(Part(torch.ones(3), 0.25).taken(lambda model, batch: out)[0](None, torch.ones(3)))

    assert taken(Mean(6.0, 3)) == plain(Mean(6.0, 3))
    assert taken((torch.tensor(8.0), {"acc": 0.5, "n": Mean(1, 2)})) == plain(
        [Mean(2.0, 0.25), {"acc": Mean(0.125, 0.25, (1.5, 3)), "n": Mean(1, 2)}]
    )
    assert (taken((1, 2, 3)), taken(None)) == ([1, 2, 3], None)


def test_later_combinators_can_be_in_any_order():
    """It only regroups the batches of a step, so a user's combinator gets complete gradients before and after it."""
    task, seen_norms = tiny_task("convnet"), []

    def watch(grad_fn):
        def watched(store, batches, key):
            found = grad_fn(store, batches, key)
            seen_norms.append(float(torch.nn.utils.get_total_norm(found.values)))
            return found

        return watched

    stages = [Combinator("watch", watch, "grad", "grad"), microbatch(2)]
    for order in (stages, stages[::-1]):
        pipe(task.train_step, grad(), *order, apply())(TrainState.create(task), Item((tiny_batches("convnet")[0],), 0, 1, False, 6))
    assert seen_norms[0] == seen_norms[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The warnings of two ranks, one with less memory."""
    folder = tmp_path_factory.mktemp("ranks")
    launched("fitting.py", 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def weights(found):
    """The trained values, without the buffers that each rank has for itself."""
    return {name: values for name, values in found["numbers"].items() if "running" not in name and "tracked" not in name}


def test_ranks_agree_on_the_smallest_size_that_one_of_them_needs(ranks):
    """If one rank runs out of memory, or both at different sizes, all repeat the step with one size and have the same weights afterwards."""
    for case, size, count in (("one of them", 3, 1), ("both", 3, 1), ("from the start", 3, 0), ("none", None, 0)):
        for rank in (0, 1):
            assert ranks[rank][case]["size"] == size, case
            assert len(ranks[rank][case]["warned"]) == count, case
        assert weights(ranks[0][case]) == weights(ranks[1][case]), case


def test_a_repeated_step_of_ranks_equals_the_size_from_the_start(ranks):
    """Bit-identical to a run with that size from the start, also in buffers; equal to such a run with the all-reduce of torch."""
    for rank in (0, 1):
        assert ranks[rank]["one of them"]["numbers"] == ranks[rank]["from the start"]["numbers"]
    expected, found = weights(ranks[0]["a number"]), weights(ranks[0]["from the start"])
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-5, atol=1e-7)


def test_ranks_with_a_sharded_model_refuse_auto(ranks):
    """A rank cannot repeat a step alone, so the first step is an error on all ranks."""
    for rank in (0, 1):
        assert "repeats a step that ran out of memory, but a rank of fsdp(" in ranks[rank]["fsdp"]


@pytest.mark.parametrize(
    "batch", [torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1)]), (torch.ones(4, 1), SimpleNamespace(to=max)), object()]
)
def test_a_batch_that_cannot_be_parted_is_refused(batch):
    """It would be taken whole, and the memory would not suffice after all."""
    step = pipe(lambda model, batch: {}, grad(), microbatch(2), apply())
    with pytest.raises(StepError, match="microbatch cannot part a"):
        step(TrainState.create(tiny_task()), batch)
