"""The process around a training: signals that end a run, where the wall time went, and host callbacks around a compiled step.

Read `signals` first.
"""

from fnlight.runtime.host_callbacks import HostCallbacks
from fnlight.runtime.signals import A_SIGNALS, Signals, exit_code, held_back, leave_to_parent, listening, worker_death
from fnlight.runtime.wall_time import WallTime

__all__ = [
    "HostCallbacks",
    "Signals",
    "WallTime",
]
