"""`fsdp`: a sharded model trains as the whole model does in one process, and as torch's own loop does."""

import json

import pytest
import torch

import fnlight as fl
from fnlight.errors import ConfigError, ParallelError
from fnlight.parallel import fsdp, hsdp
from tests.laws.combinators import ENTRIES
from tests.parallel import sharded
from tests.parallel.launch import ran
from tests.parallel.steps import weighted


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks say."""
    folder = tmp_path_factory.mktemp("two")
    ran("sharded.py", 2, "two", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four ranks say."""
    folder = tmp_path_factory.mktemp("four")
    ran("sharded.py", 4, "four", folder)
    return json.loads((folder / "3.json").read_text())


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(torch.tensor(a[n]), torch.tensor(b[n]), rtol=1e-5, atol=1e-6) for n in b)


@pytest.mark.parametrize("name", ["plain", "accumulated", "bf16"])
def test_fsdp_is_bitwise_what_torch_alone_does(found, name):
    """Means over ranks, gradients that come together once a group, and mixed precision are those of a loop around `fully_shard`."""
    assert found[0][name] == found[0][f"torch {name}"]


def test_the_norm_is_that_of_all_parts(found):
    """Clipping sees the joint norm over ranks, as torch does and as one process does."""
    alone = sharded.by_hand(None, fl.clip_norm(0.1))
    assert close(found[0]["clipped"], alone)
    assert close({n: v for n, v in found[0]["clipped"].items() if n != "grad_norm"}, found[0]["torch clipped"])


def test_two_ranks_train_as_one_process(found):
    """Half a batch on each of two ranks is the whole batch on one; five samples here and three there count as eight."""
    assert close(found[0]["plain"], sharded.by_hand())
    assert close(found[0]["accumulated"], sharded.by_hand(None, fl.accumulate(2), group=2))
    assert close(found[0]["counted"], sharded.by_hand(None, fl.accumulate(2), loss_fn=weighted, group=2, sizes=[8]))
    assert close(found[0]["offloaded"], sharded.by_hand())


def test_batchnorm_sees_the_samples_of_all_ranks_on_request(found, four):
    """Five samples here and three there are normalized as the eight of one process, whatever else is cut."""
    alone = sharded.by_hand(None, loss_fn=weighted, sizes=[8], optimizer=sharded.sgd, normed=True, buffers=True)
    assert close(found[0]["synced"], alone)
    assert close(found[0]["synced, of torch"], alone)
    assert close(four["synced, tensor parallel"], alone)
    assert not close(found[0]["normed"], sharded.by_hand(normed=True))


@pytest.mark.parametrize("own", [False, True])
def test_ranks_part_their_batches_into_as_many_parts(found, own):
    """`microbatch` makes as many passes on a rank with fewer samples, where every pass is one of all ranks; what stands in counts nothing."""
    assert close(found[0]["parted, own data" if own else "parted"], sharded.parted(own=own))


def test_ranks_hold_the_same_weights(found):
    """Whatever rank asks for the whole gets the same whole, with the statistics of BatchNorm that one of them has measured."""
    for name in ("plain", "clipped", "normed", "scaled", *sharded.LAWS):
        assert found[0][name] == found[1][name], name


@pytest.mark.parametrize("name", sharded.LAWS)
def test_combinators_do_to_parts_what_they_do_to_the_whole(found, tmp_path, name):
    """Norms of a parameter, of its rows, noise, averages and frozen parts are those of whole tensors."""
    assert close(found[0][name], sharded.with_entry(name, None, tmp_path))


def test_steps_that_overflow_in_one_part_are_left_out_by_all(found):
    """A scale that is too large backs off on both ranks at the same steps, so their weights stay equal, and finite."""
    assert all(torch.isfinite(torch.tensor(v)).all() for v in found[0]["scaled"].values())
    assert found[0]["scaled"] != found[0]["plain"]


def test_a_sharded_state_is_a_value(found):
    """It is copied, and both go on alike; evaluation, prediction and `module()` see the whole and leave no trace."""
    first, second = (each["values"] for each in found)
    assert first["kept"]
    assert first["same"]
    assert first["whole"]
    assert first["untouched"]
    assert first["module"] == second["module"] == first["predicted"] == second["predicted"]
    assert first["scores"] == second["scores"]
    assert first["scores"][0] != first["scores"][1]


def test_every_rank_holds_a_part(found):
    """Seven rows are four here and three there: of the weight, of the optimizer's memory and of its average."""
    for each, rows in zip(found, (4, 3), strict=True):
        assert each["values"]["parts"] == [[rows, 4]]
        assert each["values"]["memory"] == each["values"]["average"] == [rows, 4]


@pytest.mark.parametrize("name", ["hsdp", "tensor parallel"])
def test_other_meshes_train_as_one_process(four, name):
    """Groups that replicate, and layers that are cut: clipped by the joint norm, with averages."""
    assert close(four[name], sharded.by_hand(None, fl.clip_norm(0.1), fl.ema(0.9)))


def test_uneven_parts_count_with_their_samples_on_every_mesh(four):
    """Five samples here and three there, each on ranks that have cut a layer between them."""
    alone = sharded.by_hand(None, fl.clip_norm(0.1), fl.ema(0.9), loss_fn=weighted, sizes=[8])
    assert close(four["counted, tensor parallel"], alone)


@pytest.mark.parametrize("name", ["clip_each", "clip_adaptive", "grad_noise"])
def test_combinators_know_both_cuts(four, tmp_path, name):
    """A weight that is cut along rows and columns has the norms and the noise of the whole."""
    assert close(four[f"{name}, tensor parallel"], sharded.by_hand(None, ENTRIES[name].build(tmp_path, None)))


def test_ranks_that_share_a_batch_end_at_the_same_step(four):
    """A clock or a signal of one rank ends all of a mesh at one step, those with parts of the same weights among them, and all go on from there."""
    assert all(each == four["ends"][0] for each in four["ends"])
    timed, ended, gone_on = four["ends"][0]
    assert timed[0].endswith("seconds of training done")
    assert ended[0] == "SIGTERM"
    assert gone_on[1] == ended[1] + 2


@pytest.mark.parametrize(
    "name, says",
    [
        ("mesh", "ParallelError: a mesh of {'data': 3} needs 3 processes, but 2 have joined"),
        ("dimensions", "ParallelError: a mesh needs one data dimension, or two (the first replicates, the second shards)"),
        (
            "state",
            "ParallelError: this placement shards a model before its optimizer is built, but got a TrainState; give it to fl.TrainState.create",
        ),
        ("cut", "ParallelError: the model is sharded already"),
        ("devices", "ParallelError: a placement needs the model on one device per rank, but it is on ['cpu', 'meta']"),
        ("moved", "ParallelError: a state that is placed on several processes stays on cpu"),
        ("partly", "StepError: the loss function computes with sharded parameters that were not gathered"),
        ("closure", "ParallelError: LBFGS needs all gradients as one flat tensor"),
        ("plan", "ParallelError: tensor_parallel= names ['block.*'], but the model has no such modules"),
        ("hook", "ParallelError: the gradient of first.weight has a hook, which a sharded parameter loses"),
        ("no tensor", "ParallelError: tensor_parallel= needs a mesh with a dimension called 'tensor'"),
        ("method", "ParallelError: fsdp(methods=['encode']): Net has no such method"),
    ],
)
def test_what_makes_no_sense_is_refused(found, name, says):
    """Before any work, on all ranks alike, with what to do."""
    assert found[0]["refusals"][name] == found[1]["refusals"][name]
    assert found[0]["refusals"][name].startswith(says)


def test_options_are_checked_at_once(monkeypatch):
    """A placement that means nothing is no placement; one that does nothing alone says so."""
    with pytest.raises(
        ConfigError, match=r"fsdp\(mixed_precision=\.\.\.\) must be 'bf16', 'fp16' or a MixedPrecisionPolicy of torch, but got 'int8'"
    ):
        fsdp(mixed_precision="int8")
    with pytest.raises(ConfigError, match=r"fsdp\(reshard=\.\.\.\) must be True, False, a number of ranks, or None"):
        fsdp(reshard="always")
    with pytest.raises(ConfigError, match=r"fsdp\(policy=\.\.\.\) must be a tuple of classes"):
        fsdp(policy=3)
    with pytest.raises(ConfigError, match=r"fsdp\(tensor_parallel=\.\.\.\) must map names of modules to styles"):
        fsdp(tensor_parallel=["up"])
    with pytest.raises(ParallelError, match=r"sets mixed_precision=, but this process is alone"):
        fsdp(mixed_precision="bf16").place(torch.nn.Linear(1, 1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ParallelError, match=r"LOCAL_WORLD_SIZE='' does not say how many of the 1 processes each has"):
        hsdp()
