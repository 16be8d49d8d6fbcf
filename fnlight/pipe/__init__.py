"""Combinators, and the `pipe` that joins them: a step is built by wrapping a function into a function into a function.

Read `combinator` first, then `pipe`; `_seams` checks what may follow what; `mean` divides the gradients of one step by their summed weight.
"""

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
