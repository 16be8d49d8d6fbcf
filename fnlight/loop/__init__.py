"""The loop: `run`, `evaluate` and `predict`, and the combinators that act on a trigger, such as `evaluate_every` and `checkpoint_every`.

Read `run` first: its module docstring has the order of a tick.
"""

from fnlight.loop.epoch_means import epoch_means
from fnlight.loop.evaluate import average_of, evaluate, inference, named_tensors
from fnlight.loop.evaluate_every import evaluate_every
from fnlight.loop.garbage import collect_garbage
from fnlight.loop.log_to import log_to
from fnlight.loop.predict import collect, predict
from fnlight.loop.profile import profile
from fnlight.loop.run import run
from fnlight.loop.saving import Saver, checkpoint_every
from fnlight.loop.stop_when import stop_when

__all__ = [
    "checkpoint_every",
    "collect",
    "collect_garbage",
    "epoch_means",
    "evaluate",
    "evaluate_every",
    "log_to",
    "predict",
    "profile",
    "run",
    "stop_when",
]
