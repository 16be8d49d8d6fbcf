"""`FitConfig`: all options of `fit`, checked before any work starts, and readable as JSON.

Triggers, stop rules, retentions and sinks are written as their source text, see `fnlight.fit.parse`. Reading a configuration never runs code.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import attrs

import fnlight.fit._checks as checks
from fnlight import triggers
from fnlight.checkpoint import Retention, last
from fnlight.errors import ConfigError
from fnlight.fit.parse import parse, written
from fnlight.triggers import StopRule, epochs, steps, stop_rule

_TEXTS = ("stop", "eval_every", "save_every", "keep", "permanent", "log_every")
_BOUNDS = ("max_epochs", "max_steps", "max_time", "stop", "fast_dev_run")


@attrs.frozen(kw_only=True)
class FitConfig:
    """How `fit` trains; optional features are off by default.

    Args:
        max_epochs: Total number of epochs, those before a resume included.
        max_steps: Total number of optimizer steps, those before a resume included.
        max_time: Total training time in seconds (or a ``timedelta``), that before a resume included.
        min_epochs: `stop` is ignored until this many epochs are completed.
        min_steps: `stop` is ignored until this many steps are completed.
        stop: A stop rule, or any function of a state that returns None or False to continue, and a reason or True to stop.
        accumulate: Batches per step, or a mapping of first epochs to batches per step.
        microbatch: The largest number of samples computed at a time, or ``"auto"``: whole batches until one runs out of memory.
        recompute: Patterns of modules whose activations are computed again in the backward pass, see `fnlight.gradients.recompute`.
        apply_in_backward: True updates each parameter as soon as its gradient is computed, and frees the gradient; see
            `fnlight.step.optimizer_in_backward`.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` (autocast; fp16 with a loss scale); ``"fp8"`` (bf16 with linear
            layers in fp8, see `fnlight.precision.fp8`); ``"bf16-true"``, ``"fp16-true"`` or ``"fp64"``
            (weights and batches are cast).
        matmul_precision: ``"highest"``, ``"high"`` or ``"medium"``: the precision of fp32 matrix products during the run; None leaves
            torch's setting unchanged.
        clip_norm: The largest 2-norm of the gradients.
        clip_value: The largest absolute value of a gradient's entry.
        ema: Decay of averaged weights; the run then evaluates the average.
        eval_every: When ``loaders.val`` is evaluated.
        sanity_batches: Evaluation batches that are tried before training.
        dir: Where checkpoints and ``config.json`` go; None writes nothing.
        save_every: When a checkpoint is saved; the last state of a run always is.
        keep: Which checkpoints stay.
        permanent: When a checkpoint is saved that always stays; `keep` is about the others.
        save_in_background: True trains on while a checkpoint is written, for the price of one copy of the state in host memory.
        resume: True goes on from the newest sound checkpoint of `dir`, or starts afresh if there is none.
        allow: Differences between the checkpoint and the code that a resumed run goes along with, with a warning: ``"model"``, ``"dtype"``
            and ``"optimizer"``, see `restore`; ``"batch_size"`` goes back to where a batch of the new size ends; ``"data"`` takes other data than that
            on which the state stands in the middle of an epoch.
        rename: Names of parameters, or of modules with all below them, in the checkpoint to those in the model.
        log_every: When training metrics go to the sinks.
        log_times: True tells the sinks what time went to as well: ``samples/s``, and the shares ``time/step``, ``time/data`` and so on.
        sinks: Where records go.
        progress: A progress bar on a terminal, else a line every few seconds.
        workers_ahead: True starts the workers of the next epoch before one ends, so that its first batch need not be waited for.
        limit_train: Batches an epoch at most (int), or a fraction of them (float).
        limit_eval: The same for evaluations.
        fast_dev_run: True or n: one epoch of n batches (True: one) of training and evaluation, without files.
        overfit_batches: n trains on the same first n batches in each epoch, unshuffled.
        device: ``"auto"`` (the accelerator if there is one), or a device such as ``"cpu"``.
        deterministic: True lets torch use deterministic algorithms only.
        detect_anomaly: True makes autograd name the operation that produced a NaN; this is slow.
        donate: True trains in the tensors of the given state, without a copy; that state cannot be read afterwards.
        gc: ``"auto"`` leaves garbage collection to Python; ``"managed"`` collects between steps, see `collect_garbage`.
        compile: ``"trace"``, ``"step"``, ``"graph"`` or ``"model"``: how much of a step is compiled, see `fnlight.compile`; None compiles nothing.
        unroll: Updates in one call of a compiled step.
        parallel: ``"auto"`` trains data parallel where the environment names several processes (as ``torchrun`` does), see
            `fnlight.parallel`; None trains in this process alone.
        exact_ranks: True gives bit-identical weights on 1, 2, 4 and 8 ranks. It is slow, and tells a bug from rounding; see
            `fnlight.parallel.exact_ranks`.
        signals: True ends the run after the current step on SIGTERM, SIGUSR1 or Ctrl-C; see `fnlight.runtime.signals`.
        signals_deadline: Seconds after a signal until the process is killed; None sets no limit.
        profile_steps: ``(first, last)``: these steps are traced into ``DIR/traces``, see `fnlight.loop.profile`.
        debug_bundle: True writes what is needed to repeat a failed step to ``DIR/bundles``; see `fnlight.nonfinite.bundle` for its cost.
        nonfinite: What to do about a NaN or infinite loss: ``"raise"``; ``"skip"`` the update (also for non-finite gradients);
            ``"rollback"`` to the last checkpoint and continue with later data, see `fnlight.nonfinite.rollback`; or ``"ignore"``.
        max_nonfinite: The run fails after this many skips or rollbacks in a row; None means ten skips, or three rollbacks.

    Raises:
        ConfigError: If a field is invalid, or two fields contradict each other.

    Example:
        >>> config = FitConfig(max_epochs=3, clip_norm=1.0, stop=triggers.patience("val/loss", 3))
        >>> FitConfig.from_json(config.to_json()) == config
        True
    """

    max_epochs: int | None = attrs.field(default=None, validator=checks.count(0))
    max_steps: int | None = attrs.field(default=None, validator=checks.count(0))
    max_time: float | None = attrs.field(default=None, converter=checks.seconds, validator=checks.above_zero)
    min_epochs: int = attrs.field(default=0, validator=checks.count(0, optional=False))
    min_steps: int = attrs.field(default=0, validator=checks.count(0, optional=False))
    stop: Callable[[Any], str | bool | None] | None = attrs.field(default=None, validator=checks.function)
    accumulate: int | Mapping[int, int] = attrs.field(default=1, converter=checks.own, validator=checks.accumulate)
    microbatch: int | str | None = attrs.field(default=None, validator=checks.part)
    recompute: tuple[str, ...] = attrs.field(
        default=(), converter=checks.several, validator=checks.each(checks.is_text, "patterns of modules' names")
    )
    apply_in_backward: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    precision: str = attrs.field(default="fp32", validator=checks.one_of("fp32", "bf16", "fp16", "fp8", "bf16-true", "fp16-true", "fp64"))
    matmul_precision: str | None = attrs.field(default=None, validator=checks.one_of(None, "highest", "high", "medium"))
    clip_norm: float | None = attrs.field(default=None, validator=checks.above_zero)
    clip_value: float | None = attrs.field(default=None, validator=checks.above_zero)
    ema: float | None = attrs.field(default=None, validator=checks.decay)
    eval_every: Callable[[Any], bool] | None = attrs.field(default=epochs(1), validator=checks.function)
    sanity_batches: int = attrs.field(default=0, validator=checks.count(0, optional=False))
    dir: str | None = attrs.field(default=None, converter=checks.path, validator=checks.folder)
    save_every: Callable[[Any], bool] | None = attrs.field(default=epochs(1), validator=checks.function)
    keep: Retention = attrs.field(default=last(1), validator=checks.function)
    permanent: Callable[[Any], bool] | None = attrs.field(default=None, validator=checks.function)
    save_in_background: bool = attrs.field(default=True, validator=checks.one_of(True, False))
    resume: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    allow: tuple[str, ...] = attrs.field(
        default=(), converter=checks.several, validator=checks.each(checks.DIFFERENCES.__contains__, checks.DIFFERENT)
    )
    rename: Mapping[str, str] | None = attrs.field(default=None, converter=checks.own, validator=checks.renames)
    log_every: Callable[[Any], bool] = attrs.field(default=steps(50), validator=checks.function)
    log_times: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    sinks: tuple[Any, ...] = attrs.field(
        default=(),
        converter=checks.several,
        validator=checks.each(callable, 'functions of a record, such as fl.JSONL("log.jsonl")'),
    )
    progress: bool = attrs.field(default=True, validator=checks.one_of(True, False))
    workers_ahead: bool = attrs.field(default=True, validator=checks.one_of(True, False))
    limit_train: int | float | None = attrs.field(default=None, validator=checks.limit)
    limit_eval: int | float | None = attrs.field(default=None, validator=checks.limit)
    fast_dev_run: bool | int = attrs.field(default=False, validator=checks.flag_or_count)
    overfit_batches: int = attrs.field(default=0, validator=checks.count(0, optional=False))
    device: str = attrs.field(default="auto", converter=checks.device, validator=checks.known_device)
    deterministic: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    detect_anomaly: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    donate: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    gc: str = attrs.field(default="auto", validator=checks.one_of("auto", "managed"))
    compile: str | None = attrs.field(default=None, validator=checks.one_of(None, "trace", "step", "graph", "model"))
    exact_ranks: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    unroll: int = attrs.field(default=1, validator=checks.count(1, optional=False))
    parallel: str | None = attrs.field(default="auto", validator=checks.one_of("auto", None))
    signals: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    signals_deadline: float | None = attrs.field(default=None, validator=checks.above_zero)
    profile_steps: tuple[int, int] | None = attrs.field(default=None, converter=checks.pair, validator=checks.first_and_last)
    debug_bundle: bool = attrs.field(default=False, validator=checks.one_of(True, False))
    nonfinite: str = attrs.field(default="raise", validator=checks.one_of("raise", "skip", "rollback", "ignore"))
    max_nonfinite: int | None = attrs.field(default=None, validator=checks.count(1))

    def __attrs_post_init__(self) -> None:
        if all(getattr(self, name) is None or getattr(self, name) is False for name in _BOUNDS):
            raise ConfigError("FitConfig must bound the run: give max_epochs, max_steps, max_time or stop")
        for unit in ("epochs", "steps"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least and self.stop is None:
                raise ConfigError(f"FitConfig(min_{unit}={least}) delays `stop`, but stop is None; give stop, or leave min_{unit} out")
            if most is not None and least > most:
                raise ConfigError(
                    f"FitConfig(min_{unit}={least}, max_{unit}={most}): the run would end before `stop` is asked; make min_{unit} smaller, or leave it out"
                )
        self._check_files()
        if self.overfit_batches and self.limit_train is not None:
            raise ConfigError("FitConfig(overfit_batches=..., limit_train=...) both set the number of batches per epoch; give one of them")
        if not isinstance(self.keep, Retention):
            raise ConfigError(f"FitConfig(keep=...) must be a retention such as last(1) or best('val/loss', 3), but got {self.keep!r}")

        if self.exact_ranks and (self.microbatch is not None or self.compile is not None):
            raise ConfigError("FitConfig(exact_ranks=True) splits batches itself and cannot be compiled; leave microbatch and compile out")
        if self.unroll > 1 and self.compile in (None, "model"):
            raise ConfigError(
                f"FitConfig(unroll={self.unroll}) puts several updates into one graph; give compile='step' or 'trace' as well"
            )

    def _check_files(self) -> None:
        if self.resume and (self.dir is None or self.fast_dev_run):
            why = "fast_dev_run writes and reads no files" if self.fast_dev_run else "there is no dir"
            raise ConfigError(
                f"FitConfig(resume=True) loads a checkpoint, but {why}; leave resume out{'' if self.fast_dev_run else ', or give dir'}"
            )
        asked = [f"{name}={getattr(self, name)!r}" for name in ("allow", "rename") if getattr(self, name)]
        if asked and not self.resume:
            raise ConfigError(
                f"FitConfig({asked[0]}) only matters for a resumed run, but resume is False; give resume=True, or leave it out"
            )
        if self.dir is None:
            asked = [
                n
                for n, default in (("save_every", epochs(1)), ("keep", last(1)), ("permanent", None), ("save_in_background", True))
                if getattr(self, n) != default
            ]
            if asked:
                raise ConfigError(f"FitConfig({asked[0]}={getattr(self, asked[0])!r}) is about checkpoints, but dir is None; give dir")
        if self.max_nonfinite is not None and self.nonfinite not in ("skip", "rollback"):
            raise ConfigError(
                f"FitConfig(max_nonfinite={self.max_nonfinite}) limits nonfinite='skip' and 'rollback', but nonfinite is {self.nonfinite!r}; "
                "give one of those two, or leave max_nonfinite out"
            )
        if self.nonfinite == "rollback" and (self.dir is None or self.debug_bundle):
            what = "loads a checkpoint, but dir is None; give dir"
            also = "drops the steps that debug_bundle=True would repeat; give only one of them"
            raise ConfigError(f"FitConfig(nonfinite='rollback') {what if self.dir is None else also}")
        if self.profile_steps and self.dir is None:
            raise ConfigError(f"FitConfig(profile_steps={self.profile_steps}) writes traces to dir, but dir is None; give dir")
        if self.debug_bundle and self.dir is None:
            raise ConfigError("FitConfig(debug_bundle=True) writes bundles to dir, but dir is None; give dir")
        if self.signals_deadline is not None and not self.signals:
            raise ConfigError(
                "FitConfig(signals_deadline=...) limits the time after a signal, but signals is False; give signals=True as well"
            )
        if (self.log_every != steps(50) or self.log_times) and not self.sinks:
            asked = "log_times=True" if self.log_times else f"log_every={self.log_every!r}"
            raise ConfigError(f"FitConfig({asked}) is about sinks, but there are none; give one, such as sinks=fl.JSONL(path)")

    @property
    def bounds(self) -> StopRule:
        """The stop rule of the run: `stop` once ``min_epochs`` and ``min_steps`` are done, or one of ``max_epochs``, ``max_steps``, ``max_time``."""
        found: list[StopRule] = []
        if self.stop is not None:
            guards = [triggers.min_epochs(self.min_epochs)] if self.min_epochs else []
            guards += [triggers.min_steps(self.min_steps)] if self.min_steps else []
            found.append(_guarded(self.stop, guards))
        for name in ("max_epochs", "max_steps", "max_time"):
            value = getattr(self, name)
            if value is not None:
                found.append(getattr(triggers, name)(value))
        whole = found[0]
        for rule in found[1:]:
            whole = whole | rule
        return whole

    def to_json(self) -> str:
        """The configuration as JSON, default values left out.

        Raises:
            ConfigError: If a field holds your own function, which cannot be written as text and read back.
        """
        out: dict[str, Any] = {}
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in _TEXTS:
                value = None if value is None else written(field.name, value)
            elif field.name == "sinks":
                value = [written("sinks", sink) for sink in value]
            elif isinstance(value, Mapping):
                value = {str(k): v for k, v in value.items()}
            out[field.name] = value
        return json.dumps(out, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A configuration from JSON; reading it never runs code.

        Raises:
            ConfigError: If it is not a JSON object, or a field or a name in it is unknown.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a configuration must be JSON, but it cannot be read: {error}") from error
        known = {field.name for field in attrs.fields(cls)}
        if not isinstance(given, dict) or not given.keys() <= known:
            unknown = sorted(given.keys() - known) if isinstance(given, dict) else type(given).__name__
            raise ConfigError(
                f"a configuration must be a JSON object with fields of FitConfig, but got {unknown}; the fields are {sorted(known)}"
            )
        for name in _TEXTS:
            if isinstance(given.get(name), str):
                given[name] = parse(given[name])
        given["sinks"] = tuple(parse(sink) if isinstance(sink, str) else sink for sink in checks.several(given.get("sinks")))
        if isinstance(given.get("accumulate"), dict):
            given["accumulate"] = {int(k) if k.isdecimal() else k: v for k, v in given["accumulate"].items()}
        return cls(**given)


def _guarded(rule: Any, guards: list[StopRule]) -> StopRule:
    whole = stop_rule(rule)
    for guard in guards:
        whole = whole & guard
    return whole
