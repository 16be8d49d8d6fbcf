"""Metrics as monoids: values that merge exactly over batches, micro-batches and ranks, and a `Tally` that merges them when they are read.

A mean of means is wrong if batches differ in size; ``Mean(total, weight)`` is not. A plain
scalar counts with the samples of its batch.
"""

from fnlight.metrics.counted import counted_where, uncounted
from fnlight.metrics.join import join_all, join_metrics, per_sample
from fnlight.metrics.media import MEDIA, Figure, Histogram, Image, Text
from fnlight.metrics.monoids import Cat, Last, Max, Mean, Min, Sum
from fnlight.metrics.own import own_metric
from fnlight.metrics.ranks import merged, own_part, read_all, read_in_order, with_parts
from fnlight.metrics.tally import SCALARS, Tally
from fnlight.metrics.torchmetric import is_torchmetric, parted, put_states, read_torchmetrics, states_of, updates
from fnlight.metrics.wide import wide

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
