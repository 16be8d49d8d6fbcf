"""When a run is saved: `checkpoint_every`, and the `Saver` that writes checkpoints while training continues.

A save in the background has two parts. The tensors are copied into host buffers, and the step waits for that; then a thread writes the
buffers to disk and deletes checkpoints that are not kept. There is one save at a time: when the next is due, the step waits for it.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from fnlight.checkpoint import (
    Background,
    Buffers,
    Parts,
    Retention,
    amend,
    at,
    checkpoints,
    delete,
    describe_state,
    hold,
    is_cut,
    is_there,
    last,
    name_of,
    own_path,
    parts_of,
    staying,
    step_path,
    sweep,
    writable,
    write,
    write_together,
)
from fnlight.errors import CheckpointError, CheckpointWarning, ConfigError, NonFiniteError, check_type, warn
from fnlight.pipe import Combinator
from fnlight.state import Progress, TrainState
from fnlight.tensors import is_sharded, listed, not_finite
from fnlight.triggers import Tick, condition, epochs


def checkpoint_every(
    dir: str | os.PathLike[str],
    every: Callable[[Tick], bool] | None = epochs(1),
    keep: Retention = last(1),
    *,
    permanent: Callable[[Tick], bool] | None = None,
    background: bool = True,
    on_exception: bool = True,
    initial: bool = False,
    finite: bool = True,
    name: str = "checkpoint_every",
) -> Combinator:
    """Save a checkpoint on a trigger, and always the last state of a run; then delete the checkpoints that are not kept.

    The directory is locked during a run. An error of a save in the background is raised at the next step, or when the run ends.
    Before a save, the trainable parameters are checked: NaN or infinity is an error, and the existing checkpoints are kept.

    Args:
        dir: The run's directory; checkpoints go to ``DIR/checkpoints/step-00000500``.
        every: When to save; None saves only the last state of a run.
        keep: Which of this run's checkpoints are kept: `last`, `best`, `every`, joined with ``|``; the newest is always kept.
        permanent: When to save a checkpoint that is never deleted; `keep` applies to the others. None saves none.
        background: True writes while training continues; it needs one copy of the state in host memory.
        on_exception: True saves the last completed step, if its tensors are still valid, when an exception ends the run.
        initial: True also saves the state before the first step, if the directory has no checkpoint, so that `rollback` always finds one.
        finite: False also saves parameters that are NaN or infinite, and then deletes older checkpoints as usual.
        name: The key of the list of checkpoints in ``state.memory``; unique in a pipe.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If `keep` is not a retention.

    Example:
        >>> from fnlight.triggers import steps
        >>> print(checkpoint_every("runs/a", every=steps(500)))
        checkpoint_every('runs/a', every=steps(500), keep=last(1))
    """
    _check(dir, keep)
    path, due, lasting = os.fspath(dir), _due("every", every), _due("permanent", permanent)
    options = {"background": background, "on_exception": on_exception, "initial": initial, "finite": finite}

    def wrap(step: Any) -> Any:
        def checkpointed(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            saver = _saver(state, path, name, keep=keep, finite=finite)
            saver.watch(state)
            tick = Tick(before, state.progress, idle=saver.idle(before, state))
            forever = lasting(tick)
            if forever or due(tick):
                saver.save(state, forever)
            return state, metrics

        return checkpointed

    def start(state: TrainState) -> TrainState:
        return _open(state, Saver(dir=path, key=name, keep=keep, background=background, on_exception=on_exception, finite=finite), initial)

    def finish(before: TrainState, state: TrainState) -> TrainState:
        return _saver(state, path, name, keep=keep, finite=finite).finish(state)

    return Combinator(
        "checkpoint_every", wrap, "step", "step", args=_label(path, every, keep, permanent=permanent, **options), key=name,
        init=lambda store: {"saved": [], "permanent": [], "skipped": 0}, phase="save", start=start, finish=finish, requires=keep.monitors,
    )  # fmt: skip


def _due(name: str, when: Callable[[Tick], bool] | None) -> Callable[[Tick], bool]:
    return (lambda _: False) if when is None else condition(when, f"checkpoint_every({name}=...)")


def _check(dir: Any, keep: Any) -> None:
    check_type("checkpoint_every(dir)", dir, str | os.PathLike, "a str or os.PathLike")
    if not isinstance(keep, Retention):
        raise ConfigError(f"keep must be a retention such as last(3) or best('val/loss', 3), but got {keep!r}")


def _saver(state: TrainState, path: str, name: str, *, keep: Retention, finite: bool) -> "Saver":
    """The saver of the run; outside of a run, one that saves in the foreground, since no run would wait for it."""
    return state.store.run.resources.get(name) or Saver(dir=path, key=name, keep=keep, background=False, on_exception=False, finite=finite)


def _open(state: TrainState, saver: "Saver", initial: bool) -> TrainState:
    """Begin a run; the lock comes first, so that the files of another run are never touched."""
    resources, lock, place = state.store.run.resources, name_of(saver.dir), state.store.place
    if place is None or place.writes:
        if lock not in resources:  # `fit` has it already
            resources[lock] = hold(saver.dir)
        writable(saver.dir)
        saver.tidy(state)
    resources[saver.key] = saver
    first = initial and not checkpoints(saver.dir)
    if place is not None:
        tree = state.store.memory[saver.key]
        tree.update(place.everyone.gather(tree)[0])  # only the rank that writes knows the files
        first = place.everyone.gather(first)[0]
    if first:
        saver.save(state, wait=True)
    return state


def _label(path: str, every: Any, keep: Retention, permanent: Any, **options: bool) -> str:
    parts = [repr(path), f"every={every}", f"keep={keep}", f"permanent={permanent}" if permanent else ""]
    parts += [f"{name}={value}" for name, value in options.items() if value != (name != "initial")]  # what is not the default
    return ", ".join(part for part in parts if part)


class Saver:
    """Saves the checkpoints of a run: host buffers, and at most one save at a time. It is one of the run's resources.

    Args:
        dir: The run's directory.
        key: The key of the list of checkpoints in ``state.memory``.
        keep: Which of them are kept.
        background: Whether files are written while training continues.
        on_exception: Whether the last completed step is saved when an exception ends the run.
        finite: Whether only finite parameters are saved.

    Example:
        >>> Saver("runs/a", "checkpoint_every", last(1), background=True, on_exception=True).thread.idle
        True
    """

    def __init__(self, dir: str, key: str, keep: Retention, background: bool, on_exception: bool, finite: bool = True) -> None:
        self.dir, self.key, self.keep, self.finite = dir, key, keep, finite
        self.background, self.on_exception = background, on_exception
        self.thread, self.buffers = Background(), Buffers()
        self.left: tuple[int, ...] = ()  # steps whose checkpoints could not be deleted; tried again later
        self.untold: tuple[str, ...] = ()  # the reasons, for a warning in the training thread
        self.ranks: Any = None  # all ranks, in a process group used for saving only
        self.last: TrainState | None = None  # after the last completed step

    def tidy(self, state: TrainState) -> None:
        """Before a run: delete what the run before could not delete any more, and forget checkpoints that were deleted by others."""
        sweep(self.dir)
        tree = state.store.memory[self.key]
        stay = staying(tree["saved"], self.keep, state.history)
        self._delete([step for step in tree["saved"] if step not in stay])
        there = {kind: [step for step in tree.get(kind, ()) if is_there(self.dir, step)] for kind in ("saved", "permanent")}
        tree["saved"] = [step for step in tree["saved"] if step not in stay or step in there["saved"]]
        tree["permanent"] = there["permanent"]
        self._tell()

    def watch(self, state: TrainState) -> None:
        """After every step: raise the error of a failed save, and remember the state."""
        if self.thread.error is not None:
            self.settle()
        self.last = state

    def idle(self, before: Progress, state: TrainState) -> bool:
        """Whether no rank is saving. Ranks agree on it only at the steps where they agree on the time; between those, the time is constant."""
        place = state.store.place
        if place is None:
            return self.thread.idle
        return before.seconds != state.progress.seconds and not place.everyone.all_reduce_max([not self.thread.idle])[0]

    def save(self, state: TrainState, forever: bool = False, wait: bool = False, together: bool = True) -> None:
        """Save a state, after waiting for the previous save; in the background, return as soon as its tensors are copied.

        With several ranks, all must call it, and one writes; with `together` False, a single rank saves on its own.
        """
        self._let_end(state)
        with state.store.wall_time.taken("save"):
            self._look(state)
            if self.finite:
                _check_finite(state, self.dir, together)
            write = self._prepared(state, forever, staged=self.background and not wait, together=together)
            if write is None:
                return
            if self.background and not wait:
                self.thread.begin(write)
            else:
                write()
                self._tell()

    def _look(self, state: TrainState) -> None:
        """Before something is written: is the directory still this run's alone?"""
        lock = state.store.run.resources.get(name_of(self.dir))
        if lock is not None:
            lock.look()

    def _let_end(self, state: TrainState) -> None:
        """Wait for the previous save, and count the time as ``stall``."""
        with state.store.wall_time.taken("stall"):
            self.settle()

    def settle(self) -> None:
        """Wait for the current save; raise its error if it failed."""
        self.thread.wait()
        self._tell()

    def finish(self, state: TrainState) -> TrainState:
        """Save the last state of a run and return it; if it is saved already, only add why the run ended."""
        self._let_end(state)
        if _is_listed(state.store.memory[self.key], state.progress):
            with state.store.wall_time.taken("save"):
                self._look(state)
                amend(state, own_path(self.dir, state.progress.step))
        else:
            self.save(state, wait=True)
        if state.store.place is not None:
            state.store.place.everyone.gather(None)  # the other ranks wait until it is written
        return state

    def close(self, error: BaseException | None) -> None:
        """At the end of a run, also after an error: finish the current save, and raise its error or add it to the run's error."""
        state, self.last = self.last, None
        try:
            self.settle()
            if self.on_exception and state is not None and error is not None:
                self._rescue(state, error)
        except Exception as failure:
            if error is None or isinstance(error, GeneratorExit):
                raise
            error.add_note(f"A save also failed: {failure}")
        finally:
            self.buffers.clear()
            if self.ranks is not None:
                self.ranks.leave()
                self.ranks = None

    def _rescue(self, state: TrainState, error: BaseException) -> None:
        """Save the last completed step if its tensors were not changed since; a note on the error says whether it was saved."""
        tree, step = state.store.memory[self.key], state.progress.step
        if isinstance(error, GeneratorExit | CheckpointError) or _is_listed(tree, state.progress):
            return
        doubt = "each rank holds only parts of it" if any(map(is_sharded, state.store.params)) else _doubt(state)
        if doubt is None:
            self.save(state, wait=True, together=False)
            error.add_note(f"The state of step {step}, the last one that was completed, is saved in {step_path(self.dir, step)}.")
        else:
            error.add_note(
                f"The state of step {step}, the last one that was completed, was not saved: {doubt}. Older checkpoints are still there."
            )

    def _prepared(self, state: TrainState, forever: bool, staged: bool, together: bool) -> Callable[[], None] | None:
        """What writes this version of the state, and then deletes what need not stay; None where another rank does."""
        tree, path, place = state.store.memory[self.key], own_path(self.dir, state.progress.step), state.store.place
        gone = _enlist(tree, state.progress, forever, keep=self.keep, history=state.history)
        body, tensors = describe_state(state, together)
        filled: Callable[[], None] = _nothing
        if place is not None and is_cut(tensors):
            return self._together(path, body, parts_of(tensors, place.everyone.rank), gone=gone, place=place, staged=staged)
        if place is not None and not place.writes:
            return None
        if staged:
            tensors, filled = self.buffers.stage(tensors)

        def writing() -> None:
            filled()
            write(at(path), body, tensors)
            self._delete(gone)

        return writing

    def _together(self, path: str, body: Any, parts: Parts, gone: list[int], place: Any, staged: bool) -> Callable[[], None]:
        """A function that writes this rank's parts, then waits for the other ranks; in the background, with a process group of its own."""
        ranks, filled = place.everyone, _nothing
        if staged:
            if self.ranks is None:
                self.ranks = place.everyone.apart()
            ranks = self.ranks
            own, filled = self.buffers.stage(parts.own)
            parts = attrs.evolve(parts, own=own)

        def writing() -> None:
            filled()
            write_together(at(path), body, parts, ranks)
            if place.writes:
                self._delete(gone)

        return writing

    def _delete(self, steps: Iterable[int]) -> None:
        found = delete(self.dir, [*self.left, *steps])
        self.left, self.untold = tuple(found), tuple(found.values())

    def _tell(self) -> None:
        problems, self.untold = self.untold, ()
        for problem in problems:
            warn(problem, CheckpointWarning)


def _nothing() -> None:
    return None


def _is_listed(tree: Mapping[str, Any], at: Progress) -> bool:
    """Whether this state is saved; after a skipped update, the state of the same step is a different one."""
    return at.step in (*tree["saved"][-1:], *tree.get("permanent", ())[-1:]) and at.skipped == tree.get("skipped", 0)


def _enlist(tree: dict[str, Any], at: Progress, forever: bool, keep: Retention, history: Iterable[Any]) -> list[int]:
    """Add a step to the list of checkpoints; return the steps that can be deleted once it is written.

    Those are removed from the list at the next save only: if a run is killed before it deletes them, the resumed run finds and deletes them.
    The list is a function of steps and history, so it does not depend on the speed of the disk.
    """
    step, tree["skipped"] = at.step, at.skipped
    forever = forever or step in tree.get("permanent", ())
    saved, permanent = ([s for s in tree.get(kind, ()) if s < step] for kind in ("saved", "permanent"))
    stay = staying(saved, keep, history)
    (permanent if forever else saved).append(step)
    tree["saved"] = [s for s in saved if s in stay or s == step]
    tree["permanent"] = permanent
    stay = staying(tree["saved"], keep, history)
    return [s for s in tree["saved"] if s not in stay]


def _doubt(state: TrainState) -> str | None:
    """Why a state may differ from that of a run without the failure; None if it cannot."""
    store = state.store
    if store.version != state.version:
        return "the step that failed may have changed its tensors"
    if getattr(store.step.position, "fleeting", store.step.position is not None):
        return "the loader keeps its own place, and has moved on"
    return "its parameters are not finite" if _broken(state) else None


def _broken(state: TrainState) -> list[str]:
    """The trainable parameters that are NaN or infinite; all parameters are checked if none is trainable."""
    named = state.store.named
    return not_finite({name: p for name, p in named.items() if p.requires_grad} or named)


def _check_finite(state: TrainState, dir: str, together: bool) -> None:
    """Raise on all ranks, before a save, if a parameter is NaN or infinite on any of them: it must not replace a valid checkpoint."""
    bad, place, at = _broken(state), state.store.place, state.progress
    if place is not None and together:
        bad = list(dict.fromkeys(name for names in place.everyone.gather(bad) for name in names))
    if not bad:
        return
    older = checkpoints(dir)
    raise NonFiniteError(
        f"after step {at.step} (epoch {at.epoch}, batch {at.batch}) these parameters are NaN or infinite: {listed(bad)}; they were not saved, and "
        f"{f'the newest checkpoint is still {older[-1][1]}' if older else 'there is no checkpoint yet'}. If every loss until then was finite, the "
        "gradients of this step were not, as those of sqrt at 0; look at its batch, lower the learning rate, or skip such steps with "
        'skip_nonfinite() (with fit: FitConfig(nonfinite="skip"))'
    )
