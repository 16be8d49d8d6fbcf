"""Sinks for records: `JSONL` and `CSV` files, `TensorBoard` event files, the `Console`, and `fan_out` for several of them.

A sink is any function of a `Record`. The sinks here also have ``flush()`` and ``close()``. Nothing is opened before the first record.
The next record after ``close()`` opens the file again. A file sink then first drops what was written for that step and all later steps,
so a resumed run leaves no duplicates. A configuration file stores a sink as its ``repr``, such as ``JSONL('log.jsonl')``.
"""

from fnlight.sinks.console import Console
from fnlight.sinks.deliver import close_sinks, deliver
from fnlight.sinks.fan_out import FanOut, fan_out
from fnlight.sinks.jsonl import JSONL
from fnlight.sinks.table import CSV
from fnlight.sinks.tensorboard import TensorBoard

__all__ = [
    "CSV",
    "JSONL",
    "Console",
    "FanOut",
    "TensorBoard",
    "fan_out",
]
