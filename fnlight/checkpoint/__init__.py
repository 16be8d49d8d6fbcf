"""Checkpoints: a state in files that contain only data, written completely or not at all, and verified when they are read.

::

    runs/a/checkpoints/step-00000500/
      model.safetensors          parameters and persistent buffers under their own names
      optimizer.safetensors      slots as NAME/SLOT
      memory.safetensors         trees of the combinators, if any holds tensors
      state.json                 written last, the commit mark: progress, seed, history, groups, size and digest of every file

No pickle is read or written, and no name in a file is ever imported.
"""

from fnlight.checkpoint.background import Background
from fnlight.checkpoint.distributed_save import Parts, is_cut, parts_of, write_together
from fnlight.checkpoint.encode import decode, encode
from fnlight.checkpoint.folder import Folder, make, refuse_links
from fnlight.checkpoint.head import history_of
from fnlight.checkpoint.layout import physical
from fnlight.checkpoint.listing import FILES, MODEL
from fnlight.checkpoint.lock import held, hold, name_of
from fnlight.checkpoint.manifest import STATE, parse, printable
from fnlight.checkpoint.places import (
    at,
    best_checkpoint,
    checkpoints,
    is_run,
    newest,
    open_checkpoint,
    own_path,
    step_path,
    verify,
    writable,
)
from fnlight.checkpoint.read import ALLOWED, load, refill, restore
from fnlight.checkpoint.retention import Retention, best, delete, every, is_there, last, prune, staying, sweep
from fnlight.checkpoint.staging import Buffers
from fnlight.checkpoint.tensors import chunks
from fnlight.checkpoint.weights import LoadReport, load_weights
from fnlight.checkpoint.write import amend, check_savable, describe_state, save, write

__all__ = [
    "LoadReport",
    "Retention",
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
    "verify",
]
