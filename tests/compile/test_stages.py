"""Stages with memory of their own, or with numbers that change from step to step, are parts of the graph."""

import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

import fnlight as fl
from fnlight.testing import assert_trees_equal
from tests.compile.test_compiled_steps import OPTIMIZERS, apart, batches_of, task_of, train_step


def named_losses(model: Any, batch: Any) -> Any:
    """Two losses."""
    loss, metrics = train_step(model, batch)
    return {"one": loss, "two": fl.Mean(loss.total * loss.total / 8, loss.weight)}, metrics


def recurrent(model: Any, batch: Any) -> Any:
    """A loss that looks at what the batch before has left."""
    batch, seen = batch
    loss, metrics = train_step(model, batch)
    return fl.Mean(loss.total * (1 + seen.sigmoid()), loss.weight), metrics, 0.5 * seen + loss.total.detach()


STAGES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "weighted by step": (named_losses, [fl.weighted({"one": 1.0, "two": lambda step: 1 / (1 + step)})], []),
    "carry": (recurrent, [fl.carry(lambda model, batch: torch.zeros(()))], []),
    "grad_noise": (train_step, [fl.grad_noise(0.01)], []),
    "clip_quantile": (train_step, [fl.clip_quantile(0.3, window=3)], []),
    "skip_nonfinite": (train_step, [fl.skip_nonfinite(max_consecutive=3)], []),
    "skip_spikes": (train_step, [fl.skip_spikes(sigma=0.5, window=2, max_consecutive=None)], []),
    "microbatch": (train_step, [fl.microbatch(2)], []),
    "clip_adaptive": (train_step, [fl.clip_adaptive(0.1)], []),
    "ema with warm-up": (train_step, [], [fl.ema(fl.ema_warmup(0.9), "slow")]),
}


def infected() -> list[Any]:
    """Batches of which the third has a loss that is no number."""
    data = batches_of((6,) * 6)
    data[2][0][0, 0] = float("nan")
    return data


def trained(
    name: str, *compiled: Any, optimizer: Any = OPTIMIZERS["AdamW"], data: Any = None, steps: int = 12
) -> tuple[fl.TrainState, list[dict[str, float]]]:
    """The state after some steps of a pipe with one of the stages, and the metrics of each."""
    fn, grads, others = STAGES[name]
    task = task_of(optimizer, fn)
    parts = [fl.grad(), *grads, fl.apply(), fl.ema(0.9), *others, *compiled, fl.stop_when(fl.max_steps(steps))]
    state, found = fl.TrainState.create(task, seed=3), []
    for after, metrics in fl.run(fl.pipe(fn, *parts), state, data or batches_of((6,) * 6)):
        state = after
        found.append({k: float(v.compute() if callable(getattr(v, "compute", None)) else v) for k, v in metrics.items()})
    return state, found


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_traced_bitwise(name: str) -> None:
    """Weights, buffers, slots, every memory and every metric are those of the eager step, and nothing is said of a step without a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fl.errors.CompileWarning)
        (one, metrics), (two, others) = (trained(name, *parts) for parts in ((), (fl.compile("trace"),)))
    for a, b in ((one.params, two.params), (one.buffers, two.buffers), (one.opt_state, two.opt_state), (one.memory, two.memory)):
        assert_trees_equal(dict(a), dict(b))
    assert metrics == others


@pytest.mark.parametrize("name", ["weighted by step", "carry", "grad_noise", "clip_quantile", "skip_nonfinite", "ema with warm-up"])
def test_a_stage_is_unrolled_bitwise(name: str) -> None:
    """Three updates in one call are those updates one by one: each has its own numbers."""
    (one, _), (two, _) = (trained(name, *parts) for parts in ((), (fl.compile("trace", unroll=3),)))
    for a, b in ((one.params, two.params), (one.opt_state, two.opt_state), (one.memory, two.memory)):
        assert_trees_equal(dict(a), dict(b))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "RMSprop"])
def test_a_step_of_a_graph_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    """Fused optimizers mask it in their kernel, the step of others is taken back; neither asks the host."""
    found: list[Any] = []
    for parts in ((), (fl.compile("trace"),)):
        state, metrics = trained("skip_nonfinite", *parts, optimizer=OPTIMIZERS[optimizer], data=infected())
        found.append((dict(state.params), dict(state.opt_state), dict(state.buffers), dict(state.memory), [m["skipped"] for m in metrics]))
    assert_trees_equal(found[0], found[1])
    assert found[1][-1] == [0, 0, 1, 0, 0, 0] * 2


def test_compiled_stages_are_the_eager_ones_up_to_rounding() -> None:
    """What is skipped, and numbers that come from outside, are right in machine code too."""
    for name in ("skip_nonfinite", "weighted by step"):
        data = infected() if name == "skip_nonfinite" else None
        (one, _), (two, _) = (trained(name, *parts, data=data) for parts in ((), (fl.compile("step"),)))
        assert apart(one, two) < 1e-5


def test_too_many_steps_in_a_row_that_are_not_finite_still_end_a_run() -> None:
    """The look behind the graph raises what the eager step raises."""
    data = batches_of((6,) * 8)
    for x, _ in data[3:]:
        x[0, 0] = float("nan")
    with pytest.raises(fl.errors.NonFiniteError, match="3 steps in a row were skipped"):
        trained("skip_nonfinite", fl.compile("trace"), data=data)


REFUSED: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "microbatch auto": (lambda: [fl.microbatch("auto")], "repeats a step that runs out of memory"),
    "reads the progress": (
        lambda: [fl.Combinator("peeks", lambda fn: lambda s, b, k: fn(s, b, k + s.progress.step), "grad", "grad")],
        "reads progress.step, which would be a constant in a graph",
    ),
    "counts": (
        lambda: [fl.Combinator("counts", counting, "grad", "grad", init=lambda store: {"n": 0})],
        "the memory of 'counts' changes 'n'",
    ),
}


def counting(fn: Any) -> Any:
    """A stage that counts in Python."""

    def counted(store: Any, batches: Any, key: int) -> Any:
        store.memory["counts"]["n"] += 1
        return fn(store, batches, key)

    return counted


@pytest.mark.parametrize("name", REFUSED)
def test_a_stage_that_is_none_for_a_graph_is_named(name: str) -> None:
    """One warning names it and says why, and the result is the eager one."""
    make, why = REFUSED[name]
    task, found = task_of(), list[Any]()
    for parts in ((), (fl.compile("trace"),)):
        step = fl.pipe(train_step, fl.grad(), *make(), fl.apply(), *parts, fl.stop_when(fl.max_steps(5)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", fl.errors.CompileWarning)
            found.append(dict(list(fl.run(step, fl.TrainState.create(task), batches_of((6, 6))))[-1][0].params))
        assert [why in str(w.message) for w in said] == ([True] if parts else [])
    assert_trees_equal(found[0], found[1])


def test_loss_scaling_goes_on_without_a_graph() -> None:
    """Whether a step counts must be known before the next one: the warning says so, and the result is the eager one."""
    config = fl.FitConfig(max_steps=3, precision="fp16", progress=False)
    one = fl.fit(fl.TrainState.create(task_of()), batches_of((6, 6)), config)
    with pytest.warns(
        fl.errors.CompileWarning, match="loss_scale must read after every step whether it was skipped, .* continuing without a graph"
    ):
        two = fl.fit(fl.TrainState.create(task_of()), batches_of((6, 6)), attrs.evolve(config, compile="trace"))
    assert_trees_equal(dict(one.params), dict(two.params))
