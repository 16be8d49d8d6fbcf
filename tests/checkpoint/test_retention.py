"""Retention: pure choices, joined; and deletion that touches nothing else."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnlight.checkpoint import Retention, best, checkpoints, every, folder, last, prune, save, step_path, sweep
from fnlight.errors import CheckpointWarning, ConfigError
from fnlight.state import Record
from tests.checkpoint.tasks import trained

STEPS = st.lists(st.integers(0, 12), unique=True)
HISTORIES = st.dictionaries(st.integers(0, 12), st.sampled_from([0.0, 1.0, 2.0, math.inf, -math.inf, math.nan]) | st.none()).map(
    lambda values: [Record(step, 0, {} if value is None else {"val/loss": value}) for step, value in values.items()]
)
ATOMS = st.one_of(st.builds(last, st.integers(1, 9)), st.builds(every, st.integers(1, 9)),
                  st.builds(best, st.just("val/loss"), st.integers(1, 9), st.sampled_from(["min", "max"])))  # fmt: skip
KEEPS = st.lists(ATOMS, min_size=1, max_size=3).map(lambda parts: parts[0] if len(parts) == 1 else parts[0] | _join(parts[1:]))


def _join(parts: list[Retention]) -> Retention:
    return parts[0] if len(parts) == 1 else parts[0] | _join(parts[1:])


@given(KEEPS, STEPS, HISTORIES)
def test_a_retention_chooses_among_the_steps_it_is_given(keep: Retention, steps: list[int], history: list[Record]) -> None:
    """What stays was there; the order of the steps and asking twice change nothing."""
    chosen = keep(steps, history)
    assert chosen <= set(steps)
    assert chosen == keep(steps[::-1], history) == keep(sorted(steps), history)


@given(ATOMS, ATOMS, STEPS, HISTORIES)
def test_joined_retentions_keep_what_either_keeps(a: Retention, b: Retention, steps: list[int], history: list[Record]) -> None:
    """``a | b`` is the union, in either order."""
    assert (a | b)(steps, history) == (b | a)(steps, history) == a(steps, history) | b(steps, history)


@given(KEEPS, STEPS, HISTORIES)
def test_a_retention_prints_as_its_source(keep: Retention, steps: list[int], history: list[Record]) -> None:
    """Reading what it prints gives an equal one, which chooses the same."""
    again = eval(repr(keep), {"last": last, "best": best, "every": every})
    assert again == keep
    assert repr(again) == repr(keep)
    assert again.monitors == keep.monitors
    assert again(steps, history) == keep(steps, history)


@given(st.integers(1, 9), STEPS)
def test_last_keeps_the_newest(n: int, steps: list[int]) -> None:
    """``last(n)`` keeps n steps, or all, and none that is older than one it drops."""
    chosen = last(n)(steps, ())
    assert len(chosen) == min(n, len(steps))
    assert all(old < new for old in set(steps) - chosen for new in chosen)


@given(st.integers(1, 9), st.sampled_from(["min", "max"]), STEPS, HISTORIES)
def test_best_keeps_the_best(n: int, mode: str, steps: list[int], history: list[Record]) -> None:
    """No step that is dropped is better than one that is kept; NaN is worst; the earlier of equals wins."""
    values = {r.step: r.metrics["val/loss"] * (1 if mode == "min" else -1) for r in history if "val/loss" in r.metrics and r.step in steps}
    chosen = best("val/loss", n, mode)(steps, history)
    rank = lambda step: (math.isnan(values[step]), 0.0 if math.isnan(values[step]) else values[step], step)
    assert len(chosen) == min(n, len(values))
    assert chosen <= set(values)
    assert all(rank(kept) < rank(dropped) for kept in chosen for dropped in set(values) - chosen)


def test_of_equals_the_earlier_is_better() -> None:
    """A value has to be beaten, not met; NaN is beaten by anything."""
    history = [Record(step, 0, {"x": value}) for step, value in [(1, math.nan), (2, 0.5), (3, 0.5), (4, math.inf), (5, math.nan)]]
    chosen = [best("x", n)([5, 4, 3, 2, 1], history) for n in range(1, 6)]
    assert chosen == [{2}, {2, 3}, {2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4, 5}]


def test_every_counts_steps() -> None:
    """``every(n)`` keeps the steps that n divides."""
    assert every(4)(range(1, 13), ()) == {4, 8, 12}


def test_sources_read_well() -> None:
    """A retention prints as one would write it."""
    assert repr(last(1) | best("val/loss", 3)) == "last(1) | best('val/loss', 3)"
    assert repr(best("val/acc", mode="max") | every(1000)) == "best('val/acc', 1, mode='max') | every(1000)"
    assert (best("a") | last(1) | best("b", 2) | best("a", 3)).monitors == ("a", "b")
    assert last(1) == last(1) != last(2)
    assert hash(last(1)) == hash(last(1))


@pytest.mark.parametrize("make", [last, every, lambda n: best("val/loss", n)])
@pytest.mark.parametrize("n", [0, -1, 1.5, True, None, "3"])
def test_a_count_below_one_is_refused(make: Any, n: Any) -> None:
    """A retention keeps a whole number of checkpoints, at least one."""
    with pytest.raises(ConfigError, match=r"must be a whole number of at least 1, but got"):
        make(n)


def test_best_is_checked() -> None:
    """A mode that does not exist and a monitor that is no name are refused."""
    with pytest.raises(ConfigError, match="must be 'min' or 'max', but got 'lowest'"):
        best("val/loss", 1, "lowest")
    with pytest.raises(ConfigError, match="needs the name of a metric"):
        best(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="unsupported operand"):
        last(1) | 3  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint to copy."""
    return save(trained(steps=1), tmp_path_factory.mktemp("state") / "state")


def make_run(run: Path, checkpoint: str, steps: range) -> Path:
    """A run with the same checkpoint at several steps."""
    for step in steps:
        shutil.copytree(checkpoint, step_path(run, step))
    return run


def test_pruning_touches_only_what_the_run_wrote(tmp_path: Path, checkpoint: str) -> None:
    """Checkpoints of other runs and files beside them stay, whatever the retention; the run's own go whole."""
    run = make_run(tmp_path / "a", checkpoint, range(1, 8))
    (run / "checkpoints" / "notes.txt").write_text("mine")
    (run / "checkpoints" / ".step-00000001.tmp-0000").mkdir()
    assert prune(run, [2, 4, 6], last(1), ()) == [6]
    assert [step for step, _ in checkpoints(run)] == [1, 3, 5, 6, 7]
    assert {"notes.txt", ".step-00000001.tmp-0000"} <= set(os.listdir(run / "checkpoints"))
    assert len(os.listdir(run / "checkpoints")) == 7


def test_the_newest_is_never_deleted(tmp_path: Path, checkpoint: str) -> None:
    """Even a retention that holds nothing keeps the newest; one that is gone already is forgotten."""
    run = make_run(tmp_path / "a", checkpoint, range(1, 4))
    nothing = Retention("nothing", lambda steps, history: set())
    assert prune(run, [1, 2, 3, 9], nothing, ()) == [3]
    assert os.listdir(run / "checkpoints") == ["step-00000003"]


def test_pruning_follows_the_history(tmp_path: Path, checkpoint: str) -> None:
    """The best checkpoint survives newer and worse ones."""
    run = make_run(tmp_path / "a", checkpoint, range(1, 5))
    history = [Record(step, 0, {"val/loss": value}) for step, value in enumerate([3.0, 1.0, 2.0, math.nan], start=1)]
    assert prune(run, [1, 2, 3, 4], best("val/loss"), history) == [2, 4]
    assert [step for step, _ in checkpoints(run)] == [2, 4]


def test_a_deletion_that_fails_is_a_warning_and_is_tried_again(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on with a file too many; the step is still counted, and goes with the next call."""
    run = make_run(tmp_path / "a", checkpoint, range(1, 4))

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", refuse)
        with pytest.warns(CheckpointWarning, match=r"cannot delete checkpoint .*step-00000001: .*Permission denied.*; delete it by hand"):
            assert prune(run, [1, 3], last(1), ()) == [1, 3]
    assert [step for step, _ in checkpoints(run)] == [2, 3], "it is out of sight at once"
    assert prune(run, [1, 3], last(1), ()) == [3]
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000002", "step-00000003"]


def test_what_killed_saves_have_left_is_swept_but_never_an_only_copy(tmp_path: Path) -> None:
    """Hidden folders go, whatever step they are of; those of a checkpoint that was being replaced and is not back in its place stay."""
    for step in (5, 6):
        save(trained(), step_path(tmp_path, step))
    inside = tmp_path / "checkpoints"
    (inside / "step-00000005" / ".state.json.tmp-0a").write_text("half")
    for name in (".step-00000007.tmp-0a", ".step-00000004.gone-0b", ".step-00000006.tmp-0c", ".step-00000006.old-0d", ".lock"):
        (inside / name).mkdir()
    for name in (".step-00000008.old-0e", ".step-00000008.tmp-0f"):
        (inside / name).mkdir()
    sweep(tmp_path)
    kept = [".lock", ".step-00000008.old-0e", ".step-00000008.tmp-0f", "step-00000005", "step-00000006"]
    assert sorted(p.name for p in inside.iterdir()) == kept
    assert [p.name for p in inside.rglob(".state.json*")] == []
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 6, 8]
