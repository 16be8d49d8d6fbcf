"""Every combinator, in the order of a full pipe; one more entry in `ENTRIES` joins all laws, and a test sees that none is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from fnlight import (
    Combinator,
    Pipe,
    Task,
    accumulate,
    apply,
    autocast,
    check_finite,
    checkpoint_every,
    clip_norm,
    clip_value,
    ema,
    epoch_means,
    epochs,
    evaluate_every,
    grad,
    last,
    log_to,
    max_epochs,
    microbatch,
    pipe,
    steps,
    stop_when,
)
from fnlight.testing import RecordingSink


@attrs.frozen
class Entry:
    """A combinator with the arguments that the laws try it with.

    Args:
        fn: The function that gives it.
        build: Maps a directory and batches to evaluate on to the combinator.
    """

    fn: Callable[..., Combinator]
    build: Callable[[Path, Any], Combinator]


ENTRIES = {
    "autocast": Entry(autocast, lambda folder, val: autocast(torch.bfloat16)),
    "grad": Entry(grad, lambda folder, val: grad()),
    "accumulate": Entry(accumulate, lambda folder, val: accumulate(2)),
    "accumulate by epoch": Entry(accumulate, lambda folder, val: accumulate({0: 1, 1: 2})),
    "microbatch": Entry(microbatch, lambda folder, val: microbatch(4)),
    "microbatch auto": Entry(microbatch, lambda folder, val: microbatch("auto")),
    "clip_value": Entry(clip_value, lambda folder, val: clip_value(0.01)),
    "clip_norm": Entry(clip_norm, lambda folder, val: clip_norm(0.1)),
    "apply": Entry(apply, lambda folder, val: apply()),
    "ema": Entry(ema, lambda folder, val: ema(0.9)),
    "check_finite": Entry(check_finite, lambda folder, val: check_finite(every=steps(2))),
    "evaluate_every": Entry(evaluate_every, lambda folder, val: evaluate_every(val, every=steps(2) | epochs(1))),
    "epoch_means": Entry(epoch_means, lambda folder, val: epoch_means()),
    "log_to": Entry(log_to, lambda folder, val: log_to(RecordingSink(), every=steps(2))),
    "checkpoint_every": Entry(checkpoint_every, lambda folder, val: checkpoint_every(folder / "run", every=steps(3), keep=last(2))),
    "stop_when": Entry(stop_when, lambda folder, val: stop_when(max_epochs(100))),
}
EVERYTHING = "all of them"
CHOICES = [*ENTRIES, EVERYTHING]
OTHERS = ("accumulate", "microbatch auto")
"""Other arguments of a combinator that the full pipe holds already."""


def pipe_with(choice: str, task: Task, folder: Path, val: Any) -> Pipe:
    """The shortest step that holds a combinator; or one that holds each of them once."""
    chosen = [name for name in ENTRIES if name not in OTHERS] if choice == EVERYTHING else ["grad", "apply", choice]
    return pipe(task.train_step, *(entry.build(folder, val) for name, entry in ENTRIES.items() if name in chosen))
