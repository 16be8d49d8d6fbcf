"""What to do about a NaN or infinite loss: find it, skip the step, go back to a checkpoint, or keep a bundle that repeats the failed step.

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
