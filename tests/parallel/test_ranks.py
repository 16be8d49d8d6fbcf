"""Ranks that differ are refused, events happen at the same step on all ranks, and there are other ways to reduce gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fnlight as fl
from fnlight.errors import ConfigError
from fnlight.parallel import Pulse, World, ddp, diloco, exact_ranks
from fnlight.triggers import steps
from tests.parallel.launch import ROOT, ran
from tests.parallel.things import exact, gone_back, loader, measured
from tests.parallel.trajectories import numbers, task


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks say."""
    folder = tmp_path_factory.mktemp("things")
    ran("things.py", 2, "all", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "what, says",
    [
        ("seeds", "rank 1 and rank 0 differ in their seed: 4 and 3; give TrainState.create(task, seed=...) the same number"),
        ("code", "rank 1 and rank 0 differ in their code; run the same version of the script"),
        ("data", "rank 1 and rank 0 differ in their samples: 23 and 24; give all ranks the same data"),
        ("config", "rank 1 and rank 0 differ in their config"),
        ("names", "ranks must give metrics of the same names, but rank 0 gave ['loss', 'of 0'], and these differ: {1: ['of 0', 'of 1']}"),
        ("more ranks than samples", "batch_size=1 is the global batch size, so some ranks would have no samples; use a batch_size of at least 2"),
        ("placed later", "shards parameters, which must be done before the optimizer is built"),
        ("devices", "needs the model on one device per rank, but it is on ['cpu', 'meta']"),
        ("one value", "BatchNorm needs more than one value per channel in training"),
        ("norms", "because the other ranks take part in every forward pass; give a number of samples"),
        ("bundle", "debug_bundle works in one process"),
        ("carry", "carry keeps a value for the samples of each process"),
        ("cache", "grad_cache computes one loss over all samples of a step"),
        ("predict", "predict(signals=...) works in one process"),
        ("diloco", "create the state with place=fl.parallel.local_sgd()"),
        ("sides", "uneven parts of loaders that are zipped"),
        ("hosts", "several processes have local rank 0 on"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_on_all_ranks(what, says, found):
    """Every rank says what is wrong, and what to do; none waits for another."""
    for each in found:
        assert says in each["refused"][what]


def test_one_pipe_gives_each_state_the_data_of_its_own_placement(found):
    """A state on two ranks evaluates a half on each, and one that this process has alone all of it, with the same pipe in turn."""
    mine, together = zip(*(each["one pipe"][0] for each in found), strict=True)
    assert sum(mine) == 24
    assert 24 not in mine
    assert together == (24, 24)
    for each in found:
        assert each["one pipe"][1] == [24, 24]
        assert each["one pipe"][2] == each["one pipe"][0]


def test_two_launchers_may_share_a_machine_without_accelerators(found):
    """Each counts its processes from 0 on, and says which node it takes itself for."""
    assert [each["refused"]["launchers"] for each in found] == [None, None]


def test_a_rank_that_is_waited_for_in_vain_is_named_wherever_that_is():
    """Beside the steps of a run, which say so themselves: before the first of them, in an evaluation, after a prediction, and at the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "tests/parallel/waiting.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    places = {"start": "before the first step", "evaluation": "in an evaluation", "prediction": "after a prediction", "end": "at the end"}
    said = json.loads(done.stdout)
    assert said.keys() == places.keys()
    for place, where in places.items():
        assert said[place].startswith(f"ParallelError: rank 0 of 2 timed out waiting for the other ranks {where} ("), said[place]


def test_what_one_rank_learns_happens_on_all_at_one_step(found):
    """A signal to one of them, in training or in an evaluation, which that one leaves at once; a limit of time by clocks that differ, and data that ends for one of them first."""
    first, second = (each["agreed"] for each in found)
    assert first["signal"] == second["signal"]
    assert first["signal"][0] == "SIGTERM"
    assert first["evaluation"] == ["SIGTERM", 1, 0, 6]
    assert second["evaluation"] == ["SIGTERM", 1, 0, 2]
    assert first["sharded evaluation"] == second["sharded evaluation"] == ["Interrupted", 6]
    assert first["time"] == second["time"]
    assert first["lengths"] == second["lengths"] == [6, 2 * 2 * 12]


def test_each_rank_computes_its_part_of_a_batch(found):
    """Batches of eight on two ranks are four here and four there."""
    assert [set(each["agreed"]["parts"]) for each in found] == [{4}, {4}]


def test_a_checkpoint_holds_the_metrics_of_all_ranks(found):
    """A run that goes on in the middle of an epoch has the history of one that was never interrupted, bitwise."""
    assert [each["kept"] for each in found] == [[True, 4]] * 2


def test_what_one_rank_has_brings_all_of_them_back(found, tmp_path):
    """A loss that is no number on one of them: all go back to the same checkpoint, whatever they hold of it, and end where one process does."""
    weights, *rest = dict(gone_back(tmp_path, ("ddp",)))["ddp"]
    assert rest[1] > 0
    assert len(rest[2]) == 3  # once an epoch
    for each in found:
        for placed in ("ddp", "fsdp"):
            mine, *others = each["gone back"][placed]
            assert others == rest
            for name, values in weights.items():
                assert mine[name] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_gradients_may_travel_in_other_ways(found):
    """In sixteen bits, which is close; in small buckets, which is the same. All ranks hold the same weights."""
    a, b = (each["others"] for each in found)
    assert a == b
    for key, value in a["buckets"].items():
        assert torch.allclose(torch.tensor(a["bf16"][key]), torch.tensor(value), atol=0.1)
        assert a["bf16"][key] != value


def test_ranks_that_meet_now_and_then_learn_as_well(found):
    """Local SGD and DiLoCo: after a meeting all hold the same weights, which are better than the first."""
    untrained = fl.evaluate(fl.TrainState.create(task()), loader(), eval_step=measured)["loss"]
    for name in ("diloco", "local sgd"):
        weights, loss = found[0]["others"][name]
        assert found[1]["others"][name] == [weights, loss]
        assert weights != numbers(dict(task().model.named_parameters()))
        assert loss < 0.95 * untrained


@pytest.mark.parametrize("step", ["plain", "weighted"])
def test_exact_ranks_are_bitwise_those_of_one_process(step, found):
    """One process, two ranks and four give the very same weights, with dropout, uneven batches, clipping and accumulation."""
    assert [each["exact"][step] for each in found] == [exact(step)] * 2


def test_exact_ranks_are_bitwise_on_four(tmp_path):
    """Four ranks too."""
    ran("things.py", 4, "exact", tmp_path)
    assert json.loads((tmp_path / "3.json").read_text())["exact"] == {step: exact(step) for step in ("plain", "weighted")}


def test_numbers_that_make_no_sense_are_refused():
    """Parts that are no power of two, a number in place of a trigger, a hook that is none."""
    with pytest.raises(ConfigError, match="must be a power of two, such as 8, but got 6"):
        exact_ranks(parts=6)
    with pytest.raises(TypeError, match=r"diloco\(every=...\) must be a trigger .* but got int: 100; write fl.steps\(100\)"):
        diloco(100)
    with pytest.raises(ConfigError, match="momentum in 0..1, but got lr=0.7, momentum=1"):
        diloco(steps(2), momentum=1)
    with pytest.raises(ConfigError, match=r"comm_hook=\.\.\.\) must be one of 'bf16', 'fp16'"):
        ddp(comm_hook="fp8")


def test_a_pulse_stands_still_between_agreements():
    """Ranks agree more and more rarely while steps are short, so that it costs nothing."""
    asked = []
    pulse = Pulse(World(), lambda: asked.append(0) or len(asked) * 0.001, None)
    shown = [pulse() for _ in range(1000)]
    assert len(asked) < 20
    assert shown == sorted(shown)
