"""Runs golden through a schedule: every part's outputs, and what the cache holds at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import golden
from conformance.cases import Case
from conformance.error_model import Outputs, RowMask
from conformance.schedule_calls import PlannedCall, part_names
from conformance.serve_inputs import ServeInputs, rotary_of
from golden import Array, AttentionConfig, AttentionWeights, Observer, unobserved

INPUT_NORM_EPS = 1e-6
"""Epsilon of the input's norm."""

_NEAR_TIE = 4.0
"""How far runs that round move what a quantised cache stores, in errors of theirs.

A key within its own error of a tie between two codes is stored as either. In float32 one key in
2**20 lies so near, seen by few of the runs or by none, and then a code that flips would fail a
correct subject. Moved by four of its errors, a key that lies `d` of them from a tie flips in a run
with chance `Q(d / 4)`, at least a quarter wherever a subject's own chance `Q(d)` exceeds 1 in 250,
and all of 32 runs miss it with chance below 1e-4. The scale of what reads it grows up to twice.
"""


@dataclass(slots=True, eq=False)
class _Written:
    """Keys and values in the order that golden wrote them, exact."""

    keys: list[Array]
    values: list[Array]


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """A cache whose writes are noted, or made with `gain` times the error of what is written."""

    inner: Any
    exact: _Written
    gain: float | None
    place: int = 0

    @property
    def rows(self) -> int:
        count: int = self.inner.rows
        return count

    def prior(self, positions: golden.Positions, *, seq_ids: Any = None) -> golden.Held:
        held: golden.Held = self.inner.prior(positions, seq_ids=seq_ids)
        return held

    def write(self, k: Array, v: Array, positions: Any, *, seq_ids: Any = None) -> _Watched:
        if self.gain is None:
            self.exact.keys.append(k)
            self.exact.values.append(v)
        elif self.gain != 1.0:
            k_exact, v_exact = self.exact.keys[self.place], self.exact.values[self.place]
            k, v = k_exact + self.gain * (k - k_exact), v_exact + self.gain * (v - v_exact)
        written = self.inner.write(k, v, positions, seq_ids=seq_ids)
        return replace(self, inner=written, place=self.place + 1)


def serve_rows(case: Case, inputs: ServeInputs) -> dict[str, RowMask]:
    """Return which rows of each output count: no padding; no position that the cache need not hold.

    A rolling cache need hold what the next token's window reaches, a chunk cache the next token's
    chunk, any other all accepted tokens.
    """
    names = part_names(inputs.schedule)
    rows = {
        name: np.zeros(hidden.shape[:2], dtype=np.bool_)
        for name, hidden in zip(names, inputs.hidden_states, strict=True)
    }
    for call in inputs.walk.calls:
        rows[names[call.part]][:, call.first : call.first + call.q_len] = call.positions >= 0
    place = np.arange(inputs.walk.max_length)
    length = np.array(inputs.walk.lengths)[:, None]
    held = place < length
    config, layout = case.config, inputs.schedule.cache.layout
    if layout == "rolling" and config.sliding_window is not None:
        held &= place > length - config.sliding_window
    if layout == "chunk" and config.attention_chunk_size is not None:
        held &= place // config.attention_chunk_size == length // config.attention_chunk_size
    every = np.repeat(held[:, None], config.num_key_value_heads, axis=1)
    return rows | {"k_cache": every, "v_cache": every}


class ServeGolden:
    """Golden on a schedule, again and again.

    Attributes:
        exact: what it gives without an observer.
    """

    def __init__(self, case: Case, inputs: ServeInputs) -> None:
        self._case, self._inputs = case, inputs
        self._names = part_names(inputs.schedule)
        self._written = _Written([], [])
        self._empty = _empty_cache(case.config, inputs)
        self.exact: Outputs = self._run(unobserved, case.config, inputs.weights, None)

    def evaluate(
        self,
        *,
        observe: Observer = unobserved,
        config: AttentionConfig | None = None,
        weights: Mapping[str, Array] = MappingProxyType({}),
    ) -> Outputs:
        """Run golden, as `Reference.evaluate` says.

        Codes of a quantised cache stay where another configuration or weight would move them: they
        have no derivative.
        """
        gain = 1.0
        if self._inputs.quantisation is not None:
            gain = _NEAR_TIE if config is None and not weights else 0.0
        arrays = replace(self._inputs.weights, **weights)
        return self._run(observe, config or self._case.config, arrays, gain)

    def _run(
        self,
        observe: Observer,
        config: AttentionConfig,
        weights: AttentionWeights,
        gain: float | None,
    ) -> Outputs:
        inputs = self._inputs
        cache = _Watched(self._empty, self._written, gain)
        outputs = {
            name: np.zeros((*hidden.shape[:2], config.hidden_size))
            for name, hidden in zip(self._names, inputs.hidden_states, strict=True)
        }
        for call in inputs.walk.calls:
            output, cache = self._call(call, cache, config, weights, observe)
            outputs[self._names[call.part]][:, call.first : call.first + call.q_len] = output
        k, v = by_position(cache, inputs.walk.lengths, inputs.walk.max_length)
        return {**outputs, "k_cache": k, "v_cache": v}

    def _call(
        self,
        call: PlannedCall,
        cache: _Watched,
        config: AttentionConfig,
        weights: AttentionWeights,
        observe: Observer,
    ) -> tuple[Array, _Watched]:
        inputs = self._inputs
        hidden, ids = inputs.hidden_of(call), None if call.in_order else call.rows
        if inputs.input_norm is not None:
            hidden = golden.add_and_normalise(
                hidden,
                weight=inputs.input_norm,
                eps=INPUT_NORM_EPS,
                residual=inputs.residual_of(call),
                observe=observe,
            ).hidden_states
        if call.packing is not None:
            packed = golden.packed_forward(
                config,
                weights,
                hidden,
                query_lens=call.packing.query_lens,
                key_lens=call.packing.key_lens,
                cache=cache,
                seq_ids=ids,
                observe=observe,
            )
            return packed.output, packed.cache
        step = golden.attend_with_cache(
            config,
            weights,
            hidden,
            position_ids=call.positions,
            cache=cache,
            seq_ids=ids,
            active_mask=call.seen,
            rotary_position_ids=rotary_of(self._case, call),
            lora=inputs.lora_of(call),
            observe=observe,
        )
        positions = np.where(call.kept, step.positions, -1)
        return step.output, cache.write(step.k, step.v, positions, seq_ids=ids)


def by_position(cache: Any, lengths: tuple[int, ...], max_length: int) -> tuple[Array, Array]:
    """Return what a cache of golden's holds, `(rows, heads, max_length, head_dim)` by position."""
    held = cache.prior(np.array(lengths, dtype=np.int64)[:, None])
    rows, slots = np.nonzero(held.positions >= 0)
    found = []
    for stored in (held.k, held.v):
        array = np.zeros((stored.shape[0], stored.shape[1], max_length, stored.shape[3]))
        array[rows, :, held.positions[rows, slots]] = stored[rows, :, slots]
        found.append(array)
    return found[0], found[1]


def _empty_cache(config: AttentionConfig, inputs: ServeInputs) -> Any:
    """Return golden's cache with what it holds before the first call."""
    kind, length = inputs.schedule.cache, inputs.walk.max_length
    rows = inputs.prior_lengths.size
    cache: Any
    if kind.layout == "rolling":
        cache = golden.rolling_cache(
            config, batch=rows, speculation_length=longest_draft(inputs.walk.calls)
        )
    elif kind.layout == "chunk":
        cache = golden.chunk_cache(config, batch=rows)
    elif kind.layout == "paged":
        cache = golden.paged_cache(
            config,
            num_blocks=inputs.num_blocks,
            block_size=kind.size,
            block_tables=inputs.block_tables,
        )
    elif kind.layout == "sharded":
        cache = golden.sharded_cache(config, batch=rows, max_length=length, cores=kind.size)
    elif kind.layout == "transposed":
        cache = golden.transposed_cache(config, batch=rows, max_length=length)
    else:
        cache = golden.empty_cache(config, batch=rows, max_length=length)
    if inputs.quantisation is not None:
        cache = golden.QuantisedCache(cache, *inputs.quantisation)
    if inputs.k_prior is None:
        return cache
    return cache.write(inputs.k_prior, inputs.v_prior, prior_positions(inputs))


def longest_draft(calls: tuple[PlannedCall, ...]) -> int:
    """Return the tokens of the largest speculative call, 1 without any."""
    return max((call.q_len for call in calls if call.kind == "drafts"), default=1)


def prior_positions(inputs: ServeInputs) -> NDArray[np.int64]:
    """Return the position of each prior key, `(rows, longest)`, -1 beyond a row's length."""
    assert inputs.k_prior is not None
    place = np.arange(inputs.k_prior.shape[2])
    return np.where(place < inputs.prior_lengths[:, None], place, -1)
