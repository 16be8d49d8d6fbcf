"""`fit`, the standard composition of all other parts, and `FitConfig`, everything that it can be told.

Read `fit` first, then `compose`: the pipe that a configuration asks for, in its order.
"""

from fnlight.fit.compose import compose, settings, total_steps
from fnlight.fit.config import FitConfig
from fnlight.fit.fit import fit
from fnlight.fit.main import main
from fnlight.fit.parse import parse

__all__ = [
    "FitConfig",
    "compose",
    "fit",
    "main",
    "total_steps",
]
