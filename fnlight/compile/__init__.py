"""A step whose whole kernel is one graph: traced, and compiled by torch's compiler.

`compile` is the combinator; `fnlight.compile.trace` makes the graph, `fnlight.compile.lower` machine code of it.
"""

from fnlight.compile.combinator import compile  # noqa: A004  # what everybody in this field calls it

__all__ = [
    "compile",
]
