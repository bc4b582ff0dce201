"""Gradients of the layer in tracked arithmetic, written from the formulas."""

from __future__ import annotations

import numpy as np

from conformance.certify.attention_formula import IntArray
from conformance.certify.attention_gradient_formula import attention_gradients
from conformance.certify.layer_formula import LayerCase, LayerFormula
from conformance.certify.rope_formulas import rotated
from conformance.certify.tracked import Tracked, tracked
from golden import Array


def layer_gradients(
    case: LayerCase,
    forward: LayerFormula,
    d_output: Array,
    d_cache_k: Array | None = None,
    d_cache_v: Array | None = None,
    levelled: bool = True,
) -> dict[str, Tracked]:
    """Return the gradients of hidden states, weights and the cache, by name.

    Args:
        case: the layer and its inputs.
        forward: the layer evaluated on it.
        d_output: `(batch, q_len, hidden_size)`, cotangent of the output.
        d_cache_k: cotangent of the keys of the cache after token generation; None for zeros.
        d_cache_v: likewise for values.
        levelled: as `attention_gradients` takes it.

    Returns:
        `hidden_states`, the names of the weights, and for token generation `cache_k`, `cache_v`.
    """
    config, stages = case.config, forward.stages
    d_y = tracked(d_output, stages["q"].arithmetic)
    found = {"o_proj": _outer(d_y, _merged(forward.attention.output))}
    if config.o_bias:
        found["o_bias"] = d_y.sum((0, 1))
    d_attn = _split(d_y @ stages["o_proj"], config.head_dim)
    inner = attention_gradients(
        forward.attention,
        stages["q"],
        forward.k,
        forward.v,
        d_attn,
        forward.visible,
        scale=config.softmax_scale,
        sinks=stages.get("sinks"),
        levelled=levelled,
    )
    if "sinks" in inner:
        found["sinks"] = inner["sinks"]
    d_heads = {name: inner[name] for name in "qkv"}
    if case.lengths is not None:
        for name, d_after in (("k", d_cache_k), ("v", d_cache_v)):
            whole = d_heads[name] if d_after is None else d_heads[name] + d_y.like(d_after)
            d_heads[name], found[f"cache_{name}"] = _parted(whole, case.positions)
    d_hidden: Tracked | None = None
    for name in "qkv":
        d_flat = _back_to_projection(case, stages, name, d_heads[name], found)
        if config.qkv_bias:
            found[f"{name}_bias"] = d_flat.sum((0, 1))
        found[f"{name}_proj"] = _outer(d_flat, stages["hidden"])
        part = d_flat @ stages[f"{name}_proj"]
        d_hidden = part if d_hidden is None else d_hidden + part
    assert d_hidden is not None
    return found | {"hidden_states": d_hidden}


def _back_to_projection(
    case: LayerCase,
    stages: dict[str, Tracked],
    name: str,
    d: Tracked,
    found: dict[str, Tracked],
) -> Tracked:
    """Go back through temperature, norm, rotation and clip."""
    config = case.config
    if name == "q" and config.temperature_tuning is not None:
        d = d * stages["temperature"]
    norm = config.qk_norm if name != "v" else None

    def back_through_norm(d_result: Tracked) -> Tracked:
        assert norm is not None
        unit, scale = stages[f"{name}_unit"], stages[f"{name}_scale"]
        rows = tuple(range(len(unit.shape) - 1))
        g = d_result
        if norm.weighted:
            found[f"{name}_norm"] = (d_result * unit).sum(rows)
            g = d_result * (d_result.like(norm.weight_offset) + stages[f"{name}_norm"])
        d_x = scale * (g - unit * (g * unit).mean())
        if norm.kind == "layer":
            if norm.weighted:
                found[f"{name}_norm_bias"] = d_result.sum(rows)
            d_x = d_x - d_x.mean()
        return d_x

    if norm is not None and norm.placement == "post_rope":
        d = back_through_norm(d)
    if config.rope is not None and name != "v":
        d = rotated(d, stages["cos"], -stages["sin"], config.rope.pairing)
    if norm is not None and norm.placement == "pre_rope" and norm.scope == "head":
        d = back_through_norm(d)
    d = _merged(d)
    if norm is not None and norm.scope == "projection":
        d = back_through_norm(d)
    if config.clip_qkv is not None:
        flat = stages[f"{name}_flat"]
        distance = np.abs(flat.size - config.clip_qkv)
        assert (distance > flat.error).all(), "a value at the clip's bound has no one derivative"
        d = d.where(flat.size <= config.clip_qkv)
    return d


def _parted(d_after: Tracked, positions: IntArray) -> tuple[Tracked, Tracked]:
    """Part the cotangent of a cache into the tokens written and the cache before."""
    batch, heads, _, width = d_after.shape
    d_new = d_after.like(np.zeros((batch, heads, positions.shape[1], width)))
    kept = np.ones(d_after.shape, dtype=np.bool_)
    for row, token in np.argwhere(positions >= 0):
        slot = positions[row, token]
        d_new = d_new.replaced((row, slice(None), token), d_after[row, :, slot])
        kept[row, :, slot] = False
    return d_new, d_after.where(kept)


def _outer(d_y: Tracked, x: Tracked) -> Tracked:
    rows = d_y.shape[0] * d_y.shape[1]
    return d_y.reshape(rows, d_y.shape[2]).swapaxes(0, 1) @ x.reshape(rows, x.shape[2])


def _merged(x: Tracked) -> Tracked:
    batch, heads, length, width = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * width)


def _split(x: Tracked, head_dim: int) -> Tracked:
    batch, length, width = x.shape
    return x.reshape(batch, length, width // head_dim, head_dim).swapaxes(1, 2)
