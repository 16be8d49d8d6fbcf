"""`log_to` gives sinks exact means, new records of the history and media, and closes them however a run ends."""

import pytest

from fnlight.errors import ConfigError, SeamError
from fnlight.gradients import grad
from fnlight.loop import epoch_means, evaluate_every, log_to, run, stop_when
from fnlight.metrics import Mean, Text
from fnlight.pipe import pipe
from fnlight.step import apply
from fnlight.triggers import at_end, epochs, max_epochs, max_steps, steps
from tests.loop.runs import Recorder, ran
from tests.small_runs import created, loader, train_step


def test_sinks_get_exact_means_since_the_last_record():
    """Windows do not overlap, and the last one may be short."""
    sink = Recorder()
    _, found = ran(log_to(sink, every=steps(3)), stop_when(max_steps(7)))
    losses = [float(m["loss"]) for _, m in found]
    got = [(r.step, r.metrics["train/loss"]) for r in sink.records]
    assert got == [(3, pytest.approx(sum(losses[:3]) / 3)), (6, pytest.approx(sum(losses[3:6]) / 3)), (7, pytest.approx(losses[6]))]
    assert sink.records[0].metrics["lr"] == 0.1
    assert sink.calls == ["flush", "close"]


def test_evaluations_go_to_the_sinks_at_once():
    """A record of the history is sent when it is made; means over an epoch have a name of their own."""
    sink = Recorder()
    ran(evaluate_every(loader(), epochs(1)), epoch_means(), log_to(sink, every=steps(100)), stop_when(max_epochs(2)))
    assert [(r.step, sorted(r.metrics)) for r in sink.records] == [
        (4, ["train_epoch/loss", "val/loss"]),
        (8, ["train_epoch/loss", "val/loss"]),
        (8, ["lr", "train/loss"]),
    ]


def test_an_evaluation_at_the_end_reaches_the_sinks():
    """What `finish` adds to the history is sent as well."""
    sink = Recorder()
    ran(evaluate_every(loader(), at_end), log_to(sink, every=steps(2)), stop_when(max_steps(2)))
    assert [sorted(r.metrics) for r in sink.records] == [["lr", "train/loss"], ["val/loss"]]


def test_media_reach_the_sinks_but_not_the_history():
    """Pictures and texts of a train_step or an eval_step are shown once."""

    def speaking(model, batch):
        return train_step(model, batch), {"note": Text("hello")}

    def speaking_eval(model, batch):
        return {"n": Mean(1.0), "note": Text("evaluated")}

    sink = Recorder()
    state = created(speaking, speaking_eval)
    after, _ = ran(
        evaluate_every(loader(), steps(2)), epoch_means(), log_to(sink, every=steps(2)), stop_when(max_steps(4)), state=state, fn=speaking
    )
    assert [(r.metrics["train/note"].data, r.metrics["val/note"].data) for r in sink.records] == [("hello", "evaluated")] * 2
    assert all("note" not in name for r in after.history for name in r.metrics)


def test_sinks_are_closed_however_a_run_ends():
    """A loop that is left early, or that fails, flushes and closes what it opened."""
    sink = Recorder()
    for _ in run(pipe(train_step, grad(), apply(), log_to(sink, every=steps(1))), created(), loader()):
        break
    assert sink.calls == ["flush", "close"]


def test_two_logs_need_two_names():
    """A second log_to without name= is refused; with one, both sinks get their own records."""
    with pytest.raises(SeamError, match=r"two combinators have the same name 'log', log_to.*name="):
        pipe(train_step, grad(), apply(), log_to(print), log_to(print))
    one, two = Recorder(), Recorder()
    ran(log_to(one, every=steps(2)), log_to(two, every=steps(3), name="other"), stop_when(max_steps(6)))
    assert [[r.step for r in sink.records] for sink in (one, two)] == [[2, 4, 6], [3, 6]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_to(), r"log_to needs a sink"),
        (lambda: log_to("log.jsonl"), r"a sink must be a function of a record, but got str: 'log.jsonl'"),
    ],
)
def test_a_combinator_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(ConfigError, match=message):
        make()
