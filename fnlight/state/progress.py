"""Progress: counts of completed work, and the key of the step that comes after it."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import attrs

from fnlight.tensors import SKIPPED, TRAIN, fold_in


@attrs.frozen
class Progress:
    """Counts of completed work.

    Args:
        step: Completed optimizer updates.
        epoch: Completed epochs.
        batch: Batches done in the epoch that is under way; 0 between epochs.
        samples: Samples seen.
        seconds: Time spent, in seconds; it does not count in comparisons.
        epoch_samples: Samples of the epoch that is under way that are done; 0 where an old checkpoint does not say.
        skipped: Groups of batches that were consumed without an update, such as those whose scaled gradients overflowed.
        updates: Where a task has several optimizers: the completed updates of each, by name.

    Example:
        >>> Progress(step=3).step
        3
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    seconds: float = attrs.field(default=0.0, eq=False)
    epoch_samples: int = 0
    skipped: int = 0
    updates: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def after(self, item: Any, made: int, skipped: int, updates: Mapping[str, int]) -> "Progress":
        """The progress once an `Item` is consumed by so many updates; those that were skipped count as no steps."""
        batch, seconds = (0 if item.last else item.batch), self.seconds + item.seconds
        known = self.epoch_samples or not self.batch  # an old checkpoint does not say
        done = self.epoch_samples + item.samples if known and not item.last else 0
        step, skipped, samples = self.step + made, self.skipped + skipped, self.samples + item.samples
        return Progress(step, item.epoch + item.last, batch, samples, seconds, done, skipped, updates)


def step_key(seed: int, progress: Progress) -> int:
    """The key of the step that comes after some progress, from which all of its random numbers come.

    Every part of fnlight that needs the key of a step takes it from here.

    Args:
        seed: The seed of the state.
        progress: What is completed before the step. Where steps were skipped, each attempt has a key of its own.

    Returns:
        An integer of 64 bits.

    Example:
        >>> step_key(0, Progress(step=3)) == step_key(0, Progress(step=3, epoch=1))
        True
        >>> step_key(0, Progress(step=3)) == step_key(0, Progress(step=3, skipped=1))
        False
    """
    key = fold_in(_training_key(seed), progress.step)
    return fold_in(key, SKIPPED + progress.skipped) if progress.skipped else key


@lru_cache(maxsize=16)
def _training_key(seed: int) -> int:
    """The same for all steps of a training; computing it each time would cost a microsecond per step."""
    return fold_in(seed, TRAIN)
