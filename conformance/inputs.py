"""Seeded inputs of a case: weights, hidden states, caches; or q, k, v for scope `core`.

Values are signed, spread as the regime says, and exact in the case's dtype, so the golden and the
subject start from the same numbers. Uniform positive inputs are not among the regimes: they hide
most defects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.draws import (
    QUERY_SCALE,
    Source,
    draw_hidden,
    draw_keys_values,
    draw_sinks,
    draw_weights,
    source_of,
)
from conformance.extra_inputs import draw_input_norm, draw_lora, rotary_positions
from golden import Array, AttentionWeights, Lora


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerInputs:
    """Inputs of a layer, float64, exact in the case's dtype.

    Attributes:
        weights: the layer's arrays.
        hidden_states: `(batch, q_len, hidden_size)`, twice as wide for an EAGLE-3 draft.
        position_ids: `(batch, q_len)`, int64, -1 for padding.
        k_cache: `(batch, num_key_value_heads, max_length, head_dim)`, BHSD; None in cte. Slots
            that hold no token yet are filled with other tokens' values.
        v_cache: like `k_cache`.
        cache_lengths: `(batch,)`, int64, tokens the cache holds; None in cte.
        lora: adapters, and which of them each row uses; None without.
        input_norm: `(input_size,)`, weight of the input's norm; None without.
        residual: added to the hidden states before that norm, shaped like them; None without.
        rotary_position_ids: `(axes, batch, q_len)`, int64, positions for M-RoPE; None without.
    """

    weights: AttentionWeights
    hidden_states: Array
    position_ids: NDArray[np.int64]
    k_cache: Array | None = None
    v_cache: Array | None = None
    cache_lengths: NDArray[np.int64] | None = None
    lora: Lora | None = None
    input_norm: Array | None = None
    residual: Array | None = None
    rotary_position_ids: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CoreInputs:
    """Inputs of the attention core, float64, exact in the case's dtype, BHSD.

    Attributes:
        q: `(batch, num_attention_heads, q_len, head_dim)`.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: like `k`.
        q_positions: `(batch, q_len)`, int64, -1 for padding.
        kv_positions: `(batch, kv_len)`, int64, -1 for padding.
        sinks: `(num_attention_heads,)`, None without sinks.
    """

    q: Array
    k: Array
    v: Array
    q_positions: NDArray[np.int64]
    kv_positions: NDArray[np.int64]
    sinks: Array | None


def draw_layer(case: Case) -> LayerInputs:
    """Draw the inputs of a case of scope `layer`."""
    source, config, work = source_of(case), case.config, case.workload
    weights = draw_weights(source, config, _visible_keys(case))
    hidden = draw_hidden(source, work.batch, work.q_len, config)
    lengths = np.array(work.lengths, dtype=np.int64)
    steps = np.arange(work.q_len, dtype=np.int64)
    if work.phase == "cte":
        positions = np.where(steps < lengths[:, None], steps + work.start, -1)
        inputs = LayerInputs(weights=weights, hidden_states=hidden, position_ids=positions)
        return _with_extras(source, case, inputs)
    k, v = draw_keys_values(source, config, work.batch, int(lengths.max()) + work.steps)
    inputs = LayerInputs(
        weights=weights,
        hidden_states=hidden,
        position_ids=lengths[:, None] + steps,
        k_cache=k,
        v_cache=v,
        cache_lengths=lengths,
    )
    return _with_extras(source, case, inputs)


def _with_extras(source: Source, case: Case, inputs: LayerInputs) -> LayerInputs:
    batch, q_len = inputs.position_ids.shape
    rope, rotary = case.config.rope, None
    if rope is not None and rope.mrope_section:
        rotary = rotary_positions(rope, inputs.position_ids)
    return replace(
        inputs,
        lora=draw_lora(source, case, np.arange(batch)),
        input_norm=draw_input_norm(source, case),
        residual=(draw_hidden(source, batch, q_len, case.config) if case.extras.residual else None),
        rotary_position_ids=rotary,
    )


def draw_core(case: Case) -> CoreInputs:
    """Draw the inputs of a case of scope `core`."""
    source, config, work = source_of(case), case.config, case.workload
    if work.phase == "cte":
        kv_lengths = np.array(work.lengths) + work.prior
        first = work.start + work.prior
    else:
        kv_lengths = np.array(work.lengths) + work.steps
        first = 0
    kv_len = int(kv_lengths.max())
    k, v = draw_keys_values(source, config, work.batch, kv_len)
    shape = (work.batch, config.num_attention_heads, work.q_len, config.head_dim)
    q = source.normal(*shape, scale=QUERY_SCALE.get(case.regime, 1.0))
    slots = np.arange(kv_len, dtype=np.int64)
    kv_positions = np.where(slots < kv_lengths[:, None], slots + work.start, -1)
    steps = np.arange(work.q_len, dtype=np.int64)
    lengths = np.array(work.lengths, dtype=np.int64)[:, None]
    q_positions = (
        np.where(steps < lengths, steps + first, -1) if work.phase == "cte" else lengths + steps
    )
    sinks = None
    if config.learned_sinks_size is not None:
        sinks = draw_sinks(source, config, _visible_keys(case))
    return CoreInputs(
        q=q, k=k, v=v, q_positions=q_positions, kv_positions=kv_positions, sinks=sinks
    )


def _visible_keys(case: Case) -> int:
    """Return about how many keys a late row sees."""
    work, config = case.workload, case.config
    limits = [config.sliding_window, config.attention_chunk_size]
    keys = max(work.lengths) + work.prior + work.steps
    return min([keys, *(limit for limit in limits if limit is not None)])
