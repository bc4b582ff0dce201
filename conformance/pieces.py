"""Pieces of a core's queries that are evaluated apart, each with the keys it sees and no others.

Scores of 2,048 tokens are arrays of 128 MB, which fit into no cache and are handed back to the
operating system between two steps. Rows of the core share nothing, so some queries at a time do;
masked keys change no bit of a row (clause A6 of `golden.attend`), so they need not be there. Under
a causal mask that halves the work, under a window it leaves a few hundred keys of each piece.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import golden
from conformance.error_model import Evaluate, Outputs
from conformance.inputs import CoreInputs
from conformance.rounding_runs import Nearest
from golden import Observer, unobserved

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
    # rows far apart see different keys, so that a piece of them must be narrow
    rows = max(SCORES // (width * chosen.step), LEAST)
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


def in_pieces(evaluate: Evaluate, pieces: Sequence[Piece]) -> Evaluate:
    """Return a function that evaluates a core piece by piece and joins the outputs.

    Args:
        evaluate: takes `queries=` and `keys=`.
        pieces: all queries in order.
    """

    def joined(*, observe: Observer = unobserved, **rest: Any) -> Outputs:
        parts = [
            evaluate(
                observe=_from_its_start(observe), queries=piece.queries, keys=piece.keys, **rest
            )
            for piece in pieces
        ]
        return {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}

    return joined


def _from_its_start(observe: Observer) -> Observer:
    """Return an observer whose exp errs as a function, the same one in every piece."""
    return (
        replace(observe, rng=copy.deepcopy(observe.rng))
        if isinstance(observe, Nearest)
        else observe
    )
