"""A configuration is checked before any work, and round-trips to JSON without running code."""

import json
from datetime import timedelta

import pytest

from fnlight.checkpoint import best, every, last
from fnlight.errors import ConfigError
from fnlight.fit import FitConfig
from fnlight.sinks import CSV, JSONL, TensorBoard
from fnlight.triggers import at_end, epochs, max_steps, min_epochs, minutes, patience, reached, steps


def test_defaults_switch_nothing_on():
    """Beyond its bound a configuration asks for evaluation each epoch and a progress bar, and for no file."""
    config = FitConfig(max_epochs=1)
    assert config.dir is None
    assert config.sinks == ()
    assert (config.accumulate, config.precision, config.clip_norm, config.clip_value, config.ema) == (1, "fp32", None, None, None)
    assert config.eval_every == epochs(1)


def test_a_full_configuration_round_trips_to_json():
    """Every field comes back as it was, triggers, rules, retentions and sinks too."""
    config = FitConfig(
        max_epochs=10, max_steps=1000, max_time=timedelta(hours=1), min_epochs=2, min_steps=5,
        stop=patience("val/loss", 3, min_delta=0.1) | reached("val/acc", 0.9), accumulate={0: 1, 5: 4}, precision="bf16",
        clip_norm=1.0, clip_value=0.5, ema=0.999, eval_every=steps(100) | at_end, sanity_batches=2, dir="runs/a",
        save_every=epochs(1) & ~steps(3), keep=last(2) | best("val/acc", 3, "max") | every(1000), resume=True, log_every=minutes(0.5), log_times=True, profile_steps=(3, 5), workers_ahead=False,
        sinks=(JSONL("a.jsonl"), CSV("a.csv"), TensorBoard("tb")), progress=False, limit_train=0.5, limit_eval=3,
        device="cpu", deterministic=True, detect_anomaly=True, donate=True, parallel=None, nonfinite="ignore",
    )  # fmt: skip
    assert FitConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["stop"] == "patience('val/loss', 3, min_delta=0.1) | reached('val/acc', 0.9)"


def test_json_leaves_defaults_out():
    """What nobody chose is not written."""
    assert json.loads(FitConfig(max_steps=3).to_json()) == {"max_steps": 3}


def test_a_function_of_ones_own_has_no_text():
    """The error names the field."""

    def sunday(state):
        return None

    with pytest.raises(ConfigError, match=r"FitConfig\(stop=.*cannot be written as text"):
        FitConfig(stop=sunday).to_json()
    with pytest.raises(ConfigError, match=r"FitConfig\(stop=.*sunday.*cannot be written as text"):
        FitConfig(stop=patience("val/loss", 3) | sunday).to_json()


def test_text_that_is_no_configuration_is_refused():
    """Broken JSON and unknown fields are named."""
    with pytest.raises(ConfigError, match="a configuration must be JSON"):
        FitConfig.from_json("{")
    with pytest.raises(ConfigError, match=r"but got \['max_epoch'\]; the fields are"):
        FitConfig.from_json('{"max_epoch": 3}')
    with pytest.raises(ConfigError, match="but got list"):
        FitConfig.from_json("[]")
    with pytest.raises(ConfigError, match=r"sinks=...\) must be functions of a record, .* but got 5"):
        FitConfig.from_json('{"max_epochs": 1, "sinks": [5]}')
    with pytest.raises(ConfigError, match=r"or a mapping of first epochs to such numbers, but got \{'a': 2\}"):
        FitConfig.from_json('{"max_epochs": 1, "accumulate": {"a": 2}}')


def test_what_happens_to_a_mapping_later_is_nothing_to_the_configuration():
    """A configuration is a value: it holds a mapping of its own; no sinks are no sinks, however that is said."""
    given, names = {0: 1, 5: 4}, {"a": "b"}
    config = FitConfig(max_epochs=1, accumulate=given, rename=names, resume=True, dir="runs/a", sinks=None)
    given[0], names["c"] = 7, "d"
    assert config.accumulate == {0: 1, 5: 4}
    assert config.rename == {"a": "b"}
    assert config.sinks == ()
    assert repr(FitConfig.from_json('{"max_epochs": 1, "sinks": "JSONL(\'a\')"}').sinks) == repr((JSONL("a"),))


def test_configurations_are_compared_by_value_with_the_functions_that_they_hold():
    """Equal fields make equal configurations; two functions that print alike make different ones, in every field that takes one."""

    class Sink:
        def __call__(self, record):
            """Nothing."""

        def __repr__(self):
            return "Sink()"

    one, two, sink = (lambda state: None), (lambda state: "now"), Sink()
    for fields in ({"stop": one}, {"log_every": steps(5) | one, "sinks": sink}, {"sinks": (JSONL("a"), sink)}, {"eval_every": None}):
        assert FitConfig(max_steps=3, **fields) == FitConfig(max_steps=3, **fields)
    assert FitConfig(stop=one) != FitConfig(stop=two)
    assert FitConfig(stop=max_steps(3) | one) != FitConfig(stop=max_steps(3) | two)
    assert FitConfig(max_steps=3, sinks=Sink()) != FitConfig(max_steps=3, sinks=Sink())
    assert FitConfig(max_steps=3, sinks=(JSONL("a"), CSV("a"))) == FitConfig(max_steps=3, sinks=[JSONL("a"), CSV("a")])
    assert FitConfig(max_steps=3, sinks=JSONL("a")) != FitConfig(max_steps=3, sinks=JSONL("b"))
    assert hash(FitConfig(max_steps=3, sinks=JSONL("a"))) == hash(FitConfig(max_steps=3, sinks=JSONL("a")))


def test_a_function_with_the_name_of_a_trigger_is_not_written_as_that_trigger():
    """What is read back must be what was written, so a function of the user's called at_end has no text."""

    def at_end(tick):
        return False

    with pytest.raises(ConfigError, match=r"FitConfig\(save_every=steps\(5\) \| at_end\) cannot be written as text"):
        FitConfig(max_steps=3, dir="runs/a", save_every=steps(5) | at_end).to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"must bound the run: give max_epochs, max_steps, max_time or stop"),
        ({"max_epochs": -1}, r"FitConfig\(max_epochs=...\) must be None for no limit, a whole number of at least 0, but got -1"),
        ({"max_steps": 1.5}, r"max_steps=...\) must be"),
        ({"max_time": 0}, r"max_time=...\) must be a number above 0"),
        ({"max_epochs": 1, "min_epochs": 2, "stop": patience("val/loss", 1)}, r"the run would end before `stop` is asked"),
        ({"max_epochs": 1, "min_steps": 2}, r"min_steps=2\) delays `stop`, but stop is None"),
        ({"stop": 3}, r"stop=...\) must be something like patience"),
        ({"max_epochs": 1, "accumulate": 0}, r"accumulate=...\) must be a number of batches per step \(>= 1\)"),
        ({"max_epochs": 1, "accumulate": {3: 2}}, r"must start at epoch 0"),
        ({"max_epochs": 1, "accumulate": {0: 1, "a": 2}}, r"or a mapping of first epochs to such numbers, but got \{0: 1, 'a': 2\}"),
        ({"max_epochs": 1, "accumulate": {0: 1, 0.5: 2}}, r"or a mapping of first epochs to such numbers, but got \{0: 1, 0.5: 2\}"),
        ({"max_epochs": 1, "accumulate": {0: 1, -1: 2}}, r"or a mapping of first epochs to such numbers, but got \{0: 1, -1: 2\}"),
        ({"max_epochs": 1, "device": "banana"}, r"device=...\) must be \"auto\" or a device such as .* but got 'banana'"),
        ({"max_epochs": 1, "device": None}, r"device=...\) must be .* but got None"),
        ({"max_epochs": 1, "sinks": 5}, r"sinks=...\) must be functions of a record, such as .* but got 5"),
        ({"max_epochs": 1, "sinks": "log.csv"}, r"sinks=...\) must be functions of a record, such as .* but got 'log.csv'"),
        ({"max_epochs": 1, "recompute": 5}, r"recompute=...\) must be patterns of modules' names, but got 5"),
        ({"max_epochs": 1, "allow": "foo"}, r"allow=...\) must be some of 'batch_size', 'data', 'dtype', 'model', 'optimizer', but got 'foo'"),
        ({"max_epochs": 1, "dir": 5}, r"dir=...\) must be a directory, a URL, or None to write no files, but got 5"),
        ({"max_epochs": 1, "dir": ""}, r"dir=...\) must be a directory, a URL, or None to write no files, but got ''"),
        ({"max_epochs": 1, "precision": "int8"}, r"FitConfig\(precision=\.\.\.\) must be one of 'fp32', 'bf16', 'fp16'.*but got 'int8'"),
        ({"max_epochs": 1, "compile": "graphs"}, r"compile=...\) must be one of None, 'trace', 'step', 'graph', 'model'"),
        ({"max_epochs": 1, "parallel": "ddp"}, r"FitConfig\(parallel=\.\.\.\) must be one of 'auto', None, but got 'ddp'"),
        ({"max_epochs": 1, "signals": "yes"}, r"signals=...\) must be one of True, False, but got 'yes'"),
        ({"max_epochs": 1, "signals_deadline": 5}, r"signals_deadline=...\) limits the time after a signal, but signals is False"),
        ({"max_epochs": 1, "signals": True, "signals_deadline": 0}, r"signals_deadline=...\) must be a number above 0"),
        ({"max_epochs": 1, "nonfinite": "no"}, r"nonfinite=...\) must be one of 'raise', 'skip', 'rollback', 'ignore', but got 'no'"),
        ({"max_epochs": 1, "matmul_precision": "low"}, r"matmul_precision=...\) must be one of None, 'highest', 'high', 'medium'"),
        ({"max_epochs": 1, "clip_norm": 0}, r"clip_norm=...\) must be a number above 0, or None to switch it off"),
        ({"max_epochs": 1, "ema": 1}, r"ema=...\) must be a decay"),
        ({"max_epochs": 1, "keep": last(3)}, r"keep=last\(3\)\) is about checkpoints, but dir is None"),
        ({"max_epochs": 1, "save_every": steps(3)}, r"save_every=steps\(3\)\) is about checkpoints, but dir is None"),
        ({"max_epochs": 1, "dir": "x", "keep": 3}, r"keep=...\) must be something like last\(1\)"),
        ({"max_epochs": 1, "dir": "x", "keep": lambda steps, history: steps}, r"keep=...\) must be a retention"),
        ({"max_epochs": 1, "profile_steps": (2, 3)}, r"profile_steps=\(2, 3\)\) writes traces to dir, but dir is None"),
        ({"max_epochs": 1, "dir": "a", "profile_steps": (3, 2)}, r"the first and the last step, such as \(100, 102\), or None, but got \(3, 2\)"),
        ({"max_epochs": 1, "dir": "a", "profile_steps": 3}, "the first and the last step"),
        ({"max_epochs": 1, "log_times": True}, r"log_times=True\) is about sinks, but there are none"),
        ({"max_epochs": 1, "log_every": steps(3)}, r"log_every=steps\(3\)\) is about sinks, but there are none"),
        ({"max_epochs": 1, "resume": True}, r"resume=True\) loads a checkpoint, but there is no dir"),
        ({"fast_dev_run": True, "resume": True, "dir": "x"}, r"but fast_dev_run writes and reads no files"),
        ({"max_epochs": 1, "resume": "yes"}, r"resume=...\) must be one of True, False, but got 'yes'"),
        ({"max_epochs": 1, "limit_train": 0}, r"limit_train=...\) must be batches \(an int >= 1\), a fraction"),
        ({"max_epochs": 1, "limit_eval": 1.5}, r"limit_eval=...\) must be"),
        ({"max_epochs": 1, "limit_train": 3, "overfit_batches": 3}, r"both set the number of batches per epoch"),
        ({"fast_dev_run": 0.5}, r"fast_dev_run=...\) must be True, False or a number of batches"),
        ({"max_epochs": 1, "eval_every": 5}, r"eval_every=...\) must be something like steps\(50\)"),
    ],
)  # fmt: skip
def test_a_field_that_means_nothing_is_refused(fields, message):
    """Every field is checked when the configuration is made, and the error says what was expected."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(**fields)


def test_bounds_guard_the_rule_and_not_the_limits():
    """`stop` is heeded from the minima on; the maxima always count."""
    config = FitConfig(max_steps=3, stop=patience("val/loss", 3), min_epochs=2)
    assert config.bounds == (patience("val/loss", 3) & min_epochs(2)) | max_steps(3)
    assert FitConfig(max_steps=3).bounds == max_steps(3)
