"""Formulas that change rotary frequencies for long contexts: llama3, yarn, longrope, proportional.

Everything here is Python floats, that is float64, computed once when a layer is built. Parameters
have Hugging Face's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from impl.errors import ConfigError, explain


def number(given: Mapping[str, Any], name: str, kind: str) -> float:
    """Return a parameter that a kind of RoPE cannot do without.

    Raises:
        ConfigError: it is missing.
    """
    value = given.get(name)
    if value is None:
        raise ConfigError(explain(f"rope_parameters[{name!r}]", f"be given for {kind} RoPE", None))
    return float(value)


def original_length(
    given: Mapping[str, Any], kind: str, max_position_embeddings: int | None = None
) -> float:
    """Return the context length the model was trained at.

    Args:
        given: `rope_parameters`.
        kind: its rope type.
        max_position_embeddings: taken where `original_max_position_embeddings` is missing.

    Raises:
        ConfigError: neither is given, or the length does not exceed 1.
    """
    name = "original_max_position_embeddings"
    if given.get(name) is None and max_position_embeddings is not None:
        return float(max_position_embeddings)
    length = number(given, name, kind)
    if not length > 1:
        raise ConfigError(explain(f"rope_parameters[{name!r}]", "exceed 1", length))
    return length


def extension(
    given: Mapping[str, Any], kind: str, original: float, max_position_embeddings: int | None
) -> float:
    """Return `factor`: how many times longer than `original` the context is."""
    if given.get("factor") is None and max_position_embeddings is not None:
        return max_position_embeddings / original
    return number(given, "factor", kind)


def llama3(plain: Sequence[float], given: Mapping[str, Any]) -> list[float]:
    """Keep short wavelengths, divide long ones by `factor`, blend in between; equal ends cut."""
    factor = number(given, "factor", "llama3")
    low = number(given, "low_freq_factor", "llama3")
    high = number(given, "high_freq_factor", "llama3")
    original = original_length(given, "llama3")
    if high < low:
        raise ConfigError(
            explain("high_freq_factor", "be at least low_freq_factor", f"{high} and {low}")
        )
    scaled = []
    for frequency in plain:
        turns = original * frequency / (2 * math.pi)
        kept = float(turns >= low)
        if high > low:
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - kept) * frequency / factor + kept * frequency)
    return scaled


def yarn(
    plain: Sequence[float],
    base: float,
    given: Mapping[str, Any],
    max_position_embeddings: int | None,
) -> tuple[list[float], float]:
    """Keep fast channels, divide slow ones by `factor`, ramp between, and scale cos and sin."""
    original = original_length(given, "yarn")
    factor = extension(given, "yarn", original, max_position_embeddings)
    half, dim = len(plain), 2 * len(plain)

    def channel_turning(times: float) -> float:
        """Channel that turns this many times over the original context."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    first = channel_turning(float(given.get("beta_fast") or 32))
    last = channel_turning(float(given.get("beta_slow") or 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # As Hugging Face: a ramp of no width would divide by zero.

    scaled = []
    for i in range(half):
        interpolated = min(max((i - first) / (last - first), 0.0), 1.0)
        scaled.append(plain[i] / factor * interpolated + plain[i] * (1 - interpolated))
    return scaled, _yarn_attention_scaling(factor, given)


def _yarn_attention_scaling(factor: float, given: Mapping[str, Any]) -> float:
    """`attention_factor` if given, else the ratio of the two mscales, else `0.1 ln(factor) + 1`."""
    explicit = given.get("attention_factor")
    if explicit is not None:
        return float(explicit)
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, float(mscale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's concentration, `0.1 * mscale * ln(factor) + 1`; 1 for a factor up to 1.

    DeepSeek's layers divide their scores' divisor (`softmax_scale` of this module) by
    `yarn_mscale(factor, mscale_all_dim) ** 2`.

    Args:
        factor: how many times longer than the original the context is.
        mscale: weight of the logarithm.

    Source: Peng et al. (2023), YaRN, arXiv 2309.00071, equation 22.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(
    plain: Sequence[float], given: Mapping[str, Any], max_position_embeddings: int | None
) -> tuple[list[float], list[float], float]:
    """Divide each frequency by its own number, from one list for short and one for long rows.

    Args:
        plain: frequencies by channel pair.
        given: `short_factor`, `long_factor`, `original_max_position_embeddings`, and `factor` or
            `attention_factor`.
        max_position_embeddings: lets an absent `factor` be derived.

    Returns:
        Frequencies of rows up to the original length, those of longer rows, and the factor on cos
        and sin, `sqrt(1 + ln(factor) / ln(original))` unless given.

    Raises:
        ConfigError: a parameter is missing, or a list is not positive numbers, one per pair.

    Source: Ding et al. (2024), LongRoPE, arXiv 2402.13753; Phi-3's model code for the factor.
    """
    lists = []
    for name in ("short_factor", "long_factor"):
        divisors = [float(x) for x in given.get(name) or ()]
        if len(divisors) != len(plain) or not all(d > 0 for d in divisors):
            raise ConfigError(
                explain(
                    f"rope_parameters[{name!r}]",
                    f"hold {len(plain)} positive numbers, one per rotated channel pair",
                    given.get(name),
                )
            )
        lists.append([f / d for f, d in zip(plain, divisors, strict=True)])
    original = original_length(given, "longrope")
    scaling = given.get("attention_factor")
    if scaling is None:
        factor = extension(given, "longrope", original, max_position_embeddings)
        scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return lists[0], lists[1], float(scaling)


def proportional(plain: Sequence[float], given: Mapping[str, Any]) -> list[float]:
    """Stop the slow pairs beyond the share that turns, and divide the others by `factor`.

    Unlike partial rotation, pairs span the whole head and exponents divide by its width.

    Args:
        plain: frequencies by channel pair of the whole head.
        given: `partial_rotary_factor`, the share; 1 if missing. `factor`; 1 if missing.

    Raises:
        ConfigError: the share is not above 0 and at most 1.

    Source: Hugging Face Transformers' `proportional` rope type (Gemma 4).
    """
    share = float(given.get("partial_rotary_factor", 1.0))
    if not 0 < share <= 1:
        raise ConfigError(explain("partial_rotary_factor", "lie above 0 and be at most 1", share))
    factor = float(given.get("factor") or 1.0)
    turning = int(share * 2 * len(plain) // 2)
    return [f / factor if i < turning else 0.0 for i, f in enumerate(plain)]
