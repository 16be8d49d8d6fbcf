"""Metrics as monoids: values that merge exactly over batches, micro-batches and ranks, and a `Tally` that merges them when they are read.

A mean of means is wrong if batches differ in size; ``Mean(total, weight)`` is not. A plain scalar counts as a mean of weight 1.
"""

from fnlight.metrics.counted import counted_where, uncounted
from fnlight.metrics.join import join_metrics
from fnlight.metrics.media import MEDIA, Figure, Histogram, Image, Text
from fnlight.metrics.monoids import Cat, Last, Max, Mean, Min, Sum
from fnlight.metrics.ranks import merged, own_part, read_all, read_in_order, with_parts
from fnlight.metrics.tally import SCALARS, Tally

__all__ = [
    "Cat",
    "Figure",
    "Histogram",
    "Image",
    "Last",
    "Max",
    "Mean",
    "Min",
    "Sum",
    "Tally",
    "Text",
]
