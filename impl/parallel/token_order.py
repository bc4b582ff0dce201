"""How context parallelism cuts a sequence: which tokens are a rank's, and how to join them again.

Eight tokens over two ranks, as the rank has them; `strided` cuts what the caller has already put in
strided order, `chunked` cuts each chunk of four:

    contiguous   0 1 2 3 | 4 5 6 7
    strided      0 2 4 6 | 1 3 5 7
    chunked      0 1 4 5 | 2 3 6 7

Source: neuronx-distributed-inference, context parallelism of `attention_base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.errors import ShapeError, explain


@dataclass(frozen=True, slots=True)
class Run:
    """Some of a rank's tokens, evenly spaced in the sequence.

    Attributes:
        start: the first of them among the rank's tokens.
        length: how many.
        offset: place of the first in the sequence.
        stride: tokens of the sequence from one to the next.
    """

    start: int
    length: int
    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """The cut of a sequence over ranks.

    Attributes:
        ranks: ranks that share a sequence.
        strided: the caller's sequence is in strided order: all tokens `t` with `t % ranks == 0`,
            then those with 1, and so on.
        chunk: cut each chunk of this many tokens, and what is left at the end; None cuts the whole.
    """

    ranks: int
    strided: bool = False
    chunk: int | None = None

    def split(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """Tokens of one rank.

        Args:
            x: any tensor with the sequence along `dim`, as the caller has it.
            dim: the axis.
            rank: whose tokens.

        Returns:
            Like `x`, `1 / ranks` as long.

        Raises:
            ShapeError: the sequence, or what is left of its last chunk, is not a multiple.
        """
        self.check(x.shape[dim])
        if self.ranks == 1:
            return x
        whole = self._in_whole_chunks(x.shape[dim])
        if not whole:
            return _piece(x, dim, self.ranks, rank)
        assert self.chunk is not None
        parts = _cut(x.narrow(dim, 0, whole), dim, (-1, self.chunk))
        mine = _piece(parts, dim + 1, self.ranks, rank).flatten(dim, dim + 1)
        rest = x.narrow(dim, whole, x.shape[dim] - whole)
        return torch.cat((mine, _piece(rest, dim, self.ranks, rank)), dim)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """Undo `split`, given the tokens of all ranks one after another along `dim`."""
        if self.ranks == 1 or self.chunk is None:
            return x
        whole = self._in_whole_chunks(x.shape[dim])
        if not whole:
            return x
        pieces = _cut(x, dim, (self.ranks, -1))
        cut = whole // self.ranks
        chunks = _cut(pieces.narrow(dim + 1, 0, cut), dim + 1, (-1, self.chunk // self.ranks))
        rest = pieces.narrow(dim + 1, cut, pieces.shape[dim + 1] - cut).flatten(dim, dim + 1)
        return torch.cat((chunks.transpose(dim, dim + 1).flatten(dim, dim + 2), rest), dim)

    def natural(self, x: Tensor, dim: int) -> Tensor:
        """Put a whole sequence as the caller has it into the order of positions."""
        if self.ranks == 1 or not self.strided:
            return x
        return _cut(x, dim, (self.ranks, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    def runs(self, seq_len: int, rank: int) -> tuple[Run, ...]:
        """A rank's tokens as runs that are evenly spaced in the sequence.

        Args:
            seq_len: tokens of the whole sequence.
            rank: whose tokens.
        """
        own = seq_len // self.ranks
        if self.strided:
            return (Run(0, own, rank, self.ranks),)
        whole = self._in_whole_chunks(seq_len) if self.ranks > 1 else 0
        if not whole:
            return (Run(0, own, rank * own, 1),)
        assert self.chunk is not None
        cut = self.chunk // self.ranks
        firsts = range(0, whole, self.chunk)
        runs = [Run(i * cut, cut, first + rank * cut, 1) for i, first in enumerate(firsts)]
        rest = (seq_len - whole) // self.ranks
        if rest:
            runs.append(Run(len(runs) * cut, rest, whole + rank * rest, 1))
        return tuple(runs)

    def _in_whole_chunks(self, seq_len: int) -> int:
        return 0 if self.chunk is None else seq_len // self.chunk * self.chunk

    def check(self, seq_len: int) -> None:
        """Refuse a length that does not split evenly.

        Raises:
            ShapeError: see `split`.
        """
        rest = seq_len - self._in_whole_chunks(seq_len)
        if rest % self.ranks or (self.chunk is not None and self.chunk % self.ranks):
            raise ShapeError(
                explain(
                    "seq_len",
                    f"split evenly over {self.ranks} context-parallel ranks"
                    + ("" if self.chunk is None else f" in chunks of {self.chunk}"),
                    seq_len,
                    "pad the prompt",
                )
            )


def strided(x: Tensor, dim: int, ranks: int) -> Tensor:
    """Put a sequence in natural order into strided order: with 2 ranks `0 2 4 6 1 3 5 7`.

    Args:
        x: any tensor with the sequence along `dim`.
        dim: the axis.
        ranks: context-parallel degree, which divides the length.
    """
    return _cut(x, dim, (-1, ranks)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _cut(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """Cut one axis in two."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _piece(x: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    length = x.shape[dim] // ranks
    return x.narrow(dim, rank * length, length)
