"""Spells out a rotary embedding as tokens of a layer's id, and reads them back."""

from __future__ import annotations

from collections.abc import Mapping

from conformance.errors import UsageError
from conformance.id_numbers import joined, number, parsed, whole
from golden import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)
from golden.rope_config import RopeScaling

_SCALINGS = frozenset(("linear", "llama3", "yarn", "dynamic", "longrope", "proportional"))
ROPE_TOKENS = _SCALINGS | frozenset(("rope", "polar", "rot", "mrope", "imrope"))
"""Names of the tokens."""


def rope_tokens(rope: RopeConfig) -> list[str]:
    """Return the tokens of a rotary embedding."""
    tokens = [("rope" if rope.pairing == "half" else "polar") + number(rope.theta)]
    if rope.rotary_dim:
        tokens.append(f"rot{rope.rotary_dim}")
    if rope.mrope_section:
        name = "imrope" if rope.mrope_interleaved else "mrope"
        tokens.append(name + joined(*rope.mrope_section))
    if rope.scaling is not None:
        tokens.append(_scaling_token(rope.scaling))
    return tokens


def _scaling_token(scaling: RopeScaling) -> str:
    if isinstance(scaling, LinearScaling):
        return joined("linear", scaling.factor)
    if isinstance(scaling, ProportionalScaling):
        return joined("proportional", scaling.proportion, scaling.factor)
    context = scaling.original_max_position_embeddings
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return joined("llama3", scaling.factor, low, high, context)
    if isinstance(scaling, YarnScaling):
        ends = "round" if scaling.truncate else "exact"
        fast, slow = scaling.beta_fast, scaling.beta_slow
        return joined("yarn", scaling.factor, context, fast, slow, ends, scaling.attention_factor)
    if isinstance(scaling, DynamicNTKScaling):
        return joined("dynamic", scaling.factor, context, scaling.seq_len)
    divisors = (*scaling.short_factor, *scaling.long_factor)
    return joined(
        "longrope", scaling.factor, context, scaling.attention_factor, scaling.seq_len, *divisors
    )


def parse_rope(tokens: Mapping[str, str]) -> RopeConfig | None:
    """Rebuild a rotary embedding from a layer's tokens, None without one.

    Raises:
        UsageError: a token needs another, or several scalings are given.
        ValueError: a number does not read as one, or a configuration breaks a rule of golden.
    """
    if "rope" not in tokens and "polar" not in tokens:
        if alone := sorted(ROPE_TOKENS & tokens.keys()):
            raise UsageError(f"{', '.join(alone)} must come with rope or polar")
        return None
    scalings = sorted(_SCALINGS & tokens.keys())
    axes = sorted({"mrope", "imrope"} & tokens.keys())
    if len(scalings) > 1 or len(axes) > 1:
        raise UsageError(f"{', '.join([*scalings, *axes])} exclude each other")
    section = tokens[axes[0]].split("_") if axes else []
    return RopeConfig(
        theta=parsed(tokens.get("rope", tokens.get("polar", ""))),
        pairing="half" if "rope" in tokens else "interleaved",
        rotary_dim=whole("rot", tokens["rot"]) if "rot" in tokens else 0,
        scaling=_scaling(scalings[0], tokens[scalings[0]].split("_")) if scalings else None,
        mrope_section=tuple(whole(axes[0], pairs) for pairs in section),
        mrope_interleaved=axes == ["imrope"],
    )


def _scaling(name: str, words: list[str]) -> RopeScaling:
    if name == "linear":
        (factor,) = map(parsed, words)
        return LinearScaling(factor=factor)
    if name == "proportional":
        proportion, factor = map(parsed, words)
        return ProportionalScaling(proportion=proportion, factor=factor)
    if name == "llama3":
        factor, low, high, context = map(parsed, words)
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=int(context),
        )
    if name == "yarn":
        first, second, fast, slow, ends, attention = words
        return YarnScaling(
            factor=parsed(first),
            original_max_position_embeddings=whole(name, second),
            beta_fast=parsed(fast),
            beta_slow=parsed(slow),
            truncate=ends == "round",
            attention_factor=parsed(attention),
        )
    if name == "dynamic":
        first, second, length = words
        return DynamicNTKScaling(
            factor=parsed(first),
            original_max_position_embeddings=whole(name, second),
            seq_len=whole(name, length),
        )
    first, second, attention, length, *divisors = words
    half = len(divisors) // 2
    return LongRopeScaling(
        short_factor=tuple(map(parsed, divisors[:half])),
        long_factor=tuple(map(parsed, divisors[half:])),
        factor=parsed(first),
        original_max_position_embeddings=whole(name, second),
        attention_factor=parsed(attention),
        seq_len=whole(name, length),
    )
