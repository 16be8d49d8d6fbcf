"""A sample of the campaign in `manifests`, the same in every run of the suite; and what single readers do with a head that is none."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fnlight as fl
from fnlight import FitConfig, TrainState, checkpoints, fit, last, load, newest, restore, steps, verify
from fnlight.cli import run
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning
from fnlight.testing import tiny_batches, tiny_task
from tests.checkpoint.tasks import forge
from tests.fuzz.manifests import VALUES, Campaign, attempts, places

EVERY = 997
"""Of all changes, every so many-th is tried: a prime number, so that neither fields nor values are left out."""


def test_every_reader_gives_the_right_answer_to_a_sample_of_changed_manifests(tmp_path: Path) -> None:
    """Whatever value a field has, all readers agree: an error of one line that names file and field, or a sound checkpoint."""
    campaign = Campaign(tmp_path)
    ends, wrong, sections, values = [], list[str](), set[Any](), set[str]()
    for number, (kind, at, value) in enumerate(attempts(campaign.kinds)):
        if number % EVERY == 0:
            answer, found = campaign(kind, at, value)
            ends.append(answer)
            wrong += found
            sections.add(at[0])
            values.add(value)
    assert not wrong, "\n".join(wrong[:20])
    assert min(ends.count("refused"), ends.count("sound")) > 10, "both answers must be tried"
    assert {"progress", "history", "optimizer", "memory", "files", "times", "parameters"} <= sections
    assert values >= VALUES.keys()


def test_the_campaign_begins_with_sound_manifests(tmp_path: Path) -> None:
    """What is changed is read before it is changed, and there is a field of every section."""
    campaign = Campaign(tmp_path)
    assert [kind.name for kind in campaign.kinds if verify(kind.path)] == []
    assert {at[0] for kind in campaign.kinds for at in places(kind.body)} >= {"progress", "seed", "layouts", "extra", "buffers", "times"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of six steps with three checkpoints."""
    config = FitConfig(max_epochs=2, dir=tmp_path / "run", save_every=steps(2), keep=last(3), device="cpu", progress=False)
    fit(TrainState.create(tiny_task()), tiny_batches(), config)
    return tmp_path / "run"


HEADS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no progress": (lambda body: body.update(progress=None), "progress must be"),
    "a seed below 0": (lambda body: body.update(seed=-1), "seed must be a whole number of at least 0, but is -1"),
    "a step below 0": (lambda body: body["progress"].update(step=-5), r"progress\.step must be a whole number of at least 0, but is -5"),
    "no optimizer": (lambda body: body.pop("optimizer"), "the section 'optimizer' is missing"),
    "layouts of another type": (lambda body: body.update(layouts=3), "layouts must be a list, but is 3"),
    "a slot that is no tensor": (lambda body: body["optimizer"]["slots"]["0.weight"].update(exp_avg=3), r"slots\.0\.weight\.exp_avg must be a tensor"),
    "a slot of another shape": (
        lambda body: body["optimizer"]["slots"]["0.weight"].update(exp_avg=body["optimizer"]["slots"]["0.bias"].pop("exp_avg")),
        r"slots\.0\.weight\.exp_avg must be a tensor",
    ),
    "a rate that is a text": (lambda body: body["optimizer"]["groups"][0]["values"].update(lr="fast"), r"groups\.0\.values\.lr must be of the kind"),
    "a time below 0": (lambda body: body["times"].update(data=-1.0), r"times\.data must be a number of at least 0"),
    "a metric that is a text": (lambda body: body["history"].append([6, 2, {"a": "x"}]), r"history\.\d\.a must be a number"),
    "a list of saved steps that is none": (lambda body: body["memory"]["checkpoint_every"].update(saved=[None]), r"memory\.checkpoint_every\.saved"),
    "a depth of 600": (lambda body: body["memory"].update(x=VALUES["depth"]), r"memory\.x: it is nested more than 100 deep"),
    "more in the tensors than in the file": (
        lambda body: body["files"]["model.safetensors"]["tensors"].update(x=["float32", [1 << 40]]), "of which its tensors take"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", HEADS)
def test_a_head_that_is_none_is_named_by_all_and_the_run_goes_on_from_the_checkpoint_before(folder: Path, change: str) -> None:
    """What `load` refuses, `verify`, `newest` and the command line refuse in the same words, and a run falls back."""
    alter, says = HEADS[change]
    (_, before), (_, path) = checkpoints(folder)[-2:]
    forge(path, alter)
    assert len(verify(path)) == 1
    for reader in (lambda: load(path, tiny_task()), lambda: restore(path, TrainState.create(tiny_task()))):
        with pytest.raises(
            BrokenCheckpointError, match=rf"step-00000006 is broken: state\.json has content that fnlight does not write: .*{says}"
        ):
            reader()
    with pytest.warns(CheckpointWarning, match=f"skipped a broken checkpoint: .*{says}"):
        assert newest(folder) == before
    with pytest.warns(CheckpointWarning, match=f"skipped a broken checkpoint: .*{says}"):
        state = fit(TrainState.create(tiny_task()), tiny_batches(), FitConfig(max_epochs=2, dir=folder, resume=True, progress=False))
    assert state.progress.step == 6
    assert verify(path) == [], "it was written again"


def test_what_only_the_task_can_refuse_is_passed_over_too(folder: Path) -> None:
    """A checkpoint that is sound for all who do not know the task, but not for it, does not end the search for one that is."""

    def refuse(state: Any) -> None:
        if state != "of step 2":
            raise RuntimeError("not this one")

    (_, first), (_, second), _ = checkpoints(folder)
    shutil.rmtree(checkpoints(folder)[-1][1])
    for path, told in ((first, "of step 2"), (second, "of step 4")):
        forge(path, lambda body, told=told: body.update(extra={"": told}))
    task = tiny_task()
    kind = type(task.model)
    task.model.__class__ = type(
        "Told", (kind,), {"get_extra_state": lambda self: None, "set_extra_state": lambda self, state: refuse(state)}
    )
    assert newest(folder) == second
    with pytest.warns(
        CheckpointWarning, match=r"set_extra_state of the model refuses what is in state\.json under extra\.: .*not this one"
    ):
        assert load(folder, task).progress.step == 2


def test_a_history_of_texts_is_refused_before_it_is_written(tmp_path: Path) -> None:
    """What could not be read is not written."""
    state = TrainState.create(tiny_task()).recorded({"val/loss": "low"})  # pyright: ignore[reportArgumentType]  # on purpose
    with pytest.raises(CheckpointError, match=r"history of step 0/val/loss is 'low', but a history holds numbers by name; record float"):
        fl.save(state, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_two_optimizers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each group has a row, with the name of its optimizer."""
    campaign = Campaign(tmp_path)
    (path,) = [kind.path for kind in campaign.kinds if kind.name == "two optimizers"]
    assert run(["inspect", str(path)]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if " group " in line] == [
        ["a", "group", "0", "Adam,"], ["b", "group", "0", "SGD,"],
    ]  # fmt: skip


def test_names_from_files_do_not_reach_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a terminal would obey is printed as an escape, in tables and in errors."""
    path = checkpoints(folder)[-1][1]
    forge(path, lambda body: body.update(stopped="a\x1b[31mb\nc"))
    assert run(["inspect", path]) == 0
    shutil.rmtree(checkpoints(folder)[0][1])
    forge(path, lambda body: body["history"].append([6, 2, {"a\x1b[31m": "x"}]))
    assert run(["inspect", path]) == 2
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert r"a\x1b[31mb\nc" in told.out
    assert told.err.count("\n") == 1
