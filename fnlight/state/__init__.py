"""The state: `Task` pairs a model with pure functions, and `TrainState` is the immutable value that holds everything a run needs to continue.

Read `state` first; stop rules, retentions and plateau schedules are computed from `history`.
"""

from fnlight.state.copy_model import copied
from fnlight.state.history import History, Record
from fnlight.state.progress import Progress, step_key
from fnlight.state.state import A_STATE, TrainState
from fnlight.state.store import RunScope, StepScratch, Store
from fnlight.state.task import Task, hooked

__all__ = [
    "History",
    "Progress",
    "Record",
    "RunScope",
    "StepScratch",
    "Store",
    "Task",
    "TrainState",
    "step_key",
]
