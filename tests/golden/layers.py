"""Inputs, second derivations and roundoff bounds that the tests of golden share."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    Capture,
    Mask,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    make_weights,
    weight_shapes,
)
from golden.attention import visible_keys

U = 2.0**-53
"""Unit roundoff of float64."""

ELEMENTWISE = 32
"""Roundings that norm, RoPE and temperature add to a query or key, more than enough."""

EVERYTHING = AttentionConfig(
    hidden_size=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    qkv_bias=True,
    o_bias=True,
    clip_qkv=1.1,
    qk_norm=QKNorm(kind="layer"),
    rope=RopeConfig(),
    softcap=2.0,
    sliding_window=3,
    learned_sinks_size=1,
    temperature_tuning=TemperatureTuning(floor_scale=2.0, attn_scale=0.5),
)
"""A layer whose every step has a gradient of its own."""

sampled = settings(deadline=None, max_examples=40, derandomize=True)

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


def gamma(roundings: float) -> float:
    """Return `n u / (1 - n u)`: the relative error of `n` roundings (Higham 2002, lemma 3.1)."""
    return roundings * U / (1.0 - roundings * U)


def normal(seed: int, *shape: int, size: float = 1.0) -> Array:
    """Return signed normal numbers of the given shape and standard deviation."""
    return size * np.random.default_rng(seed).standard_normal(shape)


def small_integers(seed: int, *shape: int, largest: int = 2) -> Array:
    """Return integers of both signs as float64, so that sums of products are exact."""
    drawn = np.random.default_rng(seed).integers(-largest, largest, shape, endpoint=True)
    return drawn.astype(np.float64)


def identical(left: Array, right: Array) -> bool:
    """Return whether two arrays hold the same bits."""
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def assert_within(got: Array, want: Array, bound: Array | float) -> None:
    """Assert `|got - want| <= bound` everywhere; NaN on either side fails."""
    assert got.shape == want.shape
    limit = np.broadcast_to(bound, got.shape)
    with np.errstate(invalid="ignore"):  # equal infinities differ by NaN
        error = np.abs(got - want)
    wrong = ~((error <= limit) | (got == want))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"out{list(at)}: got {got[at]!r}, want {want[at]!r}, error {error[at]!r} "
            f"exceeds bound {limit[at]!r}; {int(wrong.sum())} of {got.size} elements"
        )


def seen(mask: Mask, q_positions: Any, kv_positions: Any, shape: tuple[int, ...]) -> BoolArray:
    """Return the visible keys as `(batch, num_attention_heads, q_len, kv_len)`."""
    batch, _, q_len, kv_len = shape
    q_rows = np.broadcast_to(np.asarray(q_positions, dtype=np.int64), (batch, q_len))
    kv_rows = np.broadcast_to(np.asarray(kv_positions, dtype=np.int64), (batch, kv_len))
    return np.broadcast_to(visible_keys(mask, q_rows, kv_rows), shape)


def attend_by_hand(
    q: Array,
    k: Array,
    v: Array,
    visible: BoolArray,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Attention as its formula reads: one row at a time, no shift, no repeated heads.

    Args:
        q: `(batch, num_attention_heads, q_len, head_dim)`.
        k: `(batch, num_key_value_heads, kv_len, head_dim)`.
        v: `(batch, num_key_value_heads, kv_len, value_dim)`.
        visible: `(batch, num_attention_heads, q_len, kv_len)`, True = attend.
        scale: factor on the dot products.
        softcap: cap of the scaled scores.
        sinks: one logit per query head.

    Returns:
        Output like `q` with `value_dim` channels, and the log-sum-exp of each row.
    """
    batch, heads, q_len, _ = q.shape
    output = np.zeros((batch, heads, q_len, v.shape[3]))
    logsumexp = np.full((batch, heads, q_len), -np.inf)
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        source = h * k.shape[1] // heads
        exps = {}
        for j in range(k.shape[2]):
            if visible[b, h, i, j]:
                pairs = zip(q[b, h, i].tolist(), k[b, source, j].tolist(), strict=True)
                score = scale * math.fsum(x * y for x, y in pairs)
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                exps[j] = math.exp(score)
        total = math.fsum(exps.values()) + (0.0 if sinks is None else math.exp(sinks[h]))
        if total > 0:
            logsumexp[b, h, i] = math.log(total)
        for c in range(v.shape[3]):
            mixed = math.fsum(e * float(v[b, source, j, c]) for j, e in exps.items())
            output[b, h, i, c] = mixed / total if exps else 0.0
    return output, logsumexp


@dataclass(frozen=True)
class Bounds:
    """How far two float64 evaluations of the same attention may lie apart.

    Attributes:
        output: `(batch, num_attention_heads, q_len, value_dim)`.
        logsumexp: `(batch, num_attention_heads, q_len)`.
    """

    output: Array
    logsumexp: Array


def exponent_errors(
    q: Array,
    k: Array,
    visible: BoolArray,
    scale: float,
    sinks: Array | None,
    roundings: int = 0,
) -> tuple[Array, Array]:
    """Return `delta` of `attend_bound`, and the largest score or sink that bounds it, by row."""
    source = np.arange(q.shape[1]) * k.shape[1] // q.shape[1]
    q_norm, k_norm = np.linalg.norm(q, axis=-1), np.linalg.norm(k, axis=-1)[:, source]
    largest = scale * q_norm * np.where(visible, k_norm[:, :, None], 0.0).max(axis=-1, initial=0.0)
    if sinks is not None:
        largest = largest + np.abs(sinks)[:, None]
    return gamma(q.shape[3] + 16 + 2 * roundings) * largest + gamma(4), largest


def attend_bound(
    q: Array,
    k: Array,
    v: Array,
    visible: BoolArray,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
    roundings: int = 0,
) -> Bounds:
    """Bound the difference of two float64 evaluations of attention, in any order of summation.

    A dot product of `d` terms errs by at most `gamma(d) sum |q k| <= gamma(d) |q| |k|` (Cauchy and
    Schwarz); scale, cap, shift and the shift's subtraction add a few roundings of numbers no larger
    than the row's largest `scale |q| |k|` or sink, `exp` two of its own. So each exponential errs
    by a factor within `exp(+-delta)`, a weight within `exp(+-2 delta)`, and summing, dividing and
    mixing `n` keys add `gamma(2 n + 8)`. Twice that separates two evaluations.

    Args:
        q: queries, BHSD.
        k: keys, BHSD.
        v: values, BHSD.
        visible: `(batch, num_attention_heads, q_len, kv_len)`.
        scale: factor on the dot products.
        softcap: cap of the scaled scores; its slope of at most 1 passes errors on.
        sinks: one logit per query head.
        roundings: roundings that queries and keys themselves carry, relative to their norms.
    """
    heads, kv_len = q.shape[1], k.shape[2]
    source = np.arange(heads) * k.shape[1] // heads
    delta, largest = exponent_errors(q, k, visible, scale, sinks, roundings)
    scores = scale * q @ k[:, source].swapaxes(-1, -2)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores, -np.inf)
    top = np.where(visible.any(axis=-1), scores.max(axis=-1, initial=-np.inf), 0.0)[..., None]
    exps = np.exp(scores - top)
    total = np.maximum(exps.sum(axis=-1, keepdims=True), 1.0)
    size = (exps / total) @ np.abs(v[:, source])  # a sink only shrinks this
    if v.size:
        size = np.maximum(size, np.abs(v).max() * 2.0**-1000)  # weights that underflow
    relative = np.expm1(2.0 * delta + gamma(2 * kv_len + 8))
    return Bounds(
        output=2.0 * relative[..., None] * size,
        logsumexp=2.0 * (delta + gamma(kv_len + 8) * (1.0 + largest + math.log(kv_len + 2))),
    )


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of one attention, BHSD."""

    q: Array
    k: Array
    v: Array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, num_attention_heads, q_len, kv_len)`."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def scale(self) -> float:
        """The default factor on the dot products."""
        width: int = self.q.shape[3]
        return 1.0 / math.sqrt(width)


def problem(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    q_len: int = 5,
    kv_len: int = 5,
    head_dim: int = 4,
    size: float = 1.0,
) -> Problem:
    """Return normal queries, keys and values; values have `head_dim` channels."""
    return Problem(
        normal(seed, batch, kv_heads * group, q_len, head_dim, size=size),
        normal(seed + 1, batch, kv_heads, kv_len, head_dim, size=size),
        normal(seed + 2, batch, kv_heads, kv_len, head_dim, size=size),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw small problems of every head geometry; `q_len` and `kv_len` are independent."""
    return problem(
        draw(st.integers(0, 2**32)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 7])),
        q_len=draw(st.integers(1, 4)),
        kv_len=draw(st.integers(1, 7)),
        head_dim=draw(st.integers(1, 6)),
        size=draw(st.sampled_from([0.1, 1.0, 3.0])),
    )


@st.composite
def visibilities(draw: st.DrawFn, of: Problem) -> BoolArray:
    """Draw which keys each row sees, empty rows included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.2, 0.6, 1.0]))
    return rng.random(of.shape) < density


LAYERS: dict[str, AttentionConfig] = {
    "mha": AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope=RopeConfig(),
        softmax_scale=2.0**-5,
    ),
    "gqa-bias-rms": AttentionConfig(
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        qkv_bias=True,
        o_bias=True,
        qk_norm=QKNorm(weight_offset=1.0),
        rope=RopeConfig(pairing="interleaved"),
    ),
    "window-sinks": AttentionConfig(
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=4,
        rope=RopeConfig(rotary_dim=2),
        softmax_scale=2.0**-5,
        sliding_window=3,
        learned_sinks_size=1,
    ),
    "chunk-post-norm": AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        qk_norm=QKNorm(placement="post_rope", weighted=False),
        rope=RopeConfig(),
        attention_chunk_size=3,
    ),
    "nope-temperature-clip-cap": AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        clip_qkv=3.0,
        softmax_scale=0.125,
        softcap=5.0,
        temperature_tuning=TemperatureTuning(floor_scale=2.0, attn_scale=0.5),
    ),
    "layer-norm-projection": AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        o_bias=True,
        qk_norm=QKNorm(kind="layer", scope="projection"),
        rope=RopeConfig(),
        softmax_scale=0.25,
    ),
}
"""Small layers that between them use every field of the configuration.

Scales are small since the projections of small integers are not: scores of a few units leave
weights that a mask, a sink or a defect moves visibly.
"""


def integer_weights(config: AttentionConfig, seed: int = 0) -> AttentionWeights:
    """Return weights of small integers: with integer inputs, projections are exact."""
    shapes = weight_shapes(config)
    return make_weights(
        config,
        **{
            name: small_integers(seed + index, *shapes[name])
            for index, name in enumerate(sorted(shapes))
        },
    )


def final_queries(config: AttentionConfig, values: dict[str, Array]) -> Array:
    """Return the queries that attention reads, BHSD, from a capture of every stage."""
    if config.temperature_tuning is not None:
        return values["q_temperature"]
    if config.qk_norm is not None and config.qk_norm.placement == "post_rope":
        return values["q_norm"]
    return values["q_rope"]


def layer_bound(
    config: AttentionConfig,
    weights: AttentionWeights,
    capture: Capture,
    visible: BoolArray,
    *,
    last_position: int = 16,
) -> Array:
    """Bound the difference of two evaluations of a layer whose projections are exact.

    The attention's bound, with the roundings of norm and RoPE on top, goes through the output
    projection, which adds `gamma(width + 1)` of its own terms. A frequency may err by
    `(log theta + 4) u` of itself, so an angle errs by as much times the position; frequencies of
    1 are exact and the layers' others are at most 0.01.

    Args:
        config: the layer.
        weights: its arrays, small integers.
        capture: every stage of a context encoding of the whole sequence.
        visible: `(batch, num_attention_heads, q_len, kv_len)`.
        last_position: largest position.

    Returns:
        `(batch, q_len, hidden_size)`.
    """
    inner = attend_bound(
        final_queries(config, capture.values),
        capture.values["k_cache"],
        capture.values["v_cache"],
        visible,
        scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=weights.sinks,
        roundings=ELEMENTWISE + last_position,
    ).output
    own = 2.0 * gamma(config.q_size + 1)
    errors = inner + own * (np.abs(capture.values["attn"]) + inner)
    flat = errors.swapaxes(1, 2).reshape(errors.shape[0], errors.shape[2], config.q_size)
    bound: Array = flat @ np.abs(weights.o_proj).T
    if weights.o_bias is not None:
        bound = bound + own * np.abs(weights.o_bias)
    return bound
