"""Every combinator, in the order of a full pipe; one more entry in `ENTRIES` joins all laws, and a test sees that none is missing.

By default the laws go over `PAIRS`, a part of all pairs of a task and a combinator; ``FNLIGHT_LAWS=all pytest tests/laws`` goes over all of them.
Why the others give nothing new: the pipe "all of them" is tried on every task, so every combinator that it holds meets every task there. Alone
it is tried to find a mistake in the smallest pipe, and for that one task is enough. A combinator sees no layers, only parameters, buffers,
losses and keys; it can behave in another way only where the task has a trait that it works on. These pairs are written down in `INTERACTING`.
What is not in the full pipe because it makes the step in another way, `ALONE`, is tried on every task that has a trait of its own.
The other entries outside the full pipe are the same combinators with other arguments.
Each combinator also has one task by its place in the list, so a new one joins without being written down twice.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from fnlight import (
    Combinator,
    Mean,
    Pipe,
    Task,
    accumulate,
    apply,
    apply_in_backward,
    autocast,
    carry,
    cast,
    check_finite,
    checkpoint_every,
    clip_adaptive,
    clip_each,
    clip_norm,
    clip_quantile,
    clip_value,
    collect_garbage,
    compile,  # noqa: A004  # what everybody in this field calls it
    debug_bundle,
    ema,
    ema_warmup,
    epoch_means,
    epochs,
    evaluate_every,
    freeze,
    grad,
    grad_cache,
    grad_noise,
    last,
    log_to,
    loss_scale,
    manual,
    max_epochs,
    microbatch,
    pipe,
    profile,
    recompute,
    rollback,
    skip_nonfinite,
    skip_spikes,
    steps,
    stop_when,
    swa,
    unfreeze_at,
    weighted,
)
from fnlight.parallel import diloco, exact_ranks
from fnlight.state import Store
from fnlight.testing import RecordingSink
from tests.laws.tasks import TASKS, Case


@attrs.frozen
class Entry:
    """A combinator with the arguments that the laws try it with.

    Args:
        fn: The function that gives it.
        build: Maps a directory and batches to evaluate on to the combinator.
        needs: Other entries that it cannot do without.
        instead: Entries whose place it takes.
        base: Maps the `train_step` of a task to what it takes in its place.
    """

    fn: Callable[..., Combinator]
    build: Callable[[Path, Any], Combinator]
    needs: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    base: Callable[[Any], Any] = lambda train_step: train_step


def parted(out: Any) -> Any:
    """Loss and metrics."""
    return out if isinstance(out, tuple) and not isinstance(out, Mean) else (out, {})


def named(train_step: Any) -> Any:
    """The same loss under a name."""

    def step(model: Any, batch: Any) -> Any:
        loss, metrics = parted(train_step(model, batch))
        return {"main": loss}, metrics

    return step


def embedded(train_step: Any) -> Any:
    """The loss as the embedding of a single sample."""

    def embed(model: Any, batch: Any) -> Any:
        loss = parted(train_step(model, batch))[0]
        return (loss.total if isinstance(loss, Mean) else loss)[None]

    return embed


def decaying(train_step: Any) -> Any:
    """The same loss, more or less of it, as a carried number says."""

    def step(model: Any, batch: Any) -> Any:
        batch, seen = batch
        loss, metrics = parted(train_step(model, batch))
        total = loss.total if isinstance(loss, Mean) else loss
        return total * (1 + seen.sigmoid()), {**metrics, "seen": seen.clone()}, 0.5 * seen + total

    return step


ENTRIES = {
    "recompute": Entry(recompute, lambda folder, val: recompute("*")),
    "autocast": Entry(autocast, lambda folder, val: autocast(torch.bfloat16)),
    "autocast fp16": Entry(autocast, lambda folder, val: autocast(torch.float16), needs=("loss_scale",)),
    "cast": Entry(cast, lambda folder, val: cast(torch.float64)),
    "grad": Entry(grad, lambda folder, val: grad()),
    "weighted": Entry(weighted, lambda folder, val: weighted({"main": lambda step: 1 / (1 + step)}), base=named),
    "carry": Entry(carry, lambda folder, val: carry(lambda model, batch: torch.zeros((), device=batch[0].device)), base=decaying),
    "grad_cache": Entry(
        grad_cache, lambda folder, val: grad_cache(lambda found: found.square().mean(), 2), instead=("grad",), base=embedded
    ),
    "accumulate": Entry(accumulate, lambda folder, val: accumulate(2)),
    "accumulate by epoch": Entry(accumulate, lambda folder, val: accumulate({0: 1, 1: 2})),
    "exact_ranks": Entry(exact_ranks, lambda folder, val: exact_ranks(2, parts=2)),
    "microbatch": Entry(microbatch, lambda folder, val: microbatch(4)),
    "microbatch auto": Entry(microbatch, lambda folder, val: microbatch("auto")),
    "loss_scale": Entry(loss_scale, lambda folder, val: loss_scale(init=64.0, interval=2), needs=("autocast fp16",)),
    "skip_nonfinite": Entry(skip_nonfinite, lambda folder, val: skip_nonfinite(max_consecutive=2)),
    "skip_spikes": Entry(skip_spikes, lambda folder, val: skip_spikes(sigma=0.5, window=2, max_consecutive=None)),
    "clip_adaptive": Entry(clip_adaptive, lambda folder, val: clip_adaptive(0.1)),
    "clip_each": Entry(clip_each, lambda folder, val: clip_each(0.1)),
    "clip_quantile": Entry(clip_quantile, lambda folder, val: clip_quantile(0.3, window=3)),
    "grad_noise": Entry(grad_noise, lambda folder, val: grad_noise(0.01)),
    "clip_value": Entry(clip_value, lambda folder, val: clip_value(0.01)),
    "clip_norm": Entry(clip_norm, lambda folder, val: clip_norm(0.1)),
    "apply": Entry(apply, lambda folder, val: apply()),
    "apply_in_backward": Entry(apply_in_backward, lambda folder, val: apply_in_backward(), instead=("apply",)),
    "freeze": Entry(freeze, lambda folder, val: freeze("*a*", eval_mode=True)),
    "unfreeze_at": Entry(unfreeze_at, lambda folder, val: unfreeze_at({"*t": 1}, eval_mode=True)),
    "manual": Entry(manual, lambda folder, val: manual(lambda store: {"factor": torch.ones((), device=store.device)})),
    "ema": Entry(ema, lambda folder, val: ema(0.9)),
    "ema with warm-up, now and then": Entry(ema, lambda folder, val: ema(ema_warmup(0.9), "slow", every=steps(2))),
    "swa": Entry(swa, lambda folder, val: swa(start=1, every=steps(1))),
    "diloco": Entry(diloco, lambda folder, val: diloco(steps(2))),
    "compile": Entry(compile, lambda folder, val: compile("trace")),
    "check_finite": Entry(check_finite, lambda folder, val: check_finite(every=steps(2))),
    "rollback": Entry(rollback, lambda folder, val: rollback(folder / "run", every=steps(1)), needs=("checkpoint_every",)),
    "debug_bundle": Entry(debug_bundle, lambda folder, val: debug_bundle(folder / "run", every=steps(2))),
    "evaluate_every": Entry(evaluate_every, lambda folder, val: evaluate_every(val, every=steps(2) | epochs(1))),
    "epoch_means": Entry(epoch_means, lambda folder, val: epoch_means()),
    "log_to": Entry(log_to, lambda folder, val: log_to(RecordingSink(), every=steps(2))),
    "checkpoint_every in the foreground": Entry(
        checkpoint_every,
        lambda folder, val: checkpoint_every(folder / "other", every=steps(2), keep=last(9), background=False, name="foreground"),
    ),
    "checkpoint_every": Entry(checkpoint_every, lambda folder, val: checkpoint_every(folder / "run", every=steps(3), keep=last(2))),
    "collect_garbage": Entry(collect_garbage, lambda folder, val: collect_garbage(every=steps(2))),
    "profile": Entry(profile, lambda folder, val: profile(folder / "traces", range(2, 4))),
    "stop_when": Entry(stop_when, lambda folder, val: stop_when(max_epochs(100))),
}
EVERYTHING = "all of them"
CHOICES = [*ENTRIES, EVERYTHING]
OTHERS = (
    "apply_in_backward",
    "carry",
    "grad_cache",
    "cast",
    "autocast fp16",
    "loss_scale",
    "accumulate",
    "exact_ranks",
    "microbatch auto",
    "manual",
    "diloco",
    "compile",
    "rollback",
    "profile",
)
"""Not in the full pipe: other arguments of a combinator that it holds already, what contradicts one, what makes a step in
another way, what takes long, and what only one run of a process can have at a time."""


def _fits(choice: str, case: Case) -> bool:
    """A whole step takes what stands behind a step only. Two optimizers do not step in backward, and their task draws noise in fp32; that of a whole step decides by tensors."""
    if (
        (case.kind == "phases" and choice == "cast")
        or (case.kind != "loss" and choice == "apply_in_backward")
        or (case.kind == "whole" and choice == "compile")
    ):
        return False
    return case.kind != "whole" or choice in (EVERYTHING, "manual") or ENTRIES[choice].build(Path(), None).takes == "step"


PRODUCT = [(name, choice) for name, case in TASKS.items() for choice in CHOICES if _fits(choice, case)]
"""Every task with every combinator that it can have."""

ALONE = ("apply_in_backward", "carry", "grad_cache", "cast", "loss_scale", "exact_ranks", "manual", "diloco", "compile")
"""What makes or changes a step and is not in the full pipe: tried alone on every task that differs in a trait."""

SAME = ("convnet", "recurrent net")
"""Tasks of other layers, whose traits are those of the net with BatchNorm and of the one with tied weights or less."""

INTERACTING = {
    "tied weights": ("recompute", "freeze", "unfreeze_at", "ema", "swa", "clip_each"),
    "frozen parts": ("freeze", "unfreeze_at", "ema", "swa", "clip_norm", "grad_noise", "skip_nonfinite"),
    "buffers only": ("accumulate", "clip_norm", "skip_nonfinite", "ema", "swa", "checkpoint_every"),
    "mlp with BatchNorm and dropout": ("recompute", "autocast", "microbatch", "accumulate", "skip_nonfinite", "skip_spikes", "rollback"),
    "transformer": ("recompute", "autocast", "microbatch", "accumulate by epoch"),
    "two optimizers": (
        *("accumulate", "accumulate by epoch", "weighted", "microbatch", "clip_norm", "clip_quantile", "skip_nonfinite"),
        *("freeze", "unfreeze_at", "ema", "evaluate_every", "log_to", "debug_bundle"),
    ),
}  # fmt: skip
"""Pairs where a trait of the task is what the combinator works on: shared or frozen parameters, buffers, draws, several optimizers."""


def _covering() -> list[tuple[str, str]]:
    """Pairs that hold every task, every combinator, and what is known to interact, in the order of the product."""
    chosen = {(name, choice) for name, choices in INTERACTING.items() for choice in choices}
    chosen |= {(name, choice) for name in TASKS for choice in ALONE if name not in SAME} | {(name, EVERYTHING) for name in TASKS}
    for i, choice in enumerate(CHOICES):
        fitting = [name for name, other in PRODUCT if other == choice]
        chosen.add((fitting[i % len(fitting)], choice))
    return [pair for pair in PRODUCT if pair in chosen]


PAIRS = PRODUCT if os.environ.get("FNLIGHT_LAWS") == "all" else _covering()
"""What the laws go over: about a third of the product, or all of it."""


@torch.no_grad()
def shrink(store: Store, batches: Any, key: int) -> dict[str, torch.Tensor]:
    """A step by hand for any task: weights shrink by factors that are drawn, and what they have shrunk by is remembered."""
    factor = 1 - 0.1 * torch.rand((), device=store.device)
    for p in store.module.parameters():
        p.mul_(factor)
    store.memory["manual"]["factor"] *= factor
    return {"loss": store.memory["manual"]["factor"].clone()}


def num_steps(choice: str, case: Case) -> int:
    """Steps that two epochs of three batches have."""
    return (
        6
        if case.kind == "whole"
        else {"accumulate": 4, "exact_ranks": 4, "grad_cache": 4, "accumulate by epoch": 5, EVERYTHING: 5}.get(choice, 6)
    )


def pipe_with(choice: str, task: Task, folder: Path, val: Any, without: str = "nothing") -> Pipe:
    """The shortest step that holds a combinator; or one that holds each of them once, without those of one phase of a tick."""
    if choice == "manual":
        return pipe(shrink, ENTRIES["manual"].build(folder, val))
    chosen = [name for name in ENTRIES if name not in OTHERS] if choice == EVERYTHING else ["grad", "apply", choice, *ENTRIES[choice].needs]
    chosen = [name for name in chosen if not any(name in ENTRIES[other].instead for other in chosen)]
    train_step: Any = task.train_step
    for base in (ENTRIES[name].base for name in chosen if not isinstance(task.train_step, Pipe)):
        train_step = {name: base(fn) for name, fn in train_step.items()} if isinstance(train_step, Mapping) else base(train_step)
    built = [entry.build(folder, val) for name, entry in ENTRIES.items() if name in chosen]
    parts = [part for part in built if part.phase != without]
    return pipe(train_step, *(part for part in parts if part.takes == "step" or not isinstance(task.train_step, Pipe)))
