"""Progress: counts of completed work."""

from collections.abc import Mapping
from typing import Any

import attrs


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
