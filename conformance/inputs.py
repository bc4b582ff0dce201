"""Seeded inputs of a case: weights, hidden states, caches; or q, k, v for scope `core`.

Values are signed, spread as the regime says, and exact in the case's dtype, so the golden and the
subject start from the same numbers. Uniform positive inputs are not among the regimes: they hide
most defects.

* `gaussian`: queries, keys and values of unit variance.
* `peaked`: queries four times as large, so that few keys take most of the weight.
* `outlier`: one channel of each key head, and of the hidden states, eight times as large.
* `large`: queries and keys six times as large, so that logits reach a hundred and more.
* `integers`: sparse small integers, whose products and sums are exact.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from golden import (
    FORMATS,
    Array,
    AttentionConfig,
    AttentionWeights,
    Lora,
    RopeConfig,
    make_lora,
    make_weights,
    weight_shapes,
)

_QUERY_SCALE = {"peaked": 4.0, "large": 6.0}
_KEY_SCALE = {"large": 6.0}
_OUTLIER = 8.0


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


@dataclass(slots=True)
class Source:
    """Draws arrays of one case: a generator, the regime and the dtype to be exact in."""

    rng: np.random.Generator
    regime: str
    dtype: str

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Draw values of this standard deviation, exact in the dtype."""
        if self.regime == "integers":
            values = self.rng.integers(-2, 3, size=shape).astype(np.float64)
            values *= self.rng.random(shape) < 0.4
            # a power of two near the wanted scale keeps every value and product exact
            return values * 2.0 ** round(math.log2(scale))
        return self.exact(self.rng.standard_normal(shape) * scale)

    def exact(self, values: Array) -> Array:
        """Round values to the dtype."""
        return FORMATS[self.dtype].nearest(values)


def source_of(case: Case) -> Source:
    """Return the source of a case's arrays."""
    stream = zlib.crc32(case.id.encode())  # a case keeps its inputs whatever else is run
    return Source(np.random.default_rng([case.seed, stream]), case.regime, case.dtype)


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


def draw_hidden(source: Source, batch: int, tokens: int, config: AttentionConfig) -> Array:
    """Draw what a layer reads, `(batch, tokens, input_size)`."""
    hidden = source.normal(batch, tokens, config.input_size)
    if source.regime == "outlier":
        hidden[..., 0] *= _OUTLIER
    return hidden


def draw_input_norm(source: Source, case: Case) -> Array | None:
    """Draw the weight of the input's norm, about 1; None without one."""
    if not case.extras.input_norm:
        return None
    return source.exact(1.0 + source.normal(case.config.input_size, scale=0.25))


def draw_lora(source: Source, case: Case, rows: NDArray[np.int64]) -> Lora | None:
    """Draw adapters whose terms are as large as the products they are added to.

    Args:
        source: of the draw.
        case: gives their number and rank.
        rows: `(batch,)`, sequence of each row: sequence `s` uses adapter `s`, every
            `adapters + 1`-th none.
    """
    extras, config = case.extras, case.config
    if not extras.adapters:
        return None
    shapes = weight_shapes(config)
    scales = _projection_scales(source.regime, config)
    down, up = {}, {}
    for target in "qkvo":
        out, width = shapes[f"{target}_proj"]
        # a rank-wide sum of the two has the spread of one product with the projection
        down[target] = source.normal(extras.adapters, extras.rank, width, scale=width**-0.5)
        reach = scales[f"{target}_proj"] * math.sqrt(width / extras.rank)
        up[target] = source.normal(extras.adapters, out, extras.rank, scale=reach)
    factors = 2.0 ** -np.arange(extras.adapters, dtype=np.float64)
    return make_lora(
        config,
        adapter_ids=adapter_ids(extras.adapters, rows),
        down=down,
        up=up,
        scaling=dict.fromkeys("qkvo", factors),
    )


def adapter_ids(adapters: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the adapter of each sequence, -1 for none and for idle rows."""
    cycle = rows % (adapters + 1)
    return np.where((rows >= 0) & (cycle < adapters), cycle, -1)


_TEXT, _HEIGHT, _WIDTH = 5, 3, 4
"""What M-RoPE's positions follow, over and over: some words, then a picture of that size."""


def rotary_positions(rope: RopeConfig, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of tokens on each axis of M-RoPE.

    Words stand at one position on all axes, one after the other. A picture's tokens share their
    time; row and column count from it. Words after it go on behind its largest position.

    Args:
        rope: gives the number of axes: time, height, width.
        positions: `(batch, q_len)`, int64, -1 for padding.

    Returns:
        `(axes, batch, q_len)`, int64; 0 for padding.
    """
    tokens = _TEXT + _HEIGHT * _WIDTH
    reach = _TEXT + max(_HEIGHT, _WIDTH)
    block, place = np.maximum(positions, 0) // tokens, np.maximum(positions, 0) % tokens
    pixel = place - _TEXT
    picture = pixel >= 0
    base = block * reach + np.where(picture, _TEXT, place)
    offsets = [np.zeros_like(pixel), pixel // _WIDTH, pixel % _WIDTH]
    axes = [
        base + np.where(picture, offsets[axis % 3], 0) for axis in range(len(rope.mrope_section))
    ]
    return np.where(positions >= 0, np.stack(axes), 0)


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
    q = source.normal(*shape, scale=_QUERY_SCALE.get(case.regime, 1.0))
    slots = np.arange(kv_len, dtype=np.int64)
    kv_positions = np.where(slots < kv_lengths[:, None], slots + work.start, -1)
    steps = np.arange(work.q_len, dtype=np.int64)
    lengths = np.array(work.lengths, dtype=np.int64)[:, None]
    q_positions = (
        np.where(steps < lengths, steps + first, -1) if work.phase == "cte" else lengths + steps
    )
    sinks = None
    if config.learned_sinks_size is not None:
        sinks = _draw_sinks(source, config, _visible_keys(case))
    return CoreInputs(
        q=q, k=k, v=v, q_positions=q_positions, kv_positions=kv_positions, sinks=sinks
    )


def _visible_keys(case: Case) -> int:
    """Return about how many keys a late row sees."""
    work, config = case.workload, case.config
    limits = [config.sliding_window, config.attention_chunk_size]
    keys = max(work.lengths) + work.prior + work.steps
    return min([keys, *(limit for limit in limits if limit is not None)])


def draw_keys_values(
    source: Source, config: AttentionConfig, batch: int, kv_len: int
) -> tuple[Array, Array]:
    """Draw keys and values, each `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD."""
    shape = (batch, config.num_key_value_heads, kv_len, config.head_dim)
    k = source.normal(*shape, scale=_KEY_SCALE.get(source.regime, 1.0))
    if source.regime == "outlier":
        k[..., 0] *= _OUTLIER
    return k, source.normal(*shape)


def _projection_scales(regime: str, config: AttentionConfig) -> dict[str, float]:
    """Return the standard deviation of projections and biases, by field name."""
    query, key = _QUERY_SCALE.get(regime, 1.0), _KEY_SCALE.get(regime, 1.0)
    hidden, wide = config.input_size**-0.5, config.q_size**-0.5
    return {
        "q_proj": hidden * query,
        "k_proj": hidden * key,
        "v_proj": hidden,
        "o_proj": wide,
        "q_bias": query,
        "k_bias": key,
        "v_bias": 1.0,
        "o_bias": 1.0,
        "q_norm_bias": 0.25,
        "k_norm_bias": 0.25,
    }


def draw_weights(source: Source, config: AttentionConfig, visible_keys: int) -> AttentionWeights:
    """Draw projections that give queries, keys and values of unit variance, and the rest to fit.

    Args:
        source: of the draw.
        config: the layer.
        visible_keys: about how many keys a late row sees.
    """
    regime = source.regime
    query, key = _QUERY_SCALE.get(regime, 1.0), _KEY_SCALE.get(regime, 1.0)
    scales = _projection_scales(regime, config)
    arrays: dict[str, Array] = {}
    for name, shape in weight_shapes(config).items():
        if name == "sinks":
            arrays[name] = _draw_sinks(source, config, visible_keys)
        elif name in ("q_norm", "k_norm"):
            size = query if name == "q_norm" else key
            offset = config.qk_norm.weight_offset if config.qk_norm is not None else 0.0
            arrays[name] = source.exact(size - offset + source.normal(*shape, scale=0.25 * size))
        else:
            arrays[name] = source.normal(*shape, scale=scales[name])
    if regime == "outlier":
        arrays["k_proj"][:: config.head_dim] *= _OUTLIER
    return make_weights(config, **arrays)


def _draw_sinks(source: Source, config: AttentionConfig, visible_keys: int) -> Array:
    """Draw sink logits near the log of a quarter of the visible keys: a share worth losing."""
    centre = math.log(max(visible_keys, 4) / 4)
    return source.exact(centre + source.normal(config.num_attention_heads))
