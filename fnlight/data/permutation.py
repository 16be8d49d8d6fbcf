"""A permutation of the samples of an epoch, any slice of which is computed directly."""

import math

import attrs
import torch
from torch import Tensor

_WHOLE = 2**20  # samples of which an order is drawn whole, in some milliseconds
_ROUNDS = 8


def permutation(key: int, count: int) -> "Tensor | Permutation":
    """Return a random order of samples, as a function of a key.

    Args:
        key: What `fold_in` gave.
        count: How many samples there are.

    Returns:
        What a slice of gives numbers of samples, shape [slice], int64, on the CPU: a tensor up to a million samples, a `Permutation` beyond.

    Example:
        >>> permutation(7, 5)[:].sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    return torch.randperm(count, generator=_generator(key)) if count <= _WHOLE else Permutation.of(key, count)


@attrs.frozen(eq=False, repr=False)
class Permutation:
    """A permutation that is computed slice by slice, so that starting at a late position takes neither time nor memory.

    A number is a row and a column of a table that is about square. Each round moves the row by a random number that depends on the column
    alone, or the column by one that depends on the row; either can be taken back, so no two numbers meet. One that comes out beyond the last
    sample goes through the rounds again.

    Args:
        count: How many samples there are.
        moves: For each round the random numbers: of rows, shape [columns], then of columns, shape [rows], and so on.

    Example:
        >>> order = Permutation.of(key=7, count=5)
        >>> order[:3].tolist() + order[3:].tolist() == order[:].tolist(), sorted(order[:].tolist())
        (True, [0, 1, 2, 3, 4])

    References:
        Black and Rogaway, "Ciphers with arbitrary finite domains" (2002): the generalized Feistel network, and the walk along a cycle.
    """

    count: int
    moves: tuple[Tensor, ...]

    @classmethod
    def of(cls, key: int, count: int) -> "Permutation":
        """The permutation of a key."""
        generator, rows = _generator(key), max(1, math.isqrt(count))
        columns = -(-count // rows)
        sizes = [(rows, columns), (columns, rows)] * (_ROUNDS // 2)
        return cls(count, tuple(torch.randint(most, (size,), generator=generator) for most, size in sizes))

    def __len__(self) -> int:
        """How many samples there are."""
        return self.count

    def __getitem__(self, part: slice) -> Tensor:
        """Numbers of samples, shape [slice], int64, on the CPU."""
        found = self._moved(torch.arange(*part.indices(self.count)))
        while (beyond := (found >= self.count).nonzero().squeeze(1)).numel():
            found[beyond] = self._moved(found[beyond])
        return found

    def _moved(self, numbers: Tensor) -> Tensor:
        columns, rows = len(self.moves[0]), len(self.moves[1])
        row, column = numbers // columns, numbers % columns
        for turn, move in enumerate(self.moves):
            if turn % 2:
                column = column.add_(move[row]).remainder_(columns)
            else:
                row = row.add_(move[column]).remainder_(rows)
        return row.mul_(columns).add_(column)


def _generator(key: int) -> torch.Generator:
    return torch.Generator().manual_seed(key >> 1)  # signed 64 bits
