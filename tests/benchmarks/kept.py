"""What two parts of fnlight that repeat work of torch bring: each is measured with and without. A part that brings less than 2 % is to be deleted.

    python tests/benchmarks/kept.py              # every row
    python tests/benchmarks/kept.py fused        # some: fused, bias, onednn
    python tests/benchmarks/kept.py --blocks 20  # a quick look

`fused` is `fnlight/optim/fused.py`, `bias` and `onednn` are the two parts of `fnlight/compile/products.py`. Both sides of a row are the same
training in one process and one thread, with the part and with a patch that switches it off, and they take turns. The table gives medians of
a block, and the median of the ratios of neighbouring blocks. The measured time is the processor time of the process. On a processor
for which `prefers_onednn` is False, the row of oneDNN shows why: both sides are told to use it or not.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from fnlight.compile.products import prefers_onednn
from tests.benchmarks.compiled import GPT, characters, mlp, ours, pictures, timed
from tests.benchmarks.tables import header, write_section


def deep() -> nn.Module:
    """Fifty layers of ten units: 100 small tensors."""
    return nn.Sequential(*[nn.Linear(10, 10) for _ in range(50)])


def wide() -> nn.Module:
    """784-1024-1024-10: six tensors, 1.9 million parameters."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


@attrs.frozen
class Row:
    """A training, the level that it is compiled at, and what is patched on each side."""

    part: str
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    block: int
    level: str | None
    off: dict[str, Any]
    on: dict[str, Any] = attrs.field(factory=dict)


def _nothing(*args: Any) -> bool:
    """Stand in for a part that is switched off: it has done nothing."""
    return False


FUSED = {"fnlight.optim.kernels.fused_step": _nothing}
BIAS = {"fnlight.compile.lower.biases_apart": _nothing}
OFF, ON = ({"fnlight.compile.lower.prefers_onednn": lambda given=given: given} for given in (False, True))
ROWS = [
    Row("fused", "fused AdamW, MLP 32-64-10, batch 32", mlp, pictures((32,)), 200, None, FUSED),
    Row("fused", "fused AdamW, 100 tensors of 10 or 100, batch 32", deep, pictures((10,)), 50, None, FUSED),
    Row("fused", "fused AdamW, MLP 784-1024-1024-10, batch 32", wide, pictures((784,)), 10, None, FUSED),
    Row("bias", '`compile("step")`, MLP 32-64-10, batch 32: biases of small products', mlp, pictures((32,)), 1000, "step", BIAS),
    Row("onednn", '`compile("step")`, GPT 4 layers, 128 wide: large products by oneDNN', GPT, characters, 2, "step", OFF, ON),
]


def table(blocks: int, rows: list[Row]) -> Iterator[str]:
    """One line a row, as soon as it is measured."""
    yield "| | without, us a step | with, us a step | ratio |\n|---|---|---|---|"
    for row in rows:
        data = [row.batch() for _ in range(192 if row.block >= 50 else 16)]
        sides = {True: ours(row, data, row.level), False: ours(row, data, row.level)}
        patches = {True: row.on, False: row.off}
        found: dict[bool, list[float]] = {True: [], False: []}
        for i in range(-1, blocks):
            for on in (True, False) if i % 2 else (False, True):
                with ExitStack() as stack:
                    for where, what in patches[on].items():
                        stack.enter_context(mock.patch(where, what))
                    took = timed(sides[on], row.block)
                if i >= 0:  # the first block compiles
                    found[on].append(took)
        ratio = statistics.median(on / off for on, off in zip(found[True], found[False], strict=True))
        yield f"| {row.name} | {statistics.median(found[False]):,.1f} | {statistics.median(found[True]):,.1f} | {ratio:.3f} |"


def main() -> None:
    """Print the table."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("parts", nargs="*", choices=[*{row.part for row in ROWS}, []], help="rows; all if left out")
    args.add_argument("--blocks", type=int, default=60, help="blocks that each side of a row takes")
    args.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    given = args.parse_args()
    torch.set_num_threads(1)
    chosen = [row for row in ROWS if row.part in (given.parts or {row.part})]
    lines = [
        f"{header()}; `python tests/benchmarks/kept.py`, {given.blocks} blocks a side, taken in turns; prefers_onednn() is {prefers_onednn()}.\n"
    ]
    print(lines[0], flush=True)
    for line in table(given.blocks, chosen):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        write_section("kept", "\n".join(lines))


if __name__ == "__main__":
    main()
