"""Checks of a task on one batch: every law that fnlight relies on and that a user's functions could break."""

import copy
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint import load, save
from fnlight.errors import ConfigError, StepError, TaskCheckError
from fnlight.gradients import grad
from fnlight.loop import inference
from fnlight.metrics import Tally, parted
from fnlight.pipe import Phase, pipe
from fnlight.state import Store, Task, TrainState
from fnlight.step import apply
from fnlight.tensors import buffers_of, differences, fold_in, isolated, leaves, map_tensors, seed_generators
from fnlight.testing.compare import listed, next_numbers, plain, snapshot


@attrs.frozen
class TaskReport:
    """The result of `check_task`: which laws hold, and which were not checked.

    Args:
        checked: The names of the checks that passed.
        skipped: The names of the skipped checks, with the reason.

    Example:
        >>> print(TaskReport(("overfit",), {"leak": "asked for"}))
        ok       overfit: the loss on one batch falls
        skipped  leak: asked for
    """

    checked: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"ok       {name}: {_CHECKS[name][1]}" for name in self.checked]
        return "\n".join([*lines, *(f"skipped  {name}: {why}" for name, why in self.skipped.items())])


@attrs.frozen(eq=False)
class _Case:
    """A task under test, with a state before its first step."""

    task: Task
    state: TrainState
    batch: Any
    overfit_steps: int

    @property
    def key(self) -> int:
        return fold_in(self.state.key, 0)  # of the first micro-batch

    def fresh(self) -> tuple[Store, Any]:
        return self.state.copy().store, copy.deepcopy(self.batch)

    def gradients(self, key: int) -> dict[str, Any]:
        """All that one `train_step` and its backward pass give; of several by the names of their phases."""
        store, batch = self.fresh()
        if not store.phases:
            return {**_gradients_of(self.losses["train_step"], store, batch, key), "buffer": dict(store.module.named_buffers())}
        found: dict[str, Any] = {}
        for name, fn in self.losses.items():
            with store.training(name) as phase:
                found[name] = map_tensors(torch.clone, _gradients_of(fn, phase, copy.deepcopy(batch), key))
        return {**found, "buffer": dict(store.module.named_buffers())}

    @property
    def losses(self) -> dict[str, Callable[[Any, Any], Any]]:
        """The task's losses by name; none where its `train_step` is a whole step, or made of gradient functions."""
        given = self.task.train_step if isinstance(self.task.train_step, Mapping) else {"train_step": self.task.train_step}
        bare = {name: fn.train_step if isinstance(fn, Phase) else fn for name, fn in given.items()}
        return {} if any(getattr(fn, "kind", "loss") != "loss" for fn in bare.values()) else bare

    def steps(self) -> dict[str, Callable[[Store, Any], Any]]:
        """The task's functions as functions of a store and a batch, in the mode and with the keys that fnlight gives them."""
        found: dict[str, Callable[[Store, Any], Any]] = {name: partial(_called, fn) for name, fn in self.losses.items()}
        for name in ("eval_step", "predict_step"):
            fn = getattr(self.task, name)
            if fn is not None:
                found[name] = partial(_inferred, fn)
        return found

    def trained(self, steps: int) -> tuple[TrainState, list[float]]:
        """A state some steps on, at a constant learning rate, and the losses on the way."""
        whole = getattr(self.task.train_step, "kind", None) == "step"
        state, losses, step = self.state.copy(), list[float](), pipe(self.task.train_step, *([] if whole else [grad(), apply()]))
        state.store.optim = attrs.evolve(state.store.optim, schedule=None, monitor=None)
        for _ in range(steps):
            state, metrics = step(state, copy.deepcopy(self.batch))
            losses += [float(metrics["loss"])] if "loss" in metrics else []
        return state, losses

    def unable(self) -> str | None:
        """Why it cannot be trained, or None."""
        if not self.state.store.params:
            return "nothing is trainable"
        return None if self.task.configure_optimizers is not None else "the task has no configure_optimizers"


def _called(fn: Callable[[Any, Any], Any], store: Store, batch: Any) -> Any:
    return fn(store.module, batch)


def _gradients_of(fn: Callable[[Any, Any], Any], store: Store, batch: Any, key: int) -> dict[str, Any]:
    found = grad()(fn)(store, batch, key)
    names = [name for name, p in store.named.items() if p.requires_grad]
    values = dict(zip(names, found.values, strict=True))
    return {"loss": found.loss, "weight": found.weight, "metrics": found.metrics, "gradient": values}


def _inferred(fn: Callable[[Any, Any], Any], store: Store, batch: Any) -> Any:
    with inference(store) as module:
        return fn(module, batch)


def check_task(task: Task, batch: Any, *, seed: int = 0, skip: Iterable[str] = (), overfit_steps: int = 50) -> TaskReport:
    """Check that a task keeps the laws that fnlight relies on; a few seconds for a small model.

    * ``deterministic``: `train_step` gives bit-identical loss, metrics and gradients for one key, whatever was drawn before.
    * ``keyed``: its random numbers come from the generators that fnlight seeds; it does not seed them itself.
    * ``batch``: no step changes its batch.
    * ``model``: `train_step` changes nothing of the model but its buffers.
    * ``gradients``: a finite gradient reaches every trainable parameter.
    * ``evaluation``: `eval_step` and `predict_step` leave the model as it was, and `eval_step` gives metrics.
    * ``leak``: no sample changes what the model gives for another. In eval mode every other sample of the batch is replaced by
      copies of one, and the rows of that one in the outputs of the model and `predict_step` must not change. This works for any dtype. It
      is skipped if there is only one sample, if tensors disagree about the number of samples, or if no output has one row per sample.
    * ``overfit``: the loss on this one batch falls by at least 5 % within `overfit_steps` steps, without the schedule.
    * ``round_trip``: the state after one step is bit-identical after `save` and `load`.

    Args:
        task: The task.
        batch: One batch as the loader gives it, with two samples or more, on the device of the model; left as it was.
        seed: The seed of random numbers.
        skip: Names of checks to skip.
        overfit_steps: How many steps ``overfit`` takes.

    Returns:
        A report that prints what was checked, and what was skipped and why.

    Raises:
        TaskCheckError: If a law is broken; the message names the check, the place and what to do. It is an ``AssertionError``.
        StepError: If `train_step` returns a value of the wrong kind.
        ConfigError: If `skip` has an unknown name.

    Example:
        >>> from fnlight.testing import tiny_batches, tiny_task
        >>> report = check_task(tiny_task(), tiny_batches()[0])
        >>> report.skipped
        {}
    """
    left_out = {skip} if isinstance(skip, str) else set(skip)
    if not left_out <= _CHECKS.keys():
        raise ConfigError(f"check_task has no check called {sorted(left_out - _CHECKS.keys())}; there are {list(_CHECKS)}")
    state, checked, skipped = TrainState.create(task, seed), list[str](), dict[str, str]()
    case = _Case(task, state, batch, overfit_steps)
    with isolated(state.device):
        for name, (check, _) in _CHECKS.items():
            seed_generators(case.key, state.device)
            why = "asked for" if name in left_out else check(case)
            if why is None:
                checked.append(name)
            else:
                skipped[name] = why
    return TaskReport(tuple(checked), skipped)


def _fail(check: str, found: str, advice: str) -> NoReturn:
    raise TaskCheckError(f"{check}: {found}\n{advice}, or leave this check out with check_task(..., skip=[{check!r}])")


def _deterministic(case: _Case) -> str | None:
    if not case.losses:
        return _WHOLE
    results = list[Any]()
    for before in (1, 2):
        seed_generators(before, case.state.device)
        results.append(snapshot(case.gradients(case.key)))
    places = list(differences(*results))
    if places:
        _fail("deterministic", f"train_step, called twice on one model, batch and key, differs in{listed(places)}",
              "Draw from the global generators of torch, random or numpy, which fnlight seeds, not from one of your own, and keep nothing outside of "
              "the model that changes from call to call")  # fmt: skip
    return None


def _keyed(case: _Case) -> str | None:
    if not case.losses:
        return _WHOLE
    after = list[dict[str, Any]]()
    for key in (case.key, fold_in(case.key, 1)):
        case.gradients(key)
        after.append(next_numbers())
    seeded = [name for name, number in after[0].items() if number == after[1][name]]
    if seeded:
        _fail("keyed", f"train_step seeds the global generator of {', '.join(seeded)} itself, so every step draws the same numbers",
              "Take the seeding out: fnlight seeds before every batch, from the seed of the state")  # fmt: skip
    return None


def _batch(case: _Case) -> str | None:
    for name, step in case.steps().items():
        store, batch = case.fresh()
        step(store, batch)
        places = list(differences(plain(case.batch), plain(batch)))
        if places:
            _fail("batch", f"{name} changes the batch that it is given{listed(places)}",
                  "Work on copies: no operations in place (x.add_, x[...] = ..., batch.pop) on what comes out of the batch")  # fmt: skip
    return None


def _model(case: _Case) -> str | None:
    if not case.losses:
        return _WHOLE
    store, batch = case.fresh()
    before = _anatomy(store.module)
    for fn in case.losses.values():
        fn(store.module, batch)
    places = list(differences(before, _anatomy(store.module)))
    places += [f"{name}.grad: filled" for name, p in store.named.items() if p.grad is not None]
    if places:
        _fail("model", f"train_step changes the model outside of its buffers{listed(places)}",
              "What a model remembers from batch to batch belongs in register_buffer(...); parameters, gradients and modes are fnlight's to change")  # fmt: skip
    return None


def _anatomy(module: nn.Module) -> dict[str, Any]:
    """All that a module is, the values of its buffers aside."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        found |= {".".join(filter(None, (name, key))): _frozen(value) for key, value in vars(part).items() if value is not buffers_of(part)}
    return found


def _frozen(value: Any) -> Any:
    """A plain value as it is now; of any other object, which one it is."""
    if isinstance(value, nn.Parameter):
        return {"is": id(value), "requires_grad": value.requires_grad, "value": value.detach().clone()}
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {str(key): _frozen(each) for key, each in value.items()}
    if isinstance(value, list | tuple | deque | set):
        return [_frozen(each) for each in (sorted(value, key=repr) if isinstance(value, set) else value)]
    return value if value is None or isinstance(value, bool | int | float | str) else f"{type(value).__name__} at {id(value):#x}"


def _gradients(case: _Case) -> str | None:
    if not case.state.store.params:
        return "nothing is trainable"
    if not case.losses:
        return _WHOLE
    found = case.gradients(case.key)
    values = {
        name: value for part in ([found] if "gradient" in found else found.values()) for name, value in part.get("gradient", {}).items()
    }
    without = [name for name, value in values.items() if value is None]
    if without:
        _fail("gradients", f"no gradient reaches{listed(without)}",
              "Is it detached, unused, or does train_step use another model than the one it is given? Freeze what is not to be trained with "
              "requires_grad_(False)")  # fmt: skip
    broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if broken:
        _fail(
            "gradients", f"the gradient is NaN or infinite in{listed(broken)}", "Look for log(0), division by 0, sqrt at 0 or an overflow"
        )
    return None


def _evaluation(case: _Case) -> str | None:
    steps = case.steps()
    for name in case.losses:
        del steps[name]
    for name, step in steps.items():
        store, batch = case.fresh()
        before = {**_anatomy(store.module), **snapshot(store.module)}
        out = step(store, batch)
        places = list(differences(before, {**_anatomy(store.module), **plain(store.module)}))
        if places:
            _fail("evaluation", f"{name} changes the model{listed(places)}", "Compute from what it is given, and return what is to be kept")
        if name == "eval_step":
            _read_metrics(out)
    return None if steps else "the task has no eval_step and no predict_step"


def _read_metrics(out: Any) -> None:
    out, objects = parted(out)
    for each in objects.values():
        each.reset()
    if not isinstance(out, Mapping) or not (out or objects):
        _fail(
            "evaluation", f"eval_step gives {type(out).__name__}: {out!r:.60}, no dict of metrics", 'Return a dict such as {"loss": loss}'
        )
    tally = Tally()
    try:
        if out:
            tally.add(1, out)
            tally.read()
    except (StepError, RuntimeError, TypeError, ValueError) as error:
        _fail(
            "evaluation",
            f"eval_step gives metrics {list(out)} that do not come to one number each: {error}",
            "Reduce them, e.g. with .mean()",
        )


def _leak(case: _Case) -> str | None:
    sizes = {leaf.shape[:1] for _, leaf in leaves(case.batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        return "the tensors of the batch do not agree on a number of samples"
    count = sizes.pop()[0]
    if count < 2:
        return "the batch has one sample only"
    compared, given = 0, _outputs(case, case.batch)
    for sample in (0, count - 1):
        alone = map_tensors(lambda t, i=sample: t[i : i + 1].expand_as(t).clone() if t.dim() else t, case.batch)
        for (path, one), (_, two) in zip(given, _outputs(case, alone), strict=False):
            if one.dim() and one.shape[0] == count and one.shape == two.shape:
                compared += 1
                if not torch.allclose(one[sample].to(torch.float64), two[sample].to(torch.float64), rtol=1e-3, atol=1e-5, equal_nan=True):
                    _fail("leak", f"in eval mode, what {path} for sample {sample} changes when other samples of its batch do",
                          "Look for a reduction or a softmax over the first dimension, a reshape that mixes it with others, or a norm over the batch; "
                          "where samples are meant to see each other, or the first dimension is not theirs,")  # fmt: skip
    return None if compared else "neither the model nor predict_step gives a tensor with a row a sample"


def _outputs(case: _Case, batch: Any) -> list[tuple[str, Tensor]]:
    """Tensors that the model gives within the steps, and that predict_step gives."""
    found = list[tuple[str, Any]]()
    for name, step in case.steps().items():
        store = case.state.copy().store
        handle = store.module.register_forward_hook(lambda module, args, out: found.append(("the model gives", out)))
        seed_generators(case.key, case.state.device)
        out = step(store, copy.deepcopy(batch)) if name not in case.losses else _inferred(case.losses[name], store, copy.deepcopy(batch))
        handle.remove()
        if name == "predict_step":
            found.append(("predict_step gives", out))
    return [(what, leaf) for what, out in found for _, leaf in leaves(out) if isinstance(leaf, Tensor)]


def _overfit(case: _Case) -> str | None:
    if case.unable() or len(case.losses) != 1:
        return case.unable() or ("the phases of the task may pull against each other" if case.losses else _WHOLE)
    _, losses = case.trained(case.overfit_steps)
    first, last = losses[0], sum(losses[-5:]) / len(losses[-5:])
    if not first - last >= 0.05 * abs(first) or not math.isfinite(last):
        _fail("overfit", f"the loss on one batch goes from {first:.6g} to {last:.6g} in {case.overfit_steps} steps, and should fall by 5 % at least",
              "Is the learning rate too small or too large, do labels fit their inputs, is the loss the right way up? Raise overfit_steps if it is slow")  # fmt: skip
    return None


def _round_trip(case: _Case) -> str | None:
    state, _ = case.trained(0 if case.unable() else 1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "state")
        save(state, path)
        loaded = load(path, case.task)
    places = list(differences(plain(state), plain(loaded)))
    if places:
        _fail("round_trip", f"after save and load the state differs in{listed(places)}", "Keep what must survive in parameters and buffers")
    return None


_WHOLE = "the task's train_step is a whole step, or made of gradient functions"

_CHECKS: Mapping[str, tuple[Callable[[_Case], str | None], str]] = {
    "deterministic": (_deterministic, "train_step gives bitwise the same for one key"),
    "keyed": (_keyed, "its random numbers follow from the seed"),
    "batch": (_batch, "no step changes its batch"),
    "model": (_model, "train_step changes nothing of the model but its buffers"),
    "gradients": (_gradients, "a finite gradient reaches every trainable parameter"),
    "evaluation": (_evaluation, "eval_step and predict_step leave the model as it was"),
    "leak": (_leak, "no sample changes what the model gives for another"),
    "overfit": (_overfit, "the loss on one batch falls"),
    "round_trip": (_round_trip, "the state is bitwise the same after save and load"),
}
