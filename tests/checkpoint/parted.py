"""Checkpoints in parts without any other process: the ranks are called one after the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fnlight import TrainState
from fnlight.checkpoint import Parts, at, describe_state, write_together
from fnlight.checkpoint.layout import Layout
from fnlight.checkpoint.tensors import describe

ROWS = Layout(((0, 3),), (0, 1, 2))
GRID = Layout(((0, 2), (1, 2)), (0, 2, 1, 3))


def save_in_parts(state: TrainState, path: Any, layout: Layout = ROWS) -> Path:
    """Save a state as the ranks of a layout would, each of which holds its part of every tensor that has as many dimensions."""
    body, tensors = describe_state(state)
    count = 1 + max(layout.files)
    ranks = [_parts(tensors, layout, rank) for rank in range(count)]
    write_together(at(path), body, ranks[0], First(at(path), ranks))
    return Path(path)


def _parts(tensors: Mapping[str, Mapping[str, Tensor]], layout: Layout, rank: int) -> Parts:
    found = Parts({}, [layout], {}, {})
    most = max(dim for dim, _ in layout.cuts)
    for file, named in tensors.items():
        cut = {name: 0 for name, t in named.items() if t.dim() > most}
        found.entries[file] = {"tensors": {name: describe(t) for name, t in named.items()}, "cut": cut}
        own, offsets = found.own.setdefault(file, {}), found.offsets.setdefault(file, {})
        for name, t in named.items():
            cells = list(layout.part(rank, t.shape)) if name in cut else [(0, (0,) * t.dim(), tuple(t.shape))] if rank == 0 else []
            for _, offset, shape in cells:
                own[name], offsets[name] = t[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))], offset
    return found


class First:
    """The first of the ranks, which calls the others when they have their turn."""

    rank = 0

    def __init__(self, folder: Any, parts: list[Parts]) -> None:
        self.folder, self.parts, self.told = folder, parts, {}

    def gather(self, tree: Any) -> list[Any]:
        """What all of them say."""
        if "path" in tree:
            self.told = tree
        if "files" not in tree:
            return [tree]
        others = [Other(rank, self.told) for rank in range(1, len(self.parts))]
        for other in others:
            write_together(self.folder, {}, self.parts[other.rank], other)
        return [tree, *(other.said for other in others)]


class Other:
    """One of the others, to whom the first has spoken."""

    def __init__(self, rank: int, told: Any) -> None:
        self.rank, self.told, self.said = rank, told, None

    def gather(self, tree: Any) -> list[Any]:
        """What it says, and what the first has said."""
        if tree is not None:
            self.said = tree
            self.told = {"error": None}
        return [self.told]
