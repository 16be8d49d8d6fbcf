"""Where records go: `JSONL` and `CSV` files, `TensorBoard` event files, the `Console`, and several of them at once.

A sink is any function of a `Record`; these have ``flush()`` and ``close()`` besides. Nothing is opened before the first record, and
the next record after ``close()`` opens again. A file sink then first drops what was written for the steps from that record on, so a
resumed run leaves no duplicates. The text of a sink, such as ``JSONL('log.jsonl')``, is what a configuration keeps of it.
"""

from fnlight.sinks.console import Console
from fnlight.sinks.deliver import deliver, let_go
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
