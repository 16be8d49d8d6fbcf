"""Progress: counts of completed work, and the random key of the next step."""

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
        batch: Completed batches of the current epoch; 0 between epochs.
        samples: Samples seen.
        seconds: Training time in seconds; ignored in comparisons.
        epoch_samples: Completed samples of the current epoch; 0 if an old checkpoint does not contain it.
        skipped: Steps that consumed batches without an update, such as those whose scaled gradients overflowed.
        updates: With several optimizers: the completed updates of each, by name.

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
        """The progress after an `Item` is consumed by `made` updates; skipped updates do not count as steps."""
        batch, seconds = (0 if item.last else item.batch), self.seconds + item.seconds
        known = self.epoch_samples or not self.batch  # missing in an old checkpoint
        done = self.epoch_samples + item.samples if known and not item.last else 0
        step, skipped, samples = self.step + made, self.skipped + skipped, self.samples + item.samples
        return Progress(step, item.epoch + item.last, batch, samples, seconds, done, skipped, updates)


def step_key(seed: int, progress: Progress) -> int:
    """The random key of the next step; all random numbers of the step come from it.

    Every part of fnlight that needs the key of a step calls this function.

    Args:
        seed: The seed of the state.
        progress: What is completed before the step. After a skipped step, the next attempt has a different key.

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
    """The same for all steps of a training; computing it for each step would cost a microsecond."""
    return fold_in(seed, TRAIN)
