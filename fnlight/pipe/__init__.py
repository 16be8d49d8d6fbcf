"""Combinators, and the `pipe` that joins them: each combinator wraps a function, and the outermost function is the step.

Read `combinator` first, then `pipe`; `_seams` checks the order of combinators; `mean` divides the gradients of one step by their summed weight.
"""

from fnlight.pipe._seams import check_monitors
from fnlight.pipe.combinator import Combinator
from fnlight.pipe.mean import Around, batches_at, loss_of_all, mean_of_group
from fnlight.pipe.pipe import Phase, Pipe, Turn, pipe

__all__ = [
    "Combinator",
    "Phase",
    "Pipe",
    "mean_of_group",
    "pipe",
]
