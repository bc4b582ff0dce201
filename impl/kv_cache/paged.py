"""A paged cache: sequences own blocks of a shared pool, by block table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.errors import ShapeError, explain
from impl.kv_cache.step import Step
from impl.kv_cache.token_writes import Places, token_places, write_tokens
from impl.slot_positions import ContiguousSlots, SlotLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedCache:
    """Keys or values of one layer in blocks.

    Position `p` of a row is in slot `table[p // block_size] * block_size + p % block_size` of the
    pool, and what is read through the table is contiguous. Rows may share the blocks of a common
    prefix; none of them must write into these.

    Attributes:
        blocks: blocks that sequences may own.
        heads: KV heads.
        block_size: slots of a block.
        width: head_dim.
        heads_first: blocks are stored as `(heads, block_size, head_dim)` (chunked prefill), not as
            `(block_size, heads, head_dim)` (prefix caching); the latter pool ends with one block
            more, for kernels that write padding somewhere.
        tiles: the block axis of the second form is stored as `(tiles, block_size / tiles)`.

    Source: Kwon et al. (2023), PagedAttention, arXiv 2309.06180; neuronx-distributed-inference,
    `BlockKVCacheManager`.
    """

    blocks: int
    heads: int
    block_size: int
    width: int
    heads_first: bool = False
    tiles: int = 1

    @property
    def layout(self) -> SlotLayout:
        """Which position each gathered slot holds."""
        return ContiguousSlots()

    @property
    def k_transposed(self) -> bool:
        """Keys are rows."""
        return False

    def stored_shape(self, keys: bool) -> tuple[int, ...]:
        """Shape of the stored keys, and of the values."""
        if self.heads_first:
            return (self.blocks, self.heads, self.block_size, self.width)
        size: tuple[int, ...] = (self.block_size,)
        if self.tiles > 1:
            size = (self.tiles, self.block_size // self.tiles)
        return (self.blocks + 1, *size, self.heads, self.width)

    def _blocks(self, stored: Tensor) -> Tensor:
        """View of what is stored as `(blocks, heads, block_size, head_dim)`."""
        if self.heads_first:
            return stored
        return (stored.flatten(1, 2) if self.tiles > 1 else stored).transpose(1, 2)

    def read(
        self,
        stored: Tensor,
        keys: bool,
        *,
        lines: Tensor | None,
        block_table: Tensor | None,
        length: int | None,
    ) -> Tensor:
        """What rows find through their block tables, still coded.

        Args:
            stored: the stored keys or values.
            keys: no difference.
            lines: no difference; the table has a row per batch row.
            block_table: `(batch, blocks)`, integer; negative reads any block, as its slots are
                not among those in use.
            length: positions in use lie below it; None is all the table.

        Returns:
            `(batch, heads, slots, head_dim)`, BHSD.

        Raises:
            ShapeError: no table, or one of another shape.
        """
        table = checked_table(block_table)
        batch, count = table.shape
        blocks = self._blocks(stored).index_select(0, table.clamp(min=0).reshape(-1))
        by_row = blocks.reshape(batch, count, self.heads, self.block_size, self.width)
        gathered = by_row.transpose(1, 2).flatten(2, 3)
        return gathered if length is None else gathered[:, :, :length]

    def places(self, step: Step) -> Places:
        """Where a step's tokens are written: block and offset.

        Raises:
            ShapeError: neither a slot mapping nor a block table.
        """
        positions = step.positions
        if step.scatter_index is not None:
            slots = step.scatter_index.to(torch.int64).masked_fill(positions < 0, -1)
        else:
            slots = slot_mapping(checked_table(step.block_table), positions, self.block_size)
        slots = slots.masked_fill(step.lines[:, None] < 0, -1)
        block = torch.div(slots, self.block_size, rounding_mode="floor")
        return token_places(block, torch.remainder(slots, self.block_size))

    def slots_read(
        self, positions: Tensor, scatter_index: Tensor | None, *, length: int | None
    ) -> None:
        """None: blocks are read as copies; arguments as in `DenseCache.slots_read`."""
        del positions, scatter_index, length

    def write(self, stored: Tensor, keys: bool, new: Tensor, step: Step, places: Places) -> None:
        """Write a step's tokens, in place; arguments as in `DenseCache.write`."""
        write_tokens(self._blocks(stored), new, places)


def slot_mapping(block_table: Tensor, position_ids: Tensor, block_size: int) -> Tensor:
    """Slot of each token in the pool.

    A position beyond the table is an index error where the device checks indices (CPU).

    Args:
        block_table: `(batch, blocks)`, integer: blocks of each row in order, negative for none.
        position_ids: `(batch, seq_len)`, integer; negative marks padding.
        block_size: slots of a block.

    Returns:
        `(batch, seq_len)`, int64; -1 for padding, and for a position whose block is none.

    Source: neuronx-distributed-inference, `generate_tokengen_slot_mapping`.
    """
    positions = position_ids.to(torch.int64)
    real = positions.clamp(min=0)
    place = torch.div(real, block_size, rounding_mode="floor")
    block = torch.gather(block_table.to(torch.int64), 1, place)
    slots = block * block_size + torch.remainder(real, block_size)
    return slots.masked_fill((positions < 0) | (block < 0), -1)


def block_tiles(block_size: int, blocks_per_sequence: int, rows: int = 128) -> int:
    """Tiles of a block, so that a sequence's blocks fill `rows` partitions of the device.

    The public module takes the smallest power of two of at least `rows / blocks_per_sequence`,
    which empties blocks that are smaller; those stay whole here.
    """
    tiles = 1
    while tiles * blocks_per_sequence < rows:
        tiles *= 2
    return tiles if block_size % tiles == 0 else 1


def checked_table(table: Tensor | None) -> Tensor:
    """The block table, if it is one.

    Raises:
        ShapeError: it is missing, or not integers `(batch, blocks)`.
    """
    shape = None if table is None else tuple(table.shape)
    if table is None or table.dim() != 2 or table.is_floating_point():
        raise ShapeError(
            explain("active_block_table", "be integers (batch, blocks) in a paged cache", shape)
        )
    return table.to(torch.int64)
