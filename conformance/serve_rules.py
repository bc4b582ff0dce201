"""Exact rules of a schedule: what no token that counts may see, and what other sequences hold.

* `masked values`, `masked NaN`: padding, idle rows, rejected drafts and sequences that have left
  may hold anything. Not for a cache that casts to float8, where what is huge becomes NaN.
* `batch mates`: so may all sequences but the one of cache row 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.error_model import RowMask
from conformance.schedule_calls import PlannedCall, part_names
from conformance.serve_expected import ServeGolden
from conformance.serve_inputs import ServeInputs
from golden import Array

Rows: TypeAlias = Mapping[str, RowMask]
Tokens: TypeAlias = tuple[NDArray[np.bool_], ...]


def serve_changes(
    case: Case, inputs: ServeInputs, rows: Rows, huge: float
) -> Iterator[tuple[str, ServeInputs, Rows]]:
    """Yield each rule with the inputs to give and the rows that must not change.

    Args:
        case: the case.
        inputs: its inputs.
        rows: per output, which rows count.
        huge: what hidden values are set to.
    """
    unseen = _unseen(inputs)
    cache = inputs.schedule.cache
    casts = cache.code.startswith("float8") and cache.scales == "none"
    if any(tokens.any() for tokens in unseen) and not casts:
        poisoned = _poisoned(inputs, unseen, huge)
        before, after = ServeGolden(case, inputs).exact, ServeGolden(case, poisoned).exact
        # what golden itself computes to the same bits did not see them
        blind = {
            name: counted & (before[name] == after[name]).all(axis=-1)
            for name, counted in rows.items()
        }
        yield "masked values", poisoned, blind
        yield "masked NaN", _poisoned(inputs, unseen, np.nan), blind
    if case.workload.batch > 1:
        yield "batch mates", _other_mates(inputs), _first_sequence(inputs, rows)


def _tokens(inputs: ServeInputs) -> Tokens:
    return tuple(np.zeros(hidden.shape[:2], dtype=np.bool_) for hidden in inputs.hidden_states)


def _owners(call: PlannedCall) -> NDArray[np.int64]:
    """Return the cache row of each token of a call, -1 for none, `(batch, q_len)`."""
    if call.packing is not None:
        return call.rows[call.packing.q_segments]
    return np.where(call.positions >= 0, call.rows[:, None], -1)


def _unseen(inputs: ServeInputs) -> Tokens:
    """Mark tokens that nothing at the end may depend on, but perhaps their own outputs."""
    found = _tokens(inputs)
    for number, call in enumerate(inputs.walk.calls):
        unseen, owners = ~call.kept, _owners(call)
        for later in inputs.walk.calls[number + 1 :]:
            if later.fresh:
                unseen |= np.isin(owners, later.rows[later.rows >= 0])
        found[call.part][:, call.first : call.first + call.q_len] = unseen
    return found


def _poisoned(inputs: ServeInputs, tokens: Tokens, value: float) -> ServeInputs:
    hidden = tuple(
        np.where(marked[..., None], value, states)
        for marked, states in zip(tokens, inputs.hidden_states, strict=True)
    )
    return replace(inputs, hidden_states=hidden)


def _of_first(inputs: ServeInputs) -> Tokens:
    found = _tokens(inputs)
    for call in inputs.walk.calls:
        found[call.part][:, call.first : call.first + call.q_len] = _owners(call) == 0
    return found


def _other_mates(inputs: ServeInputs) -> ServeInputs:
    """Turn the sign of everything that other sequences hold."""

    def turned(states: Array, mine: NDArray[np.bool_]) -> Array:
        return np.where(mine[..., None], states, -states)

    hidden = tuple(map(turned, inputs.hidden_states, _of_first(inputs)))
    v_prior = inputs.v_prior
    if v_prior is not None:
        v_prior = np.concatenate([v_prior[:1], -v_prior[1:]])
    return replace(inputs, hidden_states=hidden, v_prior=v_prior)


def _first_sequence(inputs: ServeInputs, rows: Rows) -> Rows:
    mine = dict(zip(part_names(inputs.schedule), _of_first(inputs), strict=True))
    cache = np.zeros_like(rows["k_cache"])
    cache[0] = True
    return {name: counted & mine.get(name, cache) for name, counted in rows.items()}
