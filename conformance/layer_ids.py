"""Spells out a layer's configuration as tokens, and reads them back: half of a case's id.

A token a feature: `h256-hq8-hkv2-d32-sinks-window16-rope10000`. Numbers follow their name, several
of them separated by `_`; `1em06` is 1e-06, since `-` separates tokens.
"""

from __future__ import annotations

import re

from conformance.errors import UsageError
from golden import (
    AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    QKNorm,
    RopeConfig,
    TemperatureTuning,
    YarnScaling,
)

EXPLICIT = re.compile(r"h\d+-hq\d+-hkv\d+-d\d+")
"""How every spelt-out layer starts."""


def _number(value: float) -> str:
    """Write a number without the `-` that separates tokens."""
    text = str(value) if isinstance(value, int) else repr(value).removesuffix(".0")
    return text.replace("e-", "em").replace("e+", "e").replace("-", "m")


def _parsed(text: str) -> float:
    return float(text.replace("em", "e-").replace("m", "-"))


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"token {name!r} must be followed by a whole number, got {text!r}")
    return int(text)


def _join(*parts: float | int | str) -> str:
    return "_".join(part if isinstance(part, str) else _number(part) for part in parts)


def render_layer(config: AttentionConfig) -> str:
    """Return the layer's tokens, joined by `-`.

    Raises:
        UsageError: the layer has something that no token carries.
    """
    if type(config) is not AttentionConfig:
        raise UsageError(f"no token of a case's id carries {type(config).__name__}")
    tokens = [
        f"h{config.hidden_size}",
        f"hq{config.num_attention_heads}",
        f"hkv{config.num_key_value_heads}",
        f"d{config.head_dim}",
    ]
    flags = {
        "qkvbias": config.qkv_bias,
        "obias": config.o_bias,
        "fused": config.fused_qkv,
        "sinks": config.learned_sinks_size is not None,
    }
    tokens += [name for name, on in flags.items() if on]
    numbers = {
        "clip": config.clip_qkv,
        "window": config.sliding_window,
        "chunk": config.attention_chunk_size,
        "cap": config.softcap,
        "scale": None if config.softmax_scale == config.head_dim**-0.5 else config.softmax_scale,
    }
    tokens += [f"{name}{_number(value)}" for name, value in numbers.items() if value is not None]
    norm, tuning = config.qk_norm, config.temperature_tuning
    if norm is not None:
        weighted = "w" if norm.weighted else "plain"
        tokens.append(
            _join(
                "norm",
                norm.kind,
                norm.placement.removesuffix("_rope"),
                norm.scope,
                weighted,
                norm.eps,
                norm.weight_offset,
            )
        )
    if tuning is not None:
        tokens.append(_join("temp", tuning.floor_scale, tuning.attn_scale))
    if config.rope is not None:
        tokens += _rope_tokens(config.rope)
    return "-".join(tokens)


def _rope_tokens(rope: RopeConfig) -> list[str]:
    if rope.mrope_section:
        raise UsageError("no token of a case's id carries positions of several axes (M-RoPE)")
    tokens = [("rope" if rope.pairing == "half" else "polar") + _number(rope.theta)]
    if rope.rotary_dim:
        tokens.append(f"rot{rope.rotary_dim}")
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        tokens.append(_join("linear", scaling.factor))
    elif isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        context = scaling.original_max_position_embeddings
        tokens.append(_join("llama3", scaling.factor, low, high, context))
    elif isinstance(scaling, YarnScaling):
        ends = "round" if scaling.truncate else "exact"
        context = scaling.original_max_position_embeddings
        fast, slow = scaling.beta_fast, scaling.beta_slow
        tokens.append(
            _join("yarn", scaling.factor, context, fast, slow, ends, scaling.attention_factor)
        )
    elif scaling is not None:
        raise UsageError(f"no token of a case's id carries {type(scaling).__name__}")
    return tokens


def parse_layer(text: str) -> AttentionConfig:
    """Rebuild a configuration from its tokens.

    Raises:
        UsageError: a token is unknown or stands twice.
        ValueError: a number does not read as one, or the configuration breaks a rule of golden.
    """
    tokens: dict[str, str] = {}
    for token in text.split("-"):
        name = re.match(r"llama3(?=_)|[a-z]+", token)
        if name is None or name[0] not in _TOKENS or name[0] in tokens:
            raise UsageError(f"token {token!r} is not one of a layer's; known: {sorted(_TOKENS)}")
        tokens[name[0]] = token[name.end() :].lstrip("_")
    number = {name: _parsed(value) for name, value in tokens.items() if name in _NUMBERS}
    whole = {name: _whole(name, tokens[name]) for name in tokens.keys() & _COUNTS}
    norm = None
    if "norm" in tokens:
        norm = _norm(tokens["norm"])
    tuning = None
    if "temp" in tokens:
        floor_scale, attn_scale = map(_parsed, tokens["temp"].split("_"))
        tuning = TemperatureTuning(floor_scale=floor_scale, attn_scale=attn_scale)
    return AttentionConfig(
        hidden_size=whole["h"],
        num_attention_heads=whole["hq"],
        num_key_value_heads=whole["hkv"],
        head_dim=whole["d"],
        qkv_bias="qkvbias" in tokens,
        o_bias="obias" in tokens,
        fused_qkv="fused" in tokens,
        clip_qkv=number.get("clip"),
        qk_norm=norm,
        rope=_rope(tokens, number, whole),
        softmax_scale=number.get("scale", 0.0),
        softcap=number.get("cap"),
        sliding_window=whole.get("window"),
        attention_chunk_size=whole.get("chunk"),
        learned_sinks_size=1 if "sinks" in tokens else None,
        temperature_tuning=tuning,
    )


_COUNTS = frozenset(("h", "hq", "hkv", "d", "window", "chunk", "rot"))
_NUMBERS = _COUNTS | frozenset(("clip", "cap", "scale", "rope", "polar"))
_TOKENS = _NUMBERS | frozenset(
    ("qkvbias", "obias", "fused", "sinks", "norm", "temp", "linear", "llama3", "yarn")
)


def _norm(text: str) -> QKNorm:
    kind, placement, scope, weighted, eps, offset = text.split("_")
    return QKNorm(
        kind=kind,  # type: ignore[arg-type]  # QKNorm checks the words itself
        placement=f"{placement}_rope",  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        weighted=weighted == "w",
        eps=_parsed(eps),
        weight_offset=_parsed(offset),
    )


def _rope(
    tokens: dict[str, str], number: dict[str, float], whole: dict[str, int]
) -> RopeConfig | None:
    if "rope" not in tokens and "polar" not in tokens:
        return None
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    if "linear" in tokens:
        scaling = LinearScaling(factor=_parsed(tokens["linear"]))
    elif "llama3" in tokens:
        factor, low, high, context = map(_parsed, tokens["llama3"].split("_"))
        scaling = Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=int(context),
        )
    elif "yarn" in tokens:
        first, context_text, fast, slow, ends, attention = tokens["yarn"].split("_")
        scaling = YarnScaling(
            factor=_parsed(first),
            original_max_position_embeddings=int(context_text),
            beta_fast=_parsed(fast),
            beta_slow=_parsed(slow),
            truncate=ends == "round",
            attention_factor=_parsed(attention),
        )
    return RopeConfig(
        theta=number.get("rope", number.get("polar", 0.0)),
        pairing="half" if "rope" in tokens else "interleaved",
        rotary_dim=whole.get("rot", 0),
        scaling=scaling,
    )
