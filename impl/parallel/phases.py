"""What a rank does with tokens, keys and sums before, inside and after attention, by phase.

Prefill: every rank is given the whole sequence, or its piece under sequence parallelism, and
attends with its share of the queries to all keys. Decode: every rank is given the whole batch and
attends with its share of the rows. Either way the output is laid out as the input was, so layers
and phases can follow each other. On one rank nothing here changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.parallel.collectives import all_gather, all_reduce, reduce_scatter
from impl.parallel.groups import Stage
from impl.parallel.token_order import Run, TokenOrder, strided

_SEQUENCE = 1


@dataclass(frozen=True, slots=True)
class PrefillPhase:
    """Context encoding (CTE) on one rank.

    Attributes:
        stage: groups; `split` shares the sequence.
        order: how the sequence is cut.
        sequence_parallel: each rank is given, and returns, its piece of the sequence.
        stays_split_before: the hidden states come already cut as `order` says.
        stays_split_after: they are left so.
    """

    stage: Stage
    order: TokenOrder
    sequence_parallel: bool = False
    stays_split_before: bool = False
    stays_split_after: bool = False

    @property
    def _pieces_are_tokens(self) -> bool:
        """Whether the pieces of sequence parallelism together are this rank's tokens."""
        return self.order.ranks == 1 or self.order.chunk is None

    def sequence_length(self, hidden_states: Tensor) -> int:
        """Tokens of the whole sequence, given what this rank was given of it."""
        length = hidden_states.shape[_SEQUENCE]
        if self.sequence_parallel:
            return length * self.stage.tp.size * self.stage.split.size
        return length * self.stage.split.size if self.stays_split_before else length

    @property
    def ends_a_row(self) -> bool:
        """Whether this layer ends a row of layers that hand their tokens on."""
        return self.stays_split_before and not self.stays_split_after

    def enter(self, hidden_states: Tensor) -> Tensor:
        """This rank's tokens, `(batch, tokens, hidden_size)`.

        Raises:
            ShapeError: the sequence does not split evenly.
        """
        stage = self.stage
        self.order.check(self.sequence_length(hidden_states))
        if self.stays_split_before:
            return hidden_states
        if self.sequence_parallel:
            hidden_states = all_gather(hidden_states, _SEQUENCE, stage.tp)
            if self._pieces_are_tokens:
                return hidden_states
            hidden_states = all_gather(hidden_states, _SEQUENCE, stage.split)
        return self.tokens(hidden_states, _SEQUENCE)

    def tokens(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor with the whole sequence along `dim`."""
        return self.order.split(x, dim, self.stage.split.rank)

    def natural(self, x: Tensor, dim: int) -> Tensor:
        """A tensor with the whole sequence along `dim`, as the caller has it, in natural order."""
        return self.order.natural(x, dim)

    def runs(self, seq_len: int) -> tuple[Run, ...]:
        """This rank's tokens as evenly spaced runs; see `TokenOrder.runs`."""
        return self.order.runs(seq_len, self.stage.split.rank)

    def mask(self, given: Tensor | None, run: Run) -> Tensor | None:
        """What a run of queries needs of a mask, its keys in natural order.

        Args:
            given: `(batch, seq_len)`, of keys, or `(batch or 1, 1, seq_len or 1, seq_len)`, as the
                caller has it; None for none.
            run: the queries.
        """
        if given is None or given.dim() != 4:
            return None if given is None else self.natural(given, 1)
        if given.shape[2] == 1:
            rows = given.expand(-1, -1, run.length, -1)
        else:
            rows = self.tokens(given, 2).narrow(2, run.start, run.length)
        return self.natural(rows, 3)

    def first_positions(self, hidden_states: Tensor) -> Tensor:
        """Positions `0, 1, ...` of a prompt, `(batch, seq_len)`, in the caller's order."""
        steps = torch.arange(self.sequence_length(hidden_states), device=hidden_states.device)
        return self.given(steps, 0).expand(hidden_states.shape[0], -1)

    def given(self, x: Tensor, dim: int) -> Tensor:
        """A tensor with the whole sequence along `dim` in natural order, as the caller has it."""
        return strided(x, dim, self.order.ranks) if self.order.strided else x

    def gather_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, in natural order.

        Args:
            k: `(batch, kv_heads, tokens, head_dim)`, of this rank's tokens.
            v: like `k`.
        """
        split = self.stage.split
        if split.size == 1:
            return k, v
        both = self.order.join(all_gather(torch.cat((k, v), dim=1), 2, split), 2)
        k, v = self.order.natural(both, 2).chunk(2, dim=1)
        return k, v

    def reduce(self, product: Tensor) -> Tensor:
        """Add the ranks' products with the output projection, `(batch, tokens, hidden_size)`."""
        if self.sequence_parallel and self._pieces_are_tokens:
            return reduce_scatter(product, _SEQUENCE, self.stage.tp)
        return all_reduce(product, self.stage.tp)

    def leave(self, output: Tensor) -> Tensor:
        """What this rank returns of its tokens' output, `(batch, sequence, hidden_size)`."""
        stage = self.stage
        if self.stays_split_after or (self.sequence_parallel and self._pieces_are_tokens):
            return output
        whole = self.order.join(all_gather(output, _SEQUENCE, stage.split), _SEQUENCE)
        if not self.sequence_parallel:
            return whole
        length = whole.shape[_SEQUENCE] // (stage.tp.size * stage.split.size)
        piece = stage.split.rank * stage.tp.size + stage.tp.rank
        return whole.narrow(_SEQUENCE, piece * length, length)


@dataclass(frozen=True, slots=True)
class DecodePhase:
    """Token generation (TKG) on one rank.

    Attributes:
        stage: groups; `split` shares the batch.
        dispatch: order of the sum over heads and the gather of the batch: `AR_AG` adds and then
            gathers, `AG_AR` gathers and then adds, `RS_AG` leaves each rank a piece of the sum and
            gathers the pieces. The same up to the order of additions.
    """

    stage: Stage
    dispatch: str = "AR_AG"

    def rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of a tensor with the whole batch along `dim`.

        Raises:
            ShapeError: the batch does not split evenly.
        """
        split = self.stage.split
        batch = x.shape[dim]
        if batch % split.size:
            raise ShapeError(
                explain("batch", "be a multiple of attention_dp_degree", f"{batch}, {split.size}")
            )
        return x.narrow(dim, split.rank * (batch // split.size), batch // split.size)

    def own_rows(self, first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        """This rank's rows of several arguments of a decode step.

        Args:
            first: `(batch, ...)`.
            *others: likewise, or one row for all, or None: these stay as they are.

        Returns:
            As many.

        Raises:
            ShapeError: the batch does not split evenly.
        """
        batch = first.shape[0]
        return tuple(
            x if x is None or x.shape[0] != batch else self.rows(x) for x in (first, *others)
        )

    def reduce(self, product: Tensor) -> Tensor:
        """Add the ranks' products with the output projection, `(rows, tokens, hidden_size)`."""
        tp, split = self.stage.tp, self.stage.split
        if self.dispatch == "RS_AG":
            return reduce_scatter(product, 0, tp)
        if self.dispatch == "AG_AR":
            product = all_gather(product, 0, split)
        return all_reduce(product, tp)

    def leave(self, output: Tensor) -> Tensor:
        """The whole batch's output, `(batch, tokens, hidden_size)`."""
        if self.dispatch == "AG_AR":
            return output
        if self.dispatch == "RS_AG":
            output = all_gather(output, 0, self.stage.tp)
        return all_gather(output, 0, self.stage.split)
