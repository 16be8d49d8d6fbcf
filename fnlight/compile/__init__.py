"""Compiled steps: the whole update is traced into one graph, which torch's compiler compiles.

`compile` is the combinator; `fnlight.compile.trace` makes the graph, `fnlight.compile.lower` compiles it to machine code. Read `combinator` first.
"""

from fnlight.compile.combinator import compile  # noqa: A004  # what everybody in this field calls it

__all__ = [
    "compile",
]
