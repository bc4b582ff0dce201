"""Pieces of a core's queries that are evaluated apart, each with the keys it sees and no others.

Scores of 2,048 tokens are arrays of 128 MB, which fit into no cache and are handed back to the
operating system between two steps. Rows of the core share nothing, so some queries at a time do;
masked keys change no bit of a row (clause A6 of `golden.attend`), so they need not be there. Under
a causal mask that halves the work, under a window it leaves a few hundred keys of each piece.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

import golden
from conformance.inputs import CoreInputs

WHOLE = 1 << 22
"""Scores of all queries from which on a core is cut; fewer are one piece."""
SCORES = 1 << 18
"""Scores of a piece, 2 MiB, whatever it sees: a few such arrays stay in a processor's cache."""
LEAST = 16
"""Queries of a piece, at least half of them: error models tell few rows from many."""


class Piece(NamedTuple):
    """Some queries, and the keys that any of them sees.

    Attributes:
        queries: slice of the queries.
        keys: slice of the keys and values.
        place: slice of the queries that were cut, in which these are contiguous.
    """

    queries: slice = slice(None)
    keys: slice = slice(None)
    place: slice = slice(None)


def core_pieces(
    inputs: CoreInputs, mask: golden.Mask, queries: slice = slice(None)
) -> tuple[Piece, ...]:
    """Cut queries into pieces, all of nearly the same size; one piece where scores are few.

    Args:
        inputs: of the case.
        mask: which keys a query may see, by their positions alone.
        queries: those to cut, in rising order.
    """
    batch, heads, q_len = inputs.q.shape[:3]
    chosen = range(q_len)[queries]
    width = batch * heads * inputs.k.shape[2]
    if width * q_len < WHOLE:
        return (Piece(queries),)
    rows = max(SCORES // width, LEAST)
    count = max(len(chosen) // rows, 1)
    edges = [len(chosen) * i // count for i in range(count + 1)]
    found = []
    for start, stop in pairwise(edges):
        part = chosen[start:stop]
        piece = slice(part.start, part.stop, part.step)
        seen = golden.visible_keys(mask, inputs.q_positions[:, piece], inputs.kv_positions)
        keys = np.flatnonzero(seen.any(axis=(0, 1, 2)))
        # a row that sees nothing still needs a key not to see
        reach = slice(int(keys[0]), int(keys[-1]) + 1) if len(keys) else slice(0, 1)
        found.append(Piece(piece, reach, slice(start, stop)))
    return tuple(found)
