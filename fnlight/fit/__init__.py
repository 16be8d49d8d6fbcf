"""`fit`, the standard training loop composed of the other packages, and `FitConfig`, all of its options.

Read `fit` first, then `compose`, which builds the pipe for a configuration.
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
