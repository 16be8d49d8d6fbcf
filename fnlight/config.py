"""`FitConfig`: everything `fit` can be told, checked before any work, and readable as JSON.

Triggers, rules, retentions and sinks are written as their source text, see `fnlight.parse`: a configuration from a stranger is data.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self

import attrs

from fnlight import checkpoint, rules
from fnlight.checkpoint import Retention, last
from fnlight.errors import ConfigError
from fnlight.parse import parse
from fnlight.rules import StopRule
from fnlight.when import epochs, steps

_TEXTS = ("stop", "eval_every", "save_every", "keep", "permanent", "log_every")
_DIFFERENCES = checkpoint.ALLOWED | {"batch_size"}
_BOUNDS = ("max_epochs", "max_steps", "max_time", "stop", "fast_dev_run")


def _count(least: int, optional: bool = True) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            off = "None for no limit, " if optional else ""
            raise ConfigError(f"FitConfig({field.name}=...) must be {off}a whole number of at least {least}, but got {value!r}")

    return check


def _limit(_: Any, field: Any, value: Any) -> None:
    if (
        value is None
        or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
        or (isinstance(value, float) and 0 < value <= 1)
    ):
        return
    raise ConfigError(f"FitConfig({field.name}=...) must be batches (an int >= 1), a fraction (a float in 0..1) or None, but got {value!r}")


def _above_zero(_: Any, field: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf")):
        raise ConfigError(f"FitConfig({field.name}=...) must be a number above 0, or None to switch it off, but got {value!r}")


def _decay(_: Any, field: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1):
        raise ConfigError(f"FitConfig(ema=...) must be a decay of at least 0 and below 1, or None to switch it off, but got {value!r}")


def _flag_or_count(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"FitConfig({field.name}=...) must be True, False or a number of batches >= 1, but got {value!r}")


def _accumulate(_: Any, field: Any, value: Any) -> None:
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    if not numbers or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in numbers):
        raise ConfigError(f"FitConfig(accumulate=...) must be batches a step (>= 1), or epochs to such numbers, but got {value!r}")
    if isinstance(value, Mapping) and 0 not in value:
        raise ConfigError(f"FitConfig(accumulate=...) as a mapping must say what holds from epoch 0 on, but got {dict(value)!r}")


def _part(_: Any, field: Any, value: Any) -> None:
    if value is not None and value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(
            f'FitConfig(microbatch=...) must be a number of samples >= 1, "auto", or None to switch it off, but got {value!r}'
        )


def _one_of(*allowed: Any) -> Any:
    def check(_: Any, field: Any, value: Any) -> None:
        if value not in allowed:
            raise ConfigError(f"FitConfig({field.name}=...) must be one of {', '.join(map(repr, allowed))}, but got {value!r}")

    return check


def _callable(_: Any, field: Any, value: Any) -> None:
    if value is not None and not callable(value):
        example = {"stop": 'patience("val/loss", 3)', "keep": "last(1)"}.get(field.name, "steps(50)")
        raise ConfigError(f"FitConfig({field.name}=...) must be something like {example}, or None, but got {value!r}")


def _seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _sinks(value: Any) -> tuple[Any, ...]:
    return (value,) if callable(value) else tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _renames(_: Any, field: Any, value: Any) -> None:
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(v, str) for pair in value.items() for v in pair)):
        raise ConfigError(f"FitConfig(rename=...) must map names in the checkpoint to names in the model, but got {value!r}")


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _first_and_last(_: Any, field: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(n) is int for n in value) or not 1 <= value[0] <= value[1]:
        raise ConfigError(
            f"FitConfig({field.name}=...) must be the first and the last step, such as (100, 102), or None, but got {value!r}"
        )


def _path(value: Any) -> Any:
    return None if value is None else os.fspath(value)


@attrs.frozen(kw_only=True)
class FitConfig:
    """How `fit` trains; nothing is on that nobody asked for.

    Args:
        max_epochs: Completed epochs in all at which training ends; a resumed run ends where the uninterrupted one does.
        max_steps: Completed steps in all at which training ends.
        max_time: Seconds of training in all (or a ``timedelta``) at which training ends.
        min_epochs: `stop` is heeded only from this many epochs on.
        min_steps: `stop` is heeded only from this many steps on.
        stop: A stop rule.
        accumulate: Batches a step, or a mapping from the epoch at which it starts to batches.
        microbatch: Samples that are computed at a time at most, or ``"auto"``: whole batches until one does not fit into memory.
        recompute: Patterns of modules whose activations are computed again in the backward pass, see `fnlight.recompute`.
        apply_in_backward: True updates each parameter as soon as its gradient is there, and frees it; see `fnlight.release`.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` (autocast; fp16 with a loss scale); ``"fp8"`` (bf16 with linear
            layers in fp8, see `fnlight.fp8`); ``"bf16-true"``, ``"fp16-true"`` or ``"fp64"``
            (weights and batches are cast).
        matmul_precision: ``"highest"``, ``"high"`` or ``"medium"``: what fp32 matrix products may be computed in while the run lasts; None
            leaves torch's setting as it is.
        clip_norm: The largest 2-norm of the gradients.
        clip_value: The largest absolute value of a gradient's entry.
        ema: Decay of averaged weights; evaluations of the run then use them.
        eval_every: When ``loaders.val`` is evaluated.
        sanity_batches: Evaluation batches that are tried before training.
        dir: Where checkpoints and ``config.json`` go; None writes nothing.
        save_every: When a checkpoint is saved; the last state of a run always is.
        keep: Which checkpoints stay.
        permanent: When a checkpoint is saved that always stays; `keep` is about the others.
        save_in_background: True trains on while a checkpoint is written, for the price of one copy of the state in host memory.
        resume: True goes on from the newest sound checkpoint of `dir`, or starts afresh if there is none.
        allow: Differences between the checkpoint and the code that a resumed run goes along with, with a warning: ``"model"``, ``"dtype"``
            and ``"optimizer"``, see `restore`; ``"batch_size"`` goes back to where a batch of the new size ends.
        rename: Names of parameters, or of modules with all below them, in the checkpoint to those in the model.
        log_every: When training metrics go to the sinks.
        log_times: True tells the sinks what time went to as well: ``samples/s``, and the shares ``time/step``, ``time/data`` and so on.
        sinks: Where records go.
        progress: A progress bar on a terminal, else a line every few seconds.
        workers_ahead: True starts the workers of the next epoch before one ends, so that its first batch need not be waited for.
        limit_train: Batches an epoch at most (int), or a fraction of them (float).
        limit_eval: The same for evaluations.
        fast_dev_run: True or n: one epoch of n batches of everything, no files.
        overfit_batches: n: the same first n batches each epoch, unshuffled.
        device: ``"auto"`` (the accelerator if there is one), or a device such as ``"cpu"``.
        deterministic: True lets torch use deterministic algorithms only.
        detect_anomaly: True lets autograd name the operation that made a NaN, slowly.
        donate: True trains on the very tensors of the state that is passed in.
        gc: ``"auto"`` leaves the collection of garbage to Python; ``"managed"`` does it between steps, see `collect_garbage`.
        compile: ``"trace"``, ``"step"``, ``"graph"`` or ``"model"``: how much of a step becomes one graph, see `fnlight.compile`; None: nothing.
        unroll: Updates in one call of a compiled step.
        parallel: ``"auto"`` joins the processes that the environment names, if there are several, and trains data parallel, see
            `fnlight.parallel`; None trains in this process, whoever else there is.
        exact_ranks: True gives bitwise the same weights on 1, 2, 4 and 8 ranks, slowly, to tell a bug from rounding; see
            `fnlight.parallel.exact_ranks`.
        signals: True ends the run after the step that is under way when SIGTERM, SIGUSR1 or Ctrl-C comes; see `fnlight.signals`.
        signals_deadline: Seconds after a signal at which the process is ended, whatever it does; None waits as long as it takes.
        profile_steps: ``(first, last)``: these steps are traced into ``DIR/traces``, see `fnlight.profile`.
        debug_bundle: True writes what is needed to repeat a failed step to ``DIR/bundles``; see `fnlight.bundle` for what it costs.
        nonfinite: ``"raise"`` when a loss was NaN or infinite, ``"skip"`` steps whose loss or gradients were, go back to the last checkpoint
            and on with other data (``"rollback"``, see `fnlight.rollback`), or ``"ignore"``.
        max_nonfinite: How often in a row, with ``"skip"`` or ``"rollback"``, before the run fails; None is ten steps, or three times back.

    Raises:
        ConfigError: If a field cannot mean anything, or two contradict each other.

    Example:
        >>> config = FitConfig(max_epochs=3, clip_norm=1.0, stop=rules.patience("val/loss", 3))
        >>> FitConfig.from_json(config.to_json()) == config
        True
    """

    max_epochs: int | None = attrs.field(default=None, validator=_count(0))
    max_steps: int | None = attrs.field(default=None, validator=_count(0))
    max_time: float | None = attrs.field(default=None, converter=_seconds, validator=_above_zero)
    min_epochs: int = attrs.field(default=0, validator=_count(0, optional=False))
    min_steps: int = attrs.field(default=0, validator=_count(0, optional=False))
    stop: Callable[[Any], str | None] | None = attrs.field(default=None, validator=_callable)
    accumulate: int | Mapping[int, int] = attrs.field(default=1, validator=_accumulate)
    microbatch: int | str | None = attrs.field(default=None, validator=_part)
    recompute: tuple[str, ...] = attrs.field(default=(), converter=_names)
    apply_in_backward: bool = attrs.field(default=False, validator=_one_of(True, False))
    precision: str = attrs.field(default="fp32", validator=_one_of("fp32", "bf16", "fp16", "fp8", "bf16-true", "fp16-true", "fp64"))
    matmul_precision: str | None = attrs.field(default=None, validator=_one_of(None, "highest", "high", "medium"))
    clip_norm: float | None = attrs.field(default=None, validator=_above_zero)
    clip_value: float | None = attrs.field(default=None, validator=_above_zero)
    ema: float | None = attrs.field(default=None, validator=_decay)
    eval_every: Callable[[Any], bool] | None = attrs.field(default=epochs(1), validator=_callable)
    sanity_batches: int = attrs.field(default=0, validator=_count(0, optional=False))
    dir: str | None = attrs.field(default=None, converter=_path)
    save_every: Callable[[Any], bool] | None = attrs.field(default=epochs(1), validator=_callable)
    keep: Retention = attrs.field(default=last(1), validator=_callable)
    permanent: Callable[[Any], bool] | None = attrs.field(default=None, validator=_callable)
    save_in_background: bool = attrs.field(default=True, validator=_one_of(True, False))
    resume: bool = attrs.field(default=False, validator=_one_of(True, False))
    allow: tuple[str, ...] = attrs.field(default=(), converter=_names)
    rename: Mapping[str, str] | None = attrs.field(default=None, validator=_renames)
    log_every: Callable[[Any], bool] = attrs.field(default=steps(50), validator=_callable)
    log_times: bool = attrs.field(default=False, validator=_one_of(True, False))
    sinks: tuple[Any, ...] = attrs.field(default=(), converter=_sinks, eq=repr)
    progress: bool = attrs.field(default=True, validator=_one_of(True, False))
    workers_ahead: bool = attrs.field(default=True, validator=_one_of(True, False))
    limit_train: int | float | None = attrs.field(default=None, validator=_limit)
    limit_eval: int | float | None = attrs.field(default=None, validator=_limit)
    fast_dev_run: bool | int = attrs.field(default=False, validator=_flag_or_count)
    overfit_batches: int = attrs.field(default=0, validator=_count(0, optional=False))
    device: str = attrs.field(default="auto", converter=str)
    deterministic: bool = attrs.field(default=False, validator=_one_of(True, False))
    detect_anomaly: bool = attrs.field(default=False, validator=_one_of(True, False))
    donate: bool = attrs.field(default=False, validator=_one_of(True, False))
    gc: str = attrs.field(default="auto", validator=_one_of("auto", "managed"))
    compile: str | None = attrs.field(default=None, validator=_one_of(None, "trace", "step", "graph", "model"))
    exact_ranks: bool = attrs.field(default=False, validator=_one_of(True, False))
    unroll: int = attrs.field(default=1, validator=_count(1, optional=False))
    parallel: str | None = attrs.field(default="auto", validator=_one_of("auto", None))
    signals: bool = attrs.field(default=False, validator=_one_of(True, False))
    signals_deadline: float | None = attrs.field(default=None, validator=_above_zero)
    profile_steps: tuple[int, int] | None = attrs.field(default=None, converter=_pair, validator=_first_and_last)
    debug_bundle: bool = attrs.field(default=False, validator=_one_of(True, False))
    nonfinite: str = attrs.field(default="raise", validator=_one_of("raise", "skip", "rollback", "ignore"))
    max_nonfinite: int | None = attrs.field(default=None, validator=_count(1))

    def __attrs_post_init__(self) -> None:
        if all(getattr(self, name) is None or getattr(self, name) is False for name in _BOUNDS):
            raise ConfigError("FitConfig must bound the run: give max_epochs, max_steps, max_time or stop")
        for unit in ("epochs", "steps"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least and self.stop is None:
                raise ConfigError(
                    f"FitConfig(min_{unit}={least}) says from when on `stop` is heeded, but there is no stop; give one, or leave it out"
                )
            if most is not None and least > most:
                raise ConfigError(f"FitConfig(min_{unit}={least}, max_{unit}={most}): the run would be over before `stop` is heeded")
        self._check_files()
        if self.overfit_batches and self.limit_train is not None:
            raise ConfigError("FitConfig(overfit_batches=..., limit_train=...) both say how many batches there are; give one of them")
        if not isinstance(self.keep, Retention):
            raise ConfigError(f"FitConfig(keep=...) must be a retention such as last(1) or best('val/loss', 3), but got {self.keep!r}")

        if self.exact_ranks and (self.microbatch is not None or self.compile is not None):
            raise ConfigError(
                "FitConfig(exact_ranks=True) computes batches in parts of its own, in no graph; leave microbatch and compile out"
            )
        if self.unroll > 1 and self.compile in (None, "model"):
            raise ConfigError(
                f"FitConfig(unroll={self.unroll}) puts several updates into one graph; give compile='step' or 'trace' as well"
            )

    def _check_files(self) -> None:
        if self.resume and (self.dir is None or self.fast_dev_run):
            why = "fast_dev_run writes and reads no files" if self.fast_dev_run else "there is no dir"
            raise ConfigError(f"FitConfig(resume=True) goes on from a checkpoint, but {why}; leave one of them out")
        asked = [f"{name}={getattr(self, name)!r}" for name in ("allow", "rename") if getattr(self, name)]
        if asked and not self.resume:
            raise ConfigError(f"FitConfig({asked[0]}) is about going on from a checkpoint, but resume is False; set it, or leave it out")
        if not set(self.allow) <= _DIFFERENCES:
            raise ConfigError(f"FitConfig(allow=...) knows {sorted(_DIFFERENCES)}, but got {sorted(set(self.allow) - _DIFFERENCES)}")
        if self.dir is None:
            asked = [
                n
                for n, default in (("save_every", epochs(1)), ("keep", last(1)), ("permanent", None), ("save_in_background", True))
                if getattr(self, n) != default
            ]
            if asked:
                raise ConfigError(
                    f"FitConfig({asked[0]}={getattr(self, asked[0])!r}) is about checkpoints, but there is no dir to write them to; give dir"
                )
        if self.max_nonfinite is not None and self.nonfinite not in ("skip", "rollback"):
            raise ConfigError(
                f"FitConfig(max_nonfinite={self.max_nonfinite}) bounds nonfinite='skip' and 'rollback', but it is {self.nonfinite!r}; "
                "give one of them, or leave it out"
            )
        if self.nonfinite == "rollback" and (self.dir is None or self.debug_bundle):
            what = "goes back to a checkpoint, but there is no dir; give dir"
            also = "leaves behind the steps that debug_bundle=True would repeat; give one of them"
            raise ConfigError(f"FitConfig(nonfinite='rollback') {what if self.dir is None else also}")
        if self.profile_steps and self.dir is None:
            raise ConfigError(f"FitConfig(profile_steps={self.profile_steps}) writes traces to dir, but there is none; give dir")
        if self.debug_bundle and self.dir is None:
            raise ConfigError("FitConfig(debug_bundle=True) writes bundles to dir, but there is none; give dir")
        if self.signals_deadline is not None and not self.signals:
            raise ConfigError(
                "FitConfig(signals_deadline=...) bounds what follows a signal, but signals is False; give signals=True as well"
            )
        if (self.log_every != steps(50) or self.log_times) and not self.sinks:
            asked = "log_times=True" if self.log_times else f"log_every={self.log_every!r}"
            raise ConfigError(f"FitConfig({asked}) is about sinks, but there are none; give sinks=fl.JSONL(path) or such")

    @property
    def bounds(self) -> StopRule:
        """What ends the run: `stop` from the minima on, or one of the maxima."""
        found: list[StopRule] = []
        if self.stop is not None:
            guards = [rules.min_epochs(self.min_epochs)] if self.min_epochs else []
            guards += [rules.min_steps(self.min_steps)] if self.min_steps else []
            found.append(_guarded(self.stop, guards))
        for name in ("max_epochs", "max_steps", "max_time"):
            value = getattr(self, name)
            if value is not None:
                found.append(getattr(rules, name)(value))
        whole = found[0]
        for rule in found[1:]:
            whole = whole | rule
        return whole

    def to_json(self) -> str:
        """The configuration as JSON, default values left out.

        Raises:
            ConfigError: If a field holds a function of yours, which has no text that could be read back.
        """
        out: dict[str, Any] = {}
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in _TEXTS:
                value = None if value is None else _text(field.name, value)
            elif field.name == "sinks":
                value = [_text("sinks", sink) for sink in value]
            elif isinstance(value, Mapping):
                value = {str(k): v for k, v in value.items()}
            out[field.name] = value
        return json.dumps(out, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A configuration from JSON; nothing in it is ever run as code.

        Raises:
            ConfigError: If it is no JSON object, or a field or a name in it is unknown.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a configuration must be JSON, but: {error}") from error
        known = {field.name for field in attrs.fields(cls)}
        if not isinstance(given, dict) or not given.keys() <= known:
            unknown = sorted(given.keys() - known) if isinstance(given, dict) else type(given).__name__
            raise ConfigError(
                f"a configuration must be a JSON object with fields of FitConfig, but got {unknown}; there are {sorted(known)}"
            )
        for name in _TEXTS:
            if isinstance(given.get(name), str):
                given[name] = parse(given[name])
        if isinstance(given.get("sinks"), list):
            given["sinks"] = tuple(parse(sink) for sink in given["sinks"])
        if isinstance(given.get("accumulate"), dict):
            given["accumulate"] = {int(k): v for k, v in given["accumulate"].items()}
        return cls(**given)


def _guarded(rule: Any, guards: list[StopRule]) -> StopRule:
    whole = rule if isinstance(rule, StopRule) else StopRule(getattr(rule, "__name__", repr(rule)), rule)
    for guard in guards:
        whole = whole & guard
    return whole


def _text(name: str, value: Any) -> str:
    text = repr(value)
    try:
        parse(text)
    except ConfigError as error:
        raise ConfigError(
            f"FitConfig({name}={text:.80}) has no text that could be read back: it is, or holds, a function of your own"
        ) from error
    return text
