"""Checkpoints: a state as files that are only data, written whole or not at all, checked on reading.

::

    runs/a/checkpoints/step-00000500/
      model.safetensors          parameters and persistent buffers under their own names
      optimizer.safetensors      slots as NAME/SLOT
      memory.safetensors         trees of the combinators, if any holds tensors
      state.json                 written last, the commit mark: progress, seed, history, groups, size and digest of every file

No pickle is read or written, and no name in a file is ever imported.
"""

from fnlight.checkpoint.places import best_checkpoint, checkpoints, newest, step_path, verify, writable
from fnlight.checkpoint.read import ALLOWED, load, restore
from fnlight.checkpoint.retention import Retention, best, every, last, prune
from fnlight.checkpoint.weights import LoadReport, load_weights
from fnlight.checkpoint.write import amend, save

__all__ = [
    "ALLOWED",
    "LoadReport",
    "Retention",
    "amend",
    "best",
    "best_checkpoint",
    "checkpoints",
    "every",
    "last",
    "load",
    "load_weights",
    "newest",
    "prune",
    "restore",
    "save",
    "step_path",
    "verify",
    "writable",
]
