"""A signal ends a run at a step boundary with a durable checkpoint, and the run that goes on ends bitwise where it would have."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest

from fnlight import (
    FitConfig,
    Loaders,
    Signals,
    TrainState,
    apply,
    best,
    checkpoint_every,
    epochs,
    evaluate,
    evaluate_every,
    fit,
    grad,
    load,
    max_steps,
    newest,
    patience,
    pipe,
    predict,
    run,
    steps,
    stop_when,
    verify,
)
from fnlight.errors import ConfigError, Interrupted
from fnlight.testing import RecordingSink, assert_trees_equal, tiny_batches, tiny_task
from tests.repo.source import fences

ROOT = Path(__file__).resolve().parents[2]
USUAL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ringing(fn, at, number=signal.SIGTERM):
    """A step function in whose n-th call a signal comes."""
    calls = []

    def wrapped(model, batch):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(number)
        return fn(model, batch)

    return wrapped


class Ringing(list):
    """Batches, before the n-th of which, counted over all epochs, a signal comes while it is waited for."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.at = at

    def __getitem__(self, index):
        self.at -= 1
        if self.at == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(index)


def configured(folder, **more):
    return FitConfig(
        max_epochs=3, ema=0.8, clip_norm=1.0, eval_every=steps(2) | epochs(1), save_every=steps(3), keep=best("val/loss", 2), dir=folder,
        signals=True, device="cpu", progress=False, **more,
    )  # fmt: skip


def started(task=None):
    return TrainState.create(task or tiny_task(), seed=5)


LOADERS = {"train": tiny_batches(), "val": tiny_batches(seed=1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    return fit(started(), Loaders(**LOADERS), configured(tmp_path_factory.mktemp("whole")))


def assert_goes_on(folder, stopped, whole, name="SIGTERM"):
    """The checkpoint is durable and says why the run ended; resumed, it ends bitwise where the uninterrupted one did."""
    found = newest(folder)
    assert found is not None
    assert verify(found) == []
    assert_trees_equal(load(found, tiny_task()), stopped)
    assert load(found, tiny_task()).stopped == stopped.stopped == name
    resumed = fit(started(), Loaders(**LOADERS), configured(folder, resume=True))
    assert resumed.stopped == whole.stopped
    assert [dict(r.metrics) for r in resumed.history] == [dict(r.metrics) for r in whole.history]
    assert_trees_equal(dict(resumed.params), dict(whole.params))
    assert_trees_equal({k: dict(v) for k, v in resumed.opt_state.items()}, {k: dict(v) for k, v in whole.opt_state.items()})
    assert_trees_equal(resumed.memory["ema"], whole.memory["ema"])
    assert resumed.progress == whole.progress


@pytest.mark.parametrize("number", USUAL)
@pytest.mark.parametrize("at", [1, 3, 4, 8])
def test_a_signal_in_training_ends_the_run_after_that_step(at, number, tmp_path, whole):
    """The step that was under way is completed and saved, and nothing is lost."""
    task = tiny_task()
    task = attrs.evolve(task, train_step=ringing(task.train_step, at, number))
    state = fit(started(task), Loaders(**LOADERS), configured(tmp_path))
    assert state.progress.step == at
    assert_goes_on(tmp_path, state, whole, signal.Signals(number).name)


@pytest.mark.parametrize(("evaluation", "batch"), [(0, 1), (0, 2), (1, 1), (2, 2)])
def test_an_interrupted_evaluation_leaves_no_record_and_is_made_up_for(evaluation, batch, tmp_path, whole):
    """The evaluation that a signal cut short is done in full when the run goes on, before its first step."""
    task = tiny_task()
    task = attrs.evolve(task, eval_step=ringing(task.eval_step, 1 + evaluation * len(LOADERS["val"]) + batch))  # one batch is tried before
    state = fit(started(task), Loaders(**LOADERS), configured(tmp_path))
    assert state.stopped == "SIGTERM"
    assert state.store.memory["evaluate_every val"] == {"owed": True}
    assert not any(r.step == state.progress.step and "val/loss" in r.metrics for r in state.history)
    assert_goes_on(tmp_path, state, whole)


def test_a_made_up_evaluation_is_logged_and_heeded_by_stop_rules(tmp_path):
    """What an interrupted evaluation would have brought comes to the sinks and may end the run before its first step."""
    task = tiny_task()
    config = configured(tmp_path, sinks=(), stop=patience("val/loss", 1, min_delta=1e9))
    whole = fit(
        started(), Loaders(**LOADERS), attrs.evolve(config, dir=None, save_every=epochs(1), keep=attrs.fields(FitConfig).keep.default)
    )
    rung = attrs.evolve(task, eval_step=ringing(task.eval_step, len(LOADERS["val"]) + 2))
    first = fit(started(rung), Loaders(**LOADERS), config)
    sink = RecordingSink()
    resumed = fit(started(), Loaders(**LOADERS), attrs.evolve(config, resume=True, sinks=(sink,)))
    made_up = [r for r in sink.records if r.step == first.progress.step and "val/loss" in r.metrics]
    assert len(made_up) == 1
    assert (resumed.progress.step, resumed.stopped) == (whole.progress.step, whole.stopped)
    assert load(newest(tmp_path), tiny_task()).stopped == whole.stopped


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_signal_while_a_batch_is_waited_for_ends_the_wait(at, tmp_path, whole):
    """A run that waits for data, for the first batch too, ends at once on the state of its last step."""
    state = fit(started(), Loaders(train=Ringing(LOADERS["train"], at), val=LOADERS["val"]), configured(tmp_path))
    assert state.progress.step == at - 1
    assert_goes_on(tmp_path, state, whole)


def test_a_signal_in_the_sanity_evaluation_ends_the_run_before_its_first_step(tmp_path, whole):
    """Start-up listens too, and what was to be trained on is saved."""
    task = tiny_task()
    task = attrs.evolve(task, eval_step=ringing(task.eval_step, 1))
    state = fit(started(task), Loaders(**LOADERS), configured(tmp_path, sanity_batches=2))
    assert (state.progress.step, state.stopped) == (0, "SIGTERM")
    assert_goes_on(tmp_path, state, whole)


def test_a_signal_while_a_checkpoint_is_loaded_leaves_it_as_it_was(tmp_path, whole):
    """A resumed run that is told to end before it trains ends where it began."""
    task = tiny_task()
    fit(started(attrs.evolve(task, train_step=ringing(task.train_step, 4))), Loaders(**LOADERS), configured(tmp_path))

    def configure_optimizers(model):
        signal.raise_signal(signal.SIGTERM)
        return task.configure_optimizers(model)

    with Signals("SIGTERM"):
        state = fit(
            started(attrs.evolve(task, configure_optimizers=configure_optimizers)), Loaders(**LOADERS), configured(tmp_path, resume=True)
        )
    assert state.progress.step == 4
    assert_goes_on(tmp_path, state, whole)


def test_an_evaluation_of_ones_own_has_no_partial_result():
    """`evaluate` raises rather than return means over a part of the data."""
    task = tiny_task()
    task = attrs.evolve(task, eval_step=ringing(task.eval_step, 2))
    with Signals() as signals, pytest.raises(Interrupted, match="SIGTERM came before all batches were done"):
        evaluate(started(task), LOADERS["val"], signals=signals)


def test_a_prediction_ends_with_an_error_rather_than_early():
    """`predict` hands out what it has and then raises, so that nobody takes a part for the whole."""
    task = tiny_task()
    task = attrs.evolve(task, predict_step=ringing(lambda model, batch: model(batch[0]), 2))
    with Signals() as signals:
        outputs = predict(started(task), LOADERS["val"], signals=signals)
        assert len([next(outputs), next(outputs)]) == 2
        with pytest.raises(Interrupted, match="SIGTERM"):
            next(outputs)


def test_a_loop_of_ones_own_listens(tmp_path):
    """`run` and `evaluate_every` take what listens; the last state that the loop sees says why it ended."""
    task = tiny_task()
    with Signals() as signals:
        step = pipe(
            ringing(task.train_step, 3), grad(), apply(), evaluate_every(LOADERS["val"], every=steps(3), signals=signals),
            checkpoint_every(tmp_path), stop_when(max_steps(9)),
        )  # fmt: skip
        states = [state for state, _ in run(step, started(), LOADERS["train"], signals=signals)]
    assert [(state.progress.step, state.stopped) for state in states] == [(1, None), (2, None), (3, "SIGTERM")]
    assert states[-1].memory["evaluate_every val"]["owed"]


def test_a_signal_between_two_steps_yields_the_last_state_once_more():
    """Whoever loops sees a state with `stopped`, whenever the signal came."""
    seen = []
    with Signals() as signals:
        for state, _ in run(pipe(tiny_task().train_step, grad(), apply()), started(), LOADERS["train"], signals=signals):
            seen.append((state.progress.step, state.stopped))
            if len(seen) == 2:
                signal.raise_signal(signal.SIGUSR1)
    assert seen == [(1, None), (2, None), (2, "SIGUSR1")]


class Kept(list):
    """Batches that keep their own place."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.place, self.at = 0, at

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def __iter__(self):
        while self.place < len(self):
            self.place += 1
            self.at -= 1
            if self.at == 0:
                signal.raise_signal(signal.SIGTERM)
            yield self[self.place - 1]
        self.place = 0


def test_a_loader_that_keeps_its_own_place_is_not_left_in_the_middle_of_a_batch():
    """The wait for such a loader is not cut short, since its place would be lost; the run ends one step later."""

    class Only:
        def __init__(self, inner):
            self.inner = inner
            self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

        def __iter__(self):
            return iter(self.inner)

        def __len__(self):
            return len(self.inner)

    with Signals() as signals:
        found = list(run(pipe(tiny_task().train_step, grad(), apply()), started(), Only(Kept(LOADERS["train"], 2)), signals=signals))
    state = found[-1][0]
    assert (state.progress.step, state.stopped) == (2, "SIGTERM")
    assert state.memory["loader"]["loader"] == {"place": 2}


def test_previous_handlers_are_called_and_back_in_place_afterwards():
    """Whoever listened before hears the signal too, and alone again afterwards."""
    heard = []
    before = {number: signal.getsignal(number) for number in USUAL}
    own = {number: lambda number, frame: heard.append(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number, handler in own.items():
            signal.signal(number, handler)
        with Signals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGUSR1"
        assert heard == [signal.SIGUSR1, signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in own} == own
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_are_put_back_after_an_error_too():
    """An exception in a step leaves no handler behind."""
    before = [signal.getsignal(number) for number in USUAL]

    def failing(model, batch):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        fit(
            started(attrs.evolve(tiny_task(), train_step=failing)),
            LOADERS["train"],
            FitConfig(max_steps=3, signals=True, device="cpu", progress=False),
        )
    assert [signal.getsignal(number) for number in USUAL] == before


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup: what the parent told the process to ignore is not listened to."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGUSR1)
        assert signals.received is None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path, capfd):
    """The step is left in the middle, and the checkpoint before it stands."""
    task, calls = tiny_task(), []

    def train_step(model, batch):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            calls.append("never")
        return task.train_step(model, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(started(attrs.evolve(task, train_step=train_step)), Loaders(**LOADERS), configured(tmp_path))
    assert len(calls) == 5
    assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert load(newest(tmp_path), tiny_task()).progress.step == 3


def test_fits_within_one_that_listens_all_end():
    """A second fit does not begin when a signal came during the first."""
    task = tiny_task()
    config = FitConfig(max_steps=4, signals=True, device="cpu", progress=False)
    with Signals():
        first = fit(started(attrs.evolve(task, train_step=ringing(task.train_step, 2))), LOADERS["train"], config)
        second = fit(started(), LOADERS["train"], config)
    assert [(s.progress.step, s.stopped) for s in (first, second)] == [(2, "SIGTERM"), (0, "SIGTERM")]
    assert fit(started(), LOADERS["train"], config).stopped == "4 steps done"


def test_a_run_that_is_over_says_so_rather_than_that_a_signal_came():
    """A signal in the last step changes nothing: the training is complete."""
    task = tiny_task()
    task = attrs.evolve(task, train_step=ringing(task.train_step, 4))
    assert (
        fit(started(task), LOADERS["train"], FitConfig(max_steps=4, signals=True, device="cpu", progress=False)).stopped == "4 steps done"
    )


def test_only_the_main_thread_can_listen():
    """Elsewhere there is a clear error before any work."""
    errors = []

    def body():
        try:
            fit(started(), LOADERS["train"], FitConfig(max_steps=4, signals=True, device="cpu", progress=False))
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=body, name="a worker")
    thread.start()
    thread.join()
    assert errors[0].startswith("signals reach the main thread only, but this is a worker; leave signals=True out here")


def test_what_cannot_be_listened_to_is_refused():
    """Names, deadlines and opening twice are checked, and each error says what to do."""
    with pytest.raises(ConfigError, match=r"Signals\('SIGFOO'\): there is no such signal"):
        Signals("SIGFOO")
    with pytest.raises(ConfigError, match="must be seconds above 0, or None"):
        Signals(deadline=0)
    with Signals() as signals, pytest.raises(ConfigError, match="open already"):
        signals.__enter__()
    assert repr(Signals("SIGTERM", deadline=3)) == "Signals('SIGTERM', deadline=3)"


def test_nothing_is_left_of_a_deadline():
    """The thread and the pipe of a deadline are gone with what listened."""
    threads, files = threading.active_count(), os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with Signals(deadline=1000) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert threading.active_count() == threads
    assert (os.listdir("/proc/self/fd") if files else []) == files


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_slurm_passes_a_signal_on_and_puts_the_job_back(tmp_path):
    """The batch script of the documentation: SIGUSR1 reaches the program, and its exit code of 138 puts the job into the queue again."""
    script = next(text for _, language, text in fences(ROOT / "docs" / "signals.md") if language == "sh")
    train = "import os, signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))\nos.kill(os.getppid(), signal.SIGUSR1)\nwhile True:\n    signal.pause()\n"
    (tmp_path / "train.py").write_text(train)
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (138, "requeue 7\n"), done.stderr


def test_whole_groups_of_processes_end_cleanly(tmp_path):
    """With workers, a signal to the whole group ends the run with a checkpoint and the exit code of the signal."""
    done = subprocess.run(
        [sys.executable, "tests/runtime/program.py", str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert ends == {
        "SIGTERM": "143 resumed", "SIGUSR1": f"{128 + signal.SIGUSR1} resumed", "SIGINT": "130 resumed", "waiting": "143 resumed",
        "predict": "143", "twice": "130", "deadline": "143 the checkpoint before stands", "done": "0",
    }, done.stderr  # fmt: skip
    assert "1 s are over" in done.stderr
    assert "Traceback" not in done.stderr
