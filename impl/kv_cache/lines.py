"""Which line of a cache each batch row reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.errors import ShapeError, explain

IDLE = -1
"""Line of a batch row that serves no sequence."""


def cache_lines(
    seq_ids: Tensor | None, batch: int, lines: int, device: torch.device, *, first_line: int = 0
) -> Tensor:
    """Line of each batch row; `IDLE` where its sequence has none here.

    With sequence ids, sequences join and leave a running batch (continuous batching): id `i` owns
    line `i - first_line`. An id of -1, or of a line that other ranks hold, or beyond the last line
    makes its row idle: it writes nothing and finds nothing. Two rows must not share an id.

    Args:
        seq_ids: `(batch,)`, integer; None takes the lines in order.
        batch: rows of the step.
        lines: lines of the cache.
        device: where the result goes if there are no ids.
        first_line: id of the first line held here.

    Returns:
        `(batch,)`, int64.

    Raises:
        ShapeError: ids of another shape or dtype, or more rows than lines without ids.
    """
    if seq_ids is None:
        if batch > lines:
            raise ShapeError(
                explain("seq_ids", f"be given for a batch above {lines}, the cache's lines", batch)
            )
        return torch.arange(batch, device=device)
    kind = seq_ids.dtype
    if tuple(seq_ids.shape) != (batch,) or kind.is_floating_point or kind == torch.bool:
        raise ShapeError(
            explain("seq_ids", f"be integers ({batch},)", f"{kind} {tuple(seq_ids.shape)}")
        )
    ids = seq_ids.to(torch.int64) - first_line
    return ids.masked_fill((ids < 0) | (ids >= lines), IDLE)
