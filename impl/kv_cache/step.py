"""Where the tokens of one step belong, as far as the caller says it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """Addresses of a step's tokens.

    Attributes:
        positions: `(batch, seq_len)`, int64; negative is padding and is written nowhere.
        lines: `(batch,)`, int64, cache line of each row, negative for an idle one.
        scatter_index: `(batch, seq_len)`, integer: slots to write in place of those of the
            positions, negative for nowhere; for a paged cache the slot mapping. None derives them.
        block_table: `(batch, blocks)`, integer: blocks of each row in order, negative for none;
            paged caches only.
    """

    positions: Tensor
    lines: Tensor
    scatter_index: Tensor | None = None
    block_table: Tensor | None = None
