"""Metrics as monoids: values that merge exactly over batches, micro-batches and ranks, and a tally that merges them late.

A mean of means is wrong when batches differ in size; ``Mean(total, weight)`` is not. A plain scalar counts as a mean of weight 1.
"""

from fnlight.metrics.media import MEDIA, Figure, Histogram, Image, Text
from fnlight.metrics.monoids import Cat, Last, Max, Mean, Min, Sum
from fnlight.metrics.tally import SCALARS, Tally

__all__ = ["MEDIA", "SCALARS", "Cat", "Figure", "Histogram", "Image", "Last", "Max", "Mean", "Min", "Sum", "Tally", "Text"]
