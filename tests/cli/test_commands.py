"""The commands: what they find, what they change, and that a user's mistake is one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

import fnlight as fl
from fnlight import FitConfig, Loaders, TrainState, checkpoints, fit, last, load, save, steps
from fnlight.cli import run
from fnlight.cli.checks import decisive
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """A run of nine steps with four checkpoints."""
    config = FitConfig(max_epochs=3, ema=0.5, dir=tmp_path / "run", save_every=steps(2), keep=last(4), device="cpu", progress=False)
    fit(TrainState.create(tiny_task()), Loaders(train=tiny_batches(), val=tiny_batches(seed=1)), config)
    return tmp_path / "run"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of the user's."""
    text = "from fnlight.testing import tiny_batches, tiny_task\nimport fnlight as fl\ntask = tiny_task()\nloaders = fl.Loaders(train=tiny_batches(), val=tiny_batches(seed=1))\nother = tiny_batches(seed=2)\ndef both():\n    return task, loaders\ndef fails():\n    return 1 / 0\nnumber = 3\n"
    (tmp_path / "users.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "users"
    sys.modules.pop("users", None)


def called(capsys, *args):
    """The exit code of a command, and what it printed."""
    code = run([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_verify_names_every_kind_of_damage(folder, capsys):
    """A flipped bit, a missing file and a NaN are each found and named, and the exit code is 1."""
    places = [path for _, path in checkpoints(folder)]
    data = bytearray((Path(places[0]) / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (Path(places[0]) / "model.safetensors").write_bytes(data)
    (Path(places[1]) / "optimizer.safetensors").unlink()
    state = load(places[2], tiny_task())
    with torch.no_grad():
        state.store.named["0.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    save(state, places[2])
    code, out, _ = called(capsys, "verify", folder)
    assert code == 1
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert "model.safetensors is altered" in lines[places[0]]
    assert "optimizer.safetensors is missing" in lines[places[1]]
    assert lines[places[2]] == "0.weight in model.safetensors has 2 of 32 values that are NaN or infinite"
    assert lines[places[3]] == "valid"
    assert called(capsys, "verify", places[3])[0] == 0


def test_weights_that_were_exported_into_a_run_hide_nothing_of_it(folder, capsys):
    """Every command takes the directory for the run that it still is."""
    before = [called(capsys, command, folder) for command in ("verify", "inspect")]
    assert called(capsys, "export", folder, folder / "model.safetensors")[0] == 0
    assert [called(capsys, command, folder) for command in ("verify", "inspect")] == before
    assert [code for code, _, _ in before] == [0, 0]


def test_verify_by_replay_finds_steps_that_cannot_be_repeated(folder, code, capsys):
    """Trained again with the same code and data, the newest checkpoint is met to the bit; with other data it is not."""
    assert called(capsys, "verify", folder, "--replay", 2, "--task", "users:both")[0] == 0
    found = called(capsys, "verify", folder, "--replay", 5, "--task", "users:task", "--loaders", "users:loaders")
    assert found == (0, f"{folder}: 5 steps from step 4 to 9 trained again: 33 tensors bit-identical\n", "")
    found = called(capsys, "verify", folder, "--replay", 2, "--task", "users:task", "--loaders", "users:other")
    assert found[0] == 1
    assert "give a different result than" in found[1]
    assert "model/0.weight" in found[1]
    assert sorted(os.listdir(folder / "checkpoints")) == [f"step-{n:08d}" for n in (4, 6, 8, 9)], "a replay writes nothing"


def test_diff_says_how_far_tensors_are_apart(tmp_path, capsys):
    """Differences are to the bit, with the sign of zero, and say what stands on one side only."""
    save_file({"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2), "c": torch.zeros(1)}, tmp_path / "a")
    save_file({"a": torch.tensor([1.5, -0.0]), "b": torch.zeros(3), "d": torch.zeros(1)}, tmp_path / "b")
    code, out, _ = called(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["a", "[2]", "2", "of", "2", "0.5", "0.333"], ["b", "float32", "[2]", "against", "float32", "[3]"],
        ["c", "only", "in", "the", "first"], ["d", "only", "in", "the", "second"],
    ]  # fmt: skip
    assert called(capsys, "diff", tmp_path / "a", tmp_path / "a") == (0, "3 tensors bit-identical\n", "")


def test_export_writes_what_load_would_give(folder, tmp_path, capsys):
    """The file holds parameters and buffers, or the averaged weights in the place of the parameters, bitwise."""
    state = load(folder, tiny_task())
    assert called(capsys, "export", folder, tmp_path / "a.safetensors")[0] == 0
    assert called(capsys, "export", folder, tmp_path / "b.safetensors", "--weights", "ema")[0] == 0
    assert_trees_equal(load_file(tmp_path / "a.safetensors"), {**state.params, **state.buffers})
    assert_trees_equal(load_file(tmp_path / "b.safetensors"), {**state.params, **state.buffers, **state.memory["ema"]})
    code, _, err = called(capsys, "export", folder, tmp_path / "a.safetensors")
    assert (code, err) == (2, f"fnlight: {tmp_path / 'a.safetensors'} exists; give another name, or pass --overwrite\n")
    assert called(capsys, "export", folder, tmp_path / "a.safetensors", "--overwrite", "--weights", "ema")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "run"]


def test_prune_refuses_a_metric_that_the_run_has_not(folder, capsys):
    """A typing error in a name would leave only the newest."""
    code, _, err = called(capsys, "prune", folder, "--keep", "last(1) | best('val/nope')", "--yes")
    assert code == 2
    assert "--keep needs 'val/nope', but the history of this run has" in err
    assert len(checkpoints(folder)) == 4


def test_prune_touches_only_what_the_run_has_saved(folder, capsys, monkeypatch):
    """Foreign checkpoints stay, the newest stays, and without --yes somebody has to agree."""
    foreign = save(load(folder, tiny_task()), folder / "checkpoints" / "step-00000001")
    assert called(capsys, "prune", folder, "--keep", "every(4)", "--dry-run")[0] == 0
    assert len(checkpoints(folder)) == 5
    code, _, err = called(capsys, "prune", folder, "--keep", "every(4)")
    assert code == 2
    assert "there is no terminal for the question; pass --yes" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
    assert called(capsys, "prune", folder, "--keep", "every(4)")[0] == 1
    assert len(checkpoints(folder)) == 5
    monkeypatch.setattr(sys.stdin, "readline", lambda: "y\n", raising=False)
    code, out, _ = called(capsys, "prune", folder, "--keep", "every(4)")
    assert (code, out.splitlines()[-1]) == (0, "remove 1 checkpoint? [y/N] 1 checkpoint removed")
    assert [step for step, _ in checkpoints(folder)] == [1, 4, 8, 9]
    assert os.path.isdir(foreign)


def saved(folder, *savers):
    """Train three steps with combinators that save."""
    state = TrainState.create(tiny_task())
    for _ in fl.run(fl.pipe(state.task.train_step, fl.grad(), fl.apply(), *savers, fl.stop_when(fl.max_steps(3))), state, tiny_batches()):
        pass
    return folder


def test_prune_finds_what_a_run_has_saved_under_any_name(tmp_path, capsys):
    """A saver may have another name; of two of them, nobody can say which one this directory belongs to, so nothing is removed."""
    one = saved(tmp_path / "one", fl.checkpoint_every(tmp_path / "one", steps(1), keep=last(3), name="often"))
    assert called(capsys, "prune", one, "--keep", "last(1)", "--yes")[0] == 0
    assert [step for step, _ in checkpoints(one)] == [3]
    both = [fl.checkpoint_every(tmp_path / name, steps(1), keep=last(3), name=name) for name in ("two", "three")]
    two = saved(tmp_path / "two", *both)
    code, _, err = called(capsys, "prune", two, "--keep", "last(1)", "--yes")
    assert code == 2
    assert "does not list the checkpoints that its run has saved, so none is removed (found 2 lists, needs one)" in err
    assert [step for step, _ in checkpoints(two)] == [1, 2, 3]


MISTAKES = [
    (["inspect", "nowhere"], "no checkpoint at nowhere: there is no such directory"),
    (["verify", "nowhere"], "no checkpoint at nowhere: there is no such directory"),
    (["verify", "{run}", "--task", "users:task"], "--task, --loaders and --config need --replay"),
    (["verify", "{run}", "--replay", "2"], "--replay trains again, so it needs your code"),
    (["verify", "{run}", "--replay", "8", "--task", "users:both"], "needs a checkpoint of step 1 or before, but {run} has [4, 6, 8, 9]"),
    (["verify", "{run}", "--replay", "2", "--task", "users"], "'users' is not of the form module:name"),
    (
        ["verify", "{run}", "--replay", "2", "--task", "users:missing"],
        "users:missing fails: AttributeError: module 'users' has no attribute",
    ),
    (["verify", "{run}", "--replay", "2", "--task", "nonsense:a"], "nonsense:a fails: ModuleNotFoundError: No module named 'nonsense'"),
    (["verify", "{run}", "--replay", "2", "--task", "users:fails"], "users:fails fails: ZeroDivisionError: division by zero ("),
    (["verify", "{run}", "--replay", "2", "--task", "users:number"], "users:number is or returns int, but must be a Task"),
    (["diff", "{run}", "nowhere"], "no checkpoint at nowhere"),
    (["diff", "users.py", "{run}"], "users.py cannot be read as a safetensors file"),
    (["export", "{run}", "a.safetensors", "--weights", "swa"], "has no averaged weights of that name; its memory has ['ema'"),
    (["export", "{run}", "s3://b/a.safetensors"], "is a URL; give a path"),
    (["export", "{run}", "no/such/folder/a.safetensors"], "there is no directory"),
    (["prune", "{run}", "--keep", "steps(3)"], "--keep must be a retention such as"),
    (["prune", "{run}", "--keep", "__import__('os')"], "cannot read __import__('os')"),
]


@pytest.mark.parametrize(("args", "says"), MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(args, says, folder, code, capsys):
    """No traceback for what a user can put right: what was wrong, and what to do."""
    found, _, err = called(capsys, *(arg.format(run=folder) for arg in args))
    assert found == 2
    assert err.startswith("fnlight: ")
    assert err.count("\n") == 1, err
    assert says.format(run=folder) in err


def test_a_broken_checkpoint_that_is_passed_over_is_mentioned(folder, capsys):
    """Warnings are lines on the standard error."""
    (Path(checkpoints(folder)[-1][1]) / "model.safetensors").unlink()
    code, out, err = called(capsys, "inspect", folder)
    assert code == 0
    assert "step-00000009  broken" in out
    assert err.startswith("fnlight: skipped a broken checkpoint")


def test_a_checkpoint_says_what_its_time_went_to(tmp_path, capsys):
    """The steps' share of all runs, and what took the most of the rest; a state that no run has seen says nothing."""

    def shown(path):
        return next(line.split(maxsplit=1)[1] for line in called(capsys, "inspect", path)[1].splitlines() if line.startswith("goodput"))

    state = TrainState.create(tiny_task())
    assert shown(save(state, tmp_path / "a")) == "-"
    spent = state.store.wall_time
    spent.total, spent.data, spent.lost, spent.save, spent.runs = 100.0, 20.0, 10.0, 0.1, 2
    assert shown(save(state, tmp_path / "b")) == "70% of 100.0 s in 2 runs, 20% data, 10% lost"


def test_masks_of_infinities_are_no_damage(tmp_path, capsys):
    """A buffer may hold infinities, as masks do, but no NaN."""
    task = tiny_task()
    task.model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert called(capsys, "verify", save(TrainState.create(task), tmp_path / "a"))[0] == 0
    task.model.mask.fill_(float("nan"))
    assert called(capsys, "verify", save(TrainState.create(task), tmp_path / "b"))[0] == 1


def test_a_terminal_gets_tables_in_colour(folder, monkeypatch, capsys):
    """With a terminal there are lines and colours, in a pipe neither."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in called(capsys, "inspect", folder)[1]
    monkeypatch.delenv("FORCE_COLOR")
    plain = called(capsys, "inspect", folder)[1]
    assert "\x1b[" not in plain
    assert not any(line != line.rstrip() for line in plain.splitlines())


def test_the_module_is_a_program(folder):
    """``python -m fnlight`` exits with the code of the command."""
    done = [
        subprocess.run([sys.executable, "-m", "fnlight", "verify", path], cwd=ROOT, capture_output=True, text=True)
        for path in (str(folder), "nowhere")
    ]
    assert [each.returncode for each in done] == [0, 2]
    assert done[1].stderr.count("\n") == 1


def test_the_state_that_was_exported_is_the_newest_sound_one(folder, tmp_path, capsys):
    """What is exported of a run is what resuming would go on from."""
    state = load(folder, tiny_task())
    save(attrs.evolve(state, progress=attrs.evolve(state.progress, step=12)), folder / "checkpoints" / "step-00000012")
    (folder / "checkpoints" / "step-00000012" / "state.json").unlink()
    called(capsys, "export", folder, tmp_path / "a.safetensors")
    assert_trees_equal(load_file(tmp_path / "a.safetensors")["0.weight"], state.params["0.weight"])


def test_a_run_that_could_go_back_is_replayed_without_a_place_to_go_back_to() -> None:
    """Steps are trained again without files, so a NaN among them is an error; the rest of the configuration stands."""
    chosen = decisive(FitConfig(max_epochs=1, dir="runs/a", nonfinite="rollback", max_nonfinite=2, clip_norm=1.0), 5)
    assert (chosen.nonfinite, chosen.max_nonfinite, chosen.dir, chosen.clip_norm) == ("raise", None, None, 1.0)


def test_whatever_a_run_says_about_files_is_no_matter_when_it_is_replayed() -> None:
    """Fields that make sense only beside a directory are left out, each of them."""
    config = FitConfig(
        max_epochs=1, dir="runs/a", resume=True, allow="optimizer", rename={"a": "b"}, permanent=steps(3), save_in_background=False,
        save_every=steps(2), keep=last(3), debug_bundle=True, profile_steps=(1, 2),
    )  # fmt: skip
    assert decisive(config, 7) == FitConfig(max_steps=7, progress=False, donate=True)
