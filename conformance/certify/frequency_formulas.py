"""Frequencies of the rotary position embedding in tracked arithmetic, with every scaling."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from conformance.certify.arithmetic import Arithmetic
from conformance.certify.tracked import Tracked, tracked, two_pi
from golden import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from golden.rope_config import DynamicNTKScaling, LongRopeScaling, ProportionalScaling


def scaled_frequencies(
    rope: RopeConfig, rotary_dim: int, length: int, arithmetic: Arithmetic
) -> Tracked:
    """Return radians per position of each channel pair.

    Args:
        rope: which embedding.
        rotary_dim: channels that rotate.
        length: of the sequence, for the scalings that read it.
        arithmetic: what to compute in.

    Returns:
        `(rotary_dim / 2,)`.

    Source: arXiv 2104.09864; scalings: arXiv 2306.15595 (linear), Llama 3.1's model code, arXiv
    2309.00071 (YaRN, dynamic NTK), arXiv 2402.13753 (LongRoPE), Gemma 4's model code.
    """

    def number(value: float) -> Tracked:
        return tracked(value, arithmetic)

    one, scaling = number(1.0), rope.scaling
    base = number(rope.theta)
    if isinstance(scaling, DynamicNTKScaling):
        original = scaling.original_max_position_embeddings
        reach = max(scaling.seq_len or length, original)
        growth = number(scaling.factor) * number(reach) / number(original)
        growth = growth - (number(scaling.factor) - one)
        base = base * (number(rotary_dim) / number(rotary_dim - 2)).power_of(growth)
    pairs = tracked(np.arange(0, rotary_dim, 2), arithmetic)
    plain = one / (pairs / number(rotary_dim)).power_of(base)
    if scaling is None or isinstance(scaling, DynamicNTKScaling):
        return plain
    if isinstance(scaling, LongRopeScaling):
        beyond = (scaling.seq_len or length) > scaling.original_max_position_embeddings
        return plain / tracked(scaling.long_factor if beyond else scaling.short_factor, arithmetic)
    slowed = plain / number(scaling.factor)
    if isinstance(scaling, LinearScaling):
        return slowed
    if isinstance(scaling, ProportionalScaling):
        turning = math.floor(Fraction(scaling.proportion) * (rotary_dim // 2))
        return slowed.where(np.arange(rotary_dim // 2) < turning)
    if isinstance(scaling, Llama3Scaling):
        # (original / wavelength - low) / (high - low), wavelength = 2 pi / frequency
        turns = number(scaling.original_max_position_embeddings) * plain / two_pi(arithmetic)
        span = number(scaling.high_freq_factor) - number(scaling.low_freq_factor)
        kept = ((turns - number(scaling.low_freq_factor)) / span).clip(0.0, 1.0)
        return (one - kept) * plain / number(scaling.factor) + kept * plain
    low, high = _yarn_ends(scaling, rope.theta, rotary_dim, arithmetic)
    channels = tracked(np.arange(rotary_dim // 2), arithmetic)
    ramp = ((channels - low) / (high - low)).clip(0.0, 1.0)
    return slowed * ramp + plain * (one - ramp)


def _yarn_ends(
    scaling: YarnScaling, theta: float, rotary_dim: int, arithmetic: Arithmetic
) -> tuple[Tracked, Tracked]:
    """Return the channels between which YaRN's ramp runs (Peng et al. 2023, section 3.2).

    Rounding to whole channels is a jump, so a case whose end lies nearer to a whole number than
    its error is no case for a bound, and refused.
    """

    def number(value: float) -> Tracked:
        return tracked(value, arithmetic)

    def channel(turns: float) -> Tracked:
        context = number(scaling.original_max_position_embeddings)
        rounds = (context / (number(turns) * two_pi(arithmetic))).log()
        return number(rotary_dim) * rounds / (number(2.0) * number(theta).log())

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        for end in (low, high):
            distance = abs(float(end.exact) - round(float(end.exact)))
            assert distance > float(end.error), "an end of the ramp may round either way"
        low = number(math.floor(float(low.exact)))
        high = number(math.ceil(float(high.exact)))
    low, high = low.clip(0.0, math.inf), high.clip(-math.inf, rotary_dim - 1.0)
    assert float(low.exact) < float(high.exact), "an empty ramp is no case for a bound"
    return low, high


def cos_sin_factor(rope: RopeConfig, arithmetic: Arithmetic) -> Tracked:
    """Return the factor on cosine and sine.

    YaRN: `0.1 log(factor) + 1` (arXiv 2309.00071, equation 22). LongRoPE:
    `sqrt(1 + log(factor) / log(original_max))` (arXiv 2402.13753). A given factor is exact.
    """
    one, scaling = tracked(1.0, arithmetic), rope.scaling
    if not isinstance(scaling, (YarnScaling, LongRopeScaling)):
        return one
    if scaling.attention_factor:
        return tracked(scaling.attention_factor, arithmetic)
    if scaling.factor <= 1:
        return one
    log_factor = tracked(scaling.factor, arithmetic).log()
    if isinstance(scaling, YarnScaling):
        return one / tracked(10.0, arithmetic) * log_factor + one
    original = tracked(scaling.original_max_position_embeddings, arithmetic)
    return (one + log_factor / original.log()).root()
