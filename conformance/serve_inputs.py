"""Seeded inputs of a schedule: hidden states of every call, what the cache holds before, tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.draws import (
    Source,
    draw_hidden,
    draw_keys_values,
    draw_weights,
    source_of,
)
from conformance.errors import UsageError
from conformance.extra_inputs import adapter_ids, draw_input_norm, draw_lora, rotary_positions
from conformance.schedule_calls import PlannedCall, Walk, walk
from conformance.schedules import CacheKind, Schedule
from golden import FORMATS, Array, AttentionWeights, Lora, Quantisation

_SPARE_BLOCKS = 2
"""Blocks of a paged cache's pool that no table lists."""
_BOUND = 3.5
"""Standard deviations that a static scale lets a quantised cache hold; the rest is clamped."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServeInputs:
    """Inputs of a schedule, float64, exact in the case's dtype.

    Attributes:
        weights: the layer's arrays.
        schedule: the cache and the parts.
        walk: its calls with their positions.
        hidden_states: per part, `(batch, tokens, input_size)`; `(1, tokens, input_size)` for
            `packed`.
        residual: like `hidden_states`; None without.
        k_prior: `(rows, num_key_value_heads, longest, head_dim)`, BHSD, keys of the tokens that the
            cache holds before, by position; None if it is empty. Beyond a row's length they are
            other tokens'.
        v_prior: like `k_prior`.
        prior_lengths: `(rows,)`, int64, tokens that each cache row holds before.
        block_tables: `(rows, blocks)`, int64, of a paged cache; None for others.
        num_blocks: of its pool; 0 for others.
        lora: adapters; its `adapter_ids` are those of the cache rows.
        input_norm: `(input_size,)`, weight of the input's norm; None without.
        quantisation: how keys and how values are stored; None as they are.
    """

    weights: AttentionWeights
    schedule: Schedule
    walk: Walk
    hidden_states: tuple[Array, ...]
    residual: tuple[Array, ...] | None
    k_prior: Array | None
    v_prior: Array | None
    prior_lengths: NDArray[np.int64]
    block_tables: NDArray[np.int64] | None
    num_blocks: int
    lora: Lora | None
    input_norm: Array | None
    quantisation: tuple[Quantisation, Quantisation] | None

    def hidden_of(self, call: PlannedCall) -> Array:
        """Return the hidden states of one call, `(batch, q_len, input_size)`."""
        return self.hidden_states[call.part][:, call.first : call.first + call.q_len]

    def residual_of(self, call: PlannedCall) -> Array | None:
        """Return the residual of one call, shaped like its hidden states."""
        if self.residual is None:
            return None
        return self.residual[call.part][:, call.first : call.first + call.q_len]

    def lora_of(self, call: PlannedCall) -> Lora | None:
        """Return the adapters with the ids of a call's rows."""
        if self.lora is None:
            return None
        count = len(self.lora.adapters["q"].scaling)
        return replace(self.lora, adapter_ids=adapter_ids(count, call.rows))


def rotary_of(case: Case, call: PlannedCall) -> NDArray[np.int64] | None:
    """Return a call's positions on each axis of M-RoPE, None for a layer without."""
    rope = case.config.rope
    if rope is None or not rope.mrope_section:
        return None
    return rotary_positions(rope, call.positions)


def draw_serve(case: Case) -> ServeInputs:
    """Draw the inputs of a case with a schedule.

    Raises:
        UsageError: the case has none.
    """
    schedule, config, work = case.workload.schedule, case.config, case.workload
    if schedule is None:
        raise UsageError(f"{case.id} has no schedule")
    walked, source = walk(schedule, work.lengths), source_of(case)
    limits = [config.sliding_window, config.attention_chunk_size, walked.max_length]
    weights = draw_weights(source, config, min(limit for limit in limits if limit is not None))
    shapes = [
        (1, sum(part.tokens)) if part.kind == "packed" else (len(part.rows), max(part.tokens))
        for part in schedule.parts
    ]
    hidden = tuple(draw_hidden(source, *shape, config) for shape in shapes)
    k = v = None
    if longest := max(work.lengths):
        k, v = draw_keys_values(source, config, work.batch, longest)
    tables, blocks = _tables(source, schedule.cache, work.batch, walked.max_length)
    residual = None
    if case.extras.residual:
        residual = tuple(draw_hidden(source, *shape, config) for shape in shapes)
    return ServeInputs(
        weights=weights,
        schedule=schedule,
        walk=walked,
        hidden_states=hidden,
        residual=residual,
        k_prior=k,
        v_prior=v,
        prior_lengths=np.array(work.lengths, dtype=np.int64),
        block_tables=tables,
        num_blocks=blocks,
        lora=draw_lora(source, case, np.arange(work.batch)),
        input_norm=draw_input_norm(source, case),
        quantisation=_quantisation(case, schedule.cache),
    )


def _tables(
    source: Source, cache: CacheKind, rows: int, max_length: int
) -> tuple[NDArray[np.int64] | None, int]:
    """Give each row its blocks, in no order."""
    if cache.layout != "paged":
        return None, 0
    each = -(-max_length // cache.size)
    blocks = rows * each + _SPARE_BLOCKS
    order = source.rng.permutation(blocks)[: rows * each]
    return order.reshape(rows, each).astype(np.int64), blocks


def _quantisation(case: Case, cache: CacheKind) -> tuple[Quantisation, Quantisation] | None:
    """Return how keys and values are stored, with scales that fit the regime.

    Scales are powers of two, so that dividing by one is exact in every format: a code then differs
    between two subjects only where their keys do.
    """
    if not cache.code:
        return None
    if cache.scales == "none":
        plain = Quantisation(cache.code)  # type: ignore[arg-type]  # CacheKind checks the word
        return plain, plain
    config = case.config
    largest = 127.0 if cache.code == "int8" else FORMATS[cache.code].largest
    heads, width = config.num_key_value_heads, config.head_dim
    shape = {"tensor": (), "head": (heads,), "channel": (heads, width)}[cache.scales]
    # neighbours differ by a factor of two, so that a scale misplaced is a scale wrong
    steps = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape) % 2
    scales = 2.0 ** (np.ceil(np.log2(_BOUND / largest)) + steps)
    return (
        Quantisation(cache.code, scales),  # type: ignore[arg-type]
        Quantisation(cache.code, 2.0 * scales),  # type: ignore[arg-type]
    )
