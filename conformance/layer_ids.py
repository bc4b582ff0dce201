"""Spells out a layer's configuration as tokens, and reads them back: half of a case's id.

A token a feature: `h256-hq8-hkv2-d32-sinks-window16-rope10000`. Numbers follow their name, several
of them separated by `_`; `1em06` is 1e-06, since `-` separates tokens.
"""

from __future__ import annotations

import re

from conformance.errors import UsageError
from conformance.extras import NO_EXTRAS, Extras
from conformance.id_numbers import joined, number, parsed, whole
from conformance.rope_ids import ROPE_TOKENS, parse_rope, rope_tokens
from golden import AttentionConfig, Eagle3AttentionConfig, QKNorm, TemperatureTuning

EXPLICIT = re.compile(r"h\d+-hq\d+-hkv\d+-d\d+")
"""How every spelt-out layer starts."""


def render_layer(config: AttentionConfig, extras: Extras = NO_EXTRAS) -> str:
    """Return the layer's tokens, joined by `-`.

    Raises:
        UsageError: the layer has something that no token carries.
    """
    if type(config) not in (AttentionConfig, Eagle3AttentionConfig):
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
        "eagle3": isinstance(config, Eagle3AttentionConfig),
        "innorm": extras.input_norm,
        "residual": extras.residual,
    }
    tokens += [name for name, on in flags.items() if on]
    numbers = {
        "clip": config.clip_qkv,
        "window": config.sliding_window,
        "chunk": config.attention_chunk_size,
        "cap": config.softcap,
        "scale": None if config.softmax_scale == config.head_dim**-0.5 else config.softmax_scale,
    }
    tokens += [f"{name}{number(value)}" for name, value in numbers.items() if value is not None]
    norm, tuning = config.qk_norm, config.temperature_tuning
    if norm is not None:
        weighted = "w" if norm.weighted else "plain"
        tokens.append(
            joined(
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
        tokens.append(joined("temp", tuning.floor_scale, tuning.attn_scale))
    if config.rope is not None:
        tokens += rope_tokens(config.rope)
    if extras.adapters:
        tokens.append(f"lora{extras.adapters}_{extras.rank}")
    return "-".join(tokens)


def parse_layer(text: str) -> tuple[AttentionConfig, Extras]:
    """Rebuild a configuration, and what comes with it, from its tokens.

    Raises:
        UsageError: a token is unknown or stands twice.
        ValueError: a number does not read as one, or the configuration breaks a rule of golden.
    """
    tokens: dict[str, str] = {}
    for token in text.split("-"):
        name = re.match(r"llama3(?=_)|eagle3$|[a-z]+", token)
        if name is None or name[0] not in _TOKENS or name[0] in tokens:
            raise UsageError(f"token {token!r} is not one of a layer's; known: {sorted(_TOKENS)}")
        tokens[name[0]] = token[name.end() :].lstrip("_")
    figures = {name: parsed(tokens[name]) for name in tokens.keys() & _FIGURES}
    counts = {name: whole(name, tokens[name]) for name in tokens.keys() & _COUNTS}
    norm = None
    if "norm" in tokens:
        norm = _norm(tokens["norm"])
    tuning = None
    if "temp" in tokens:
        floor_scale, attn_scale = map(parsed, tokens["temp"].split("_"))
        tuning = TemperatureTuning(floor_scale=floor_scale, attn_scale=attn_scale)
    kind = Eagle3AttentionConfig if "eagle3" in tokens else AttentionConfig
    config = kind(
        hidden_size=counts["h"],
        num_attention_heads=counts["hq"],
        num_key_value_heads=counts["hkv"],
        head_dim=counts["d"],
        qkv_bias="qkvbias" in tokens,
        o_bias="obias" in tokens,
        fused_qkv="fused" in tokens,
        clip_qkv=figures.get("clip"),
        qk_norm=norm,
        rope=parse_rope(tokens),
        softmax_scale=figures.get("scale", 0.0),
        softcap=figures.get("cap"),
        sliding_window=counts.get("window"),
        attention_chunk_size=counts.get("chunk"),
        learned_sinks_size=1 if "sinks" in tokens else None,
        temperature_tuning=tuning,
    )
    adapters, rank = (
        (whole("lora", part) for part in tokens["lora"].split("_")) if "lora" in tokens else (0, 0)
    )
    extras = Extras(
        adapters=adapters,
        rank=rank,
        input_norm="innorm" in tokens,
        residual="residual" in tokens,
    )
    return config, extras


_COUNTS = frozenset(("h", "hq", "hkv", "d", "window", "chunk"))
_FIGURES = frozenset(("clip", "cap", "scale"))
_FLAGS = frozenset(("qkvbias", "obias", "fused", "sinks", "eagle3", "innorm", "residual"))
_TOKENS = _COUNTS | _FIGURES | _FLAGS | ROPE_TOKENS | {"norm", "temp", "lora"}


def _norm(text: str) -> QKNorm:
    kind, placement, scope, weighted, eps, offset = text.split("_")
    return QKNorm(
        kind=kind,  # type: ignore[arg-type]  # QKNorm checks the words itself
        placement=f"{placement}_rope",  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        weighted=weighted == "w",
        eps=parsed(eps),
        weight_offset=parsed(offset),
    )
