"""The vector-Jacobian product of writing to a key/value cache."""

from __future__ import annotations

import numpy as np

from golden.arrays import Positions
from golden.cache import ContiguousCache
from golden.stages import Array


def part_written(
    after: ContiguousCache, positions: Positions, d_after: Array
) -> tuple[Array, Array]:
    """Part the cotangent of a cache's slots into this call's tokens and the cache before.

    G12: a slot that the call writes passes its cotangent to the token written; every other slot
    passes it to the cache before the call.

    Args:
        after: the cache after the call.
        positions: `(batch, q_len)`, int64, positions of the call's tokens; -1 writes nothing.
        d_after: cotangent of the cache's keys or values, shaped like `after.k`.

    Returns:
        `(batch, num_key_value_heads, q_len, head_dim)` for the tokens, and one shaped like
        `d_after` for the cache before.
    """
    batch, heads, _, head_dim = after.k.shape
    rows, tokens = np.nonzero(positions >= 0)
    slots = positions[rows, tokens]
    d_tokens = np.zeros((batch, heads, positions.shape[1], head_dim))
    d_tokens[rows, :, tokens] = d_after[rows, :, slots]
    d_before = d_after.copy()
    d_before[rows, :, slots] = 0.0
    return d_tokens, d_before
