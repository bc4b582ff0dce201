"""Draws the arrays of a case by its regime: weights, hidden states, keys and values.

* `gaussian`: queries, keys and values of unit variance.
* `peaked`: queries four times as large, so that few keys take most of the weight.
* `outlier`: one channel of each key head, and of the hidden states, eight times as large.
* `large`: queries and keys six times as large, so that logits reach a hundred and more.
* `integers`: sparse small integers, whose products and sums are exact.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from conformance.cases import Case
from golden import FORMATS, Array, AttentionConfig, AttentionWeights, make_weights, weight_shapes

QUERY_SCALE = {"peaked": 4.0, "large": 6.0}
"""Standard deviation of queries by regime, where it is not 1."""
_KEY_SCALE = {"large": 6.0}
_OUTLIER = 8.0


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


def draw_hidden(source: Source, batch: int, tokens: int, config: AttentionConfig) -> Array:
    """Draw what a layer reads, `(batch, tokens, input_size)`."""
    hidden = source.normal(batch, tokens, config.input_size)
    if source.regime == "outlier":
        hidden[..., 0] *= _OUTLIER
    return hidden


def draw_keys_values(
    source: Source, config: AttentionConfig, batch: int, kv_len: int
) -> tuple[Array, Array]:
    """Draw keys and values, each `(batch, num_key_value_heads, kv_len, head_dim)`, BHSD."""
    shape = (batch, config.num_key_value_heads, kv_len, config.head_dim)
    k = source.normal(*shape, scale=_KEY_SCALE.get(source.regime, 1.0))
    if source.regime == "outlier":
        k[..., 0] *= _OUTLIER
    return k, source.normal(*shape)


def projection_scales(regime: str, config: AttentionConfig) -> dict[str, float]:
    """Return the standard deviation of projections and biases, by field name."""
    query, key = QUERY_SCALE.get(regime, 1.0), _KEY_SCALE.get(regime, 1.0)
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
    query, key = QUERY_SCALE.get(regime, 1.0), _KEY_SCALE.get(regime, 1.0)
    scales = projection_scales(regime, config)
    arrays: dict[str, Array] = {}
    for name, shape in weight_shapes(config).items():
        if name == "sinks":
            arrays[name] = draw_sinks(source, config, visible_keys)
        elif name in ("q_norm", "k_norm"):
            size = query if name == "q_norm" else key
            offset = config.qk_norm.weight_offset if config.qk_norm is not None else 0.0
            arrays[name] = source.exact(size - offset + source.normal(*shape, scale=0.25 * size))
        else:
            arrays[name] = source.normal(*shape, scale=scales[name])
    if regime == "outlier":
        arrays["k_proj"][:: config.head_dim] *= _OUTLIER
    return make_weights(config, **arrays)


def draw_sinks(source: Source, config: AttentionConfig, visible_keys: int) -> Array:
    """Draw sink logits near the log of a quarter of the visible keys: a share worth losing."""
    centre = math.log(max(visible_keys, 4) / 4)
    return source.exact(centre + source.normal(config.num_attention_heads))
