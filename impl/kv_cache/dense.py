"""A cache of lines and slots: contiguous, rolling, chunk, core-sharded or left-padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.errors import ShapeError, UnsupportedError, explain
from impl.kv_cache.step import Step
from impl.kv_cache.token_writes import Places, token_places, write_tokens
from impl.slot_positions import LeftPaddedSlots, SlotLayout

TILE = 128
"""Rows of a tiled sequence axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCache:
    """Keys or values of one layer, a line a sequence.

    Attributes:
        layout: which slot of its line a token goes to.
        lines: sequences.
        heads: KV heads.
        slots: slots of a line.
        width: head_dim.
        k_transposed: keys are stored as `(lines, heads, head_dim, slots)`.
        tiled: the sequence axis is stored as `(128, slots / 128)`; slot `s` stays the `s`-th.
    """

    layout: SlotLayout
    lines: int
    heads: int
    slots: int
    width: int
    k_transposed: bool = False
    tiled: bool = False

    def stored_shape(self, keys: bool) -> tuple[int, ...]:
        """Shape of the stored keys, or values."""
        if keys and self.k_transposed:
            return (self.lines, self.heads, self.width, self.slots)
        slots = (TILE, self.slots // TILE) if self.tiled else (self.slots,)
        return (self.lines, self.heads, *slots, self.width)

    def _rows(self, stored: Tensor, keys: bool) -> Tensor:
        """View of what is stored as BHSD."""
        if keys and self.k_transposed:
            return stored.transpose(2, 3)
        return stored.flatten(2, 3) if self.tiled else stored

    def read(
        self,
        stored: Tensor,
        keys: bool,
        *,
        lines: Tensor | None,
        block_table: Tensor | None,
        length: int | None,
    ) -> Tensor:
        """What rows find, still coded.

        Args:
            stored: the stored keys or values.
            keys: which of them.
            lines: `(batch,)`, int64, line of each row, any for an idle one; None is all lines.
            block_table: must be None.
            length: positions in use lie below it; None is all slots.

        Returns:
            `(batch, heads, slots in use, head_dim)`, BHSD; a view if `lines` is None.

        Raises:
            ShapeError: a block table.
        """
        _no_table(block_table)
        rows = self._rows(stored, keys)
        if length is not None:
            count = min(self.layout.slots_for(length), self.slots)
            last = isinstance(self.layout, LeftPaddedSlots)
            rows = rows[:, :, self.slots - count :] if last else rows[:, :, :count]
        return rows if lines is None else rows.index_select(0, lines.clamp(min=0))

    def places(self, step: Step) -> Places:
        """Where a step's tokens are written; of a left-padded cache, where its moved slots are.

        Raises:
            ShapeError: a block table.
            UnsupportedError: slots are given where tokens are appended.
        """
        _no_table(step.block_table)
        positions = step.positions
        if isinstance(self.layout, LeftPaddedSlots):
            if step.scatter_index is not None:
                raise UnsupportedError(
                    explain(
                        "scatter_index",
                        "be None in a left-padded cache",
                        tuple(step.scatter_index.shape),
                        "its tokens are appended",
                    )
                )
            # A row of padding alone stays as it is.
            active = (positions >= 0).any(dim=1)
            slots = torch.arange(self.slots, device=positions.device)
            slots = slots.expand(positions.shape[0], self.slots)
            lines = step.lines.masked_fill(~active, -1)
        else:
            slots = self._slots(positions, step.scatter_index)
            lines = step.lines
        return token_places(lines[:, None].expand(slots.shape), slots)

    def slots_read(
        self, positions: Tensor, scatter_index: Tensor | None, *, length: int | None
    ) -> Tensor | None:
        """Slots that a step's tokens are written to in what `read` returns of all lines.

        Args:
            positions: `(batch, seq_len)`, int64, negative for padding.
            scatter_index: as in `Step`.
            length: as in `read`.

        Returns:
            `(batch, seq_len)`, int64, negative for nowhere; None if slots move or are left out.
        """
        cut = length is not None and self.layout.slots_for(length) < self.slots
        if cut or isinstance(self.layout, LeftPaddedSlots):
            return None
        return self._slots(positions, scatter_index)

    def _slots(self, positions: Tensor, given: Tensor | None) -> Tensor:
        """Slots of a step's tokens, negative for nowhere, where tokens have fixed ones."""
        if given is not None:
            return given.to(torch.int64).masked_fill(positions < 0, -1)
        newest = positions.amax(dim=1, keepdim=True)
        stays = self.layout.stays(positions, newest) & (positions >= 0)
        return self.layout.slot_of(positions.clamp(min=0)).masked_fill(~stays, -1)

    def write(self, stored: Tensor, keys: bool, new: Tensor, step: Step, places: Places) -> None:
        """Write a step's tokens, in place.

        Args:
            stored: the stored keys or values.
            keys: which of them.
            new: `(batch, heads, seq_len, head_dim)`, BHSD, coded.
            step: where they belong.
            places: `places(step)`.
        """
        rows = self._rows(stored, keys)
        if isinstance(self.layout, LeftPaddedSlots):
            before = rows.index_select(0, step.lines.clamp(min=0))
            new = torch.cat((before, new), dim=2)[:, :, -self.slots :]
        write_tokens(rows, new, places)


def _no_table(table: Tensor | None) -> None:
    if table is not None:
        raise ShapeError(
            explain(
                "active_block_table",
                "be None in a cache without blocks",
                tuple(table.shape),
                "set is_block_kv_layout",
            )
        )
