"""Handling of NaN and infinite losses: raise an error, skip the step, roll back to a checkpoint, or write a bundle that repeats the failed step.

Read `check_finite` first.
"""

from fnlight.nonfinite.bundle import EVERY, Bundle, debug_bundle, load_bundle
from fnlight.nonfinite.check_finite import check_finite
from fnlight.nonfinite.rollback import rollback
from fnlight.nonfinite.skip import skip_nonfinite, skip_spikes

__all__ = [
    "Bundle",
    "check_finite",
    "debug_bundle",
    "load_bundle",
    "rollback",
    "skip_nonfinite",
    "skip_spikes",
]
