"""Traces of chosen steps, operation by operation, written by torch's profiler."""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import attrs
import torch

from fnlight.data import Item
from fnlight.errors import ConfigError, check_type
from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.tensors import is_profiling
from fnlight.triggers import Tick, condition


def profile(
    dir: str | os.PathLike[str],
    steps: range | Callable[[Tick], bool],
    *,
    shapes: bool = False,
    stacks: bool = False,
    memory: bool = False,
    name: str = "profile",
) -> Combinator:
    """Write a trace of chosen steps; other steps only cost a comparison.

    A trace is a file ``DIR/HOST_PID.STEP.pt.trace.json`` in Chrome's format, for https://ui.perfetto.dev and ``chrome://tracing``.
    TensorBoard's profiler plugin also finds files of this name in its log directory. Consecutive steps share one trace, named after the last
    step. The combinators before this one in the pipe are traced.

    Args:
        dir: The directory of the traces; it is created when the first one is written.
        steps: Which steps: a range of their numbers, counted from 1 like `progress.step`, such as ``range(100, 103)``; or a trigger, such as
            ``epochs(1)``, which traces each step at which it fires.
        shapes: True records the shapes of inputs.
        stacks: True records the source line of each operation; this is slow.
        memory: True records allocations.
        name: Its name in a pipe; give one if `profile` occurs twice.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If `steps` is neither, or has no step; or the directory is a URL.

    Example:
        >>> print(profile("traces", range(10, 12)))
        profile('traces', range(10, 12))
    """
    check_type("profile(dir)", dir, str | os.PathLike, "a str or os.PathLike")
    path, chosen = os.fspath(dir), _chosen(steps)
    if "://" in path:
        raise ConfigError(f"profile writes to this machine, but {path} is a URL; give a directory")
    options = {"record_shapes": shapes, "with_stack": stacks, "profile_memory": memory}

    def wrap(step: Any) -> Any:
        def profiled(state: TrainState, batch: Any) -> Any:
            recorder = state.store.run.resources.get(name)
            if chosen(state, batch):
                return (
                    _recorded(step, state, batch, recorder) if recorder is not None else _alone(step, state, batch, Recorder(path, options))
                )
            if recorder is not None and recorder.profiler is not None:
                recorder.close(None)
            return step(state, batch)

        return profiled

    def start(state: TrainState) -> TrainState:
        state.store.run.resources[name] = Recorder(path, options)
        return state

    def finish(before: TrainState, state: TrainState) -> TrainState:
        state.store.run.resources[name].close(None)
        return state

    label = "".join(f", {option}=True" for option, on in (("shapes", shapes), ("stacks", stacks), ("memory", memory)) if on) + (
        "" if name == "profile" else f", name={name!r}"
    )
    return Combinator("profile", wrap, "step", "step", args=f"{path!r}, {steps}{label}", key=name, start=start, finish=finish)


def _chosen(steps: Any) -> Callable[[TrainState, Any], bool]:
    """A function that says whether the next step is traced."""
    if isinstance(steps, range):
        if not len(steps) or min(steps) < 1:
            raise ConfigError(f"profile(..., steps={steps}) names no steps: they are counted from 1, as in range(100, 103)")
        return lambda state, _: state.progress.step + 1 in steps
    if not callable(steps):
        raise ConfigError(f"profile(..., steps=...) must be a range of steps, such as range(100, 103), or a trigger, but got {steps!r:.60}")
    given: Any = steps
    due = condition(given)

    def fires(state: TrainState, batch: Any) -> bool:
        before, item = state.progress, batch if batch.__class__ is Item else Item.of(batch, state=state)
        return due(Tick(before, before.after(item, 1, 0, before.updates)))

    return fires


def _recorded(step: Any, state: TrainState, batch: Any, recorder: "Recorder") -> Any:
    recorder.begin()
    state, metrics = step(state, batch)
    recorder.last = state.progress.step
    return state, metrics


def _alone(step: Any, state: TrainState, batch: Any, recorder: "Recorder") -> Any:
    """Without a run that closes the recorder, every step gets its own trace."""
    try:
        found = _recorded(step, state, batch, recorder)
    except BaseException as error:
        recorder.close(error)
        raise
    recorder.close(None)
    return found


@attrs.define(eq=False, repr=False)
class Recorder:
    """Records traces. It is one of the resources of a run, which closes it also after an error.

    Args:
        dir: The directory of the traces.
        options: Arguments of ``torch.profiler.profile``.

    Example:
        >>> Recorder("traces", {}).close(None)  # nothing was recorded: no file
        >>> os.path.exists("traces")
        False
    """

    dir: str
    options: dict[str, Any]
    profiler: Any = attrs.field(default=None, init=False)
    last: int | None = attrs.field(default=None, init=False)

    def begin(self) -> None:
        """Start recording, unless it is recording already.

        Raises:
            ConfigError: If another profiler is recording.
        """
        if self.profiler is not None:
            return
        if is_profiling():
            raise ConfigError("profile() cannot record while another torch profiler is recording; leave one of them out")
        self.profiler, self.last = torch.profiler.profile(**self.options), None
        self.profiler.start()

    def close(self, error: BaseException | None) -> None:
        """Stop, and write the trace; after an error in the run, a trace that cannot be written is ignored."""
        found, self.profiler = self.profiler, None
        if found is None:
            return
        found.stop()
        if self.last is None:
            return  # the first step did not finish
        name = f"{socket.gethostname()}_{os.getpid()}.{self.last}.pt.trace.json"
        with suppress(OSError, RuntimeError) if error is not None else nullcontext():
            os.makedirs(self.dir, exist_ok=True)
            found.export_chrome_trace(os.path.join(self.dir, name))
