"""Attention and its layer in torch, float64: what autograd differentiates for the gradient tests.

Written from the formulas, with torch's own softmax and matrix products, and apart from golden's
steps: keys are repeated, masks are filled in, the sink is a column of the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from golden import Array, AttentionConfig, QKNorm


def leaf(array: Array) -> torch.Tensor:
    """Return a copy that collects a gradient."""
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp; rows that see nothing give zeros in both."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)  # else softmax would be 0 / 0
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].masked_fill(empty, 0.0)
    logsumexp = torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], 0.0)
    return weights @ v, logsumexp


def _norm(
    x: torch.Tensor, norm: QKNorm, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if norm.kind == "layer":
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + norm.eps)
    else:
        x = x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + norm.eps)
    if weight is not None:
        x = x * (weight + norm.weight_offset)
    return x if bias is None else x + bias


def _rotate(x: torch.Tensor, config: AttentionConfig, positions: torch.Tensor) -> torch.Tensor:
    """Rotate by complex multiplication; x is `(batch, heads, length, head_dim)`."""
    assert config.rope is not None
    assert config.rope.scaling is None
    r = config.rotary_dim
    frequencies = config.rope.theta ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    angles = positions[:, None, :, None].double() * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    turned, passed = x[..., :r], x[..., r:]
    if config.rope.pairing == "half":
        pairs = torch.stack([turned[..., : r // 2], turned[..., r // 2 :]], dim=-1)
    else:
        pairs = turned.unflatten(-1, (r // 2, 2))
    rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    if config.rope.pairing == "half":
        rotated = rotated.transpose(-1, -2)
    return torch.cat([rotated.flatten(-2), passed], dim=-1)


def heads(
    config: AttentionConfig,
    weights: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positions: torch.Tensor,
    name: str,
) -> torch.Tensor:
    """Return the layer's queries, keys or values as attention reads them, BHSD."""
    x = torch.nn.functional.linear(hidden, weights[f"{name}_proj"], weights.get(f"{name}_bias"))
    if config.clip_qkv is not None:
        x = torch.clamp(x, -config.clip_qkv, config.clip_qkv)
    norm = config.qk_norm if name != "v" else None
    learned = weights.get(f"{name}_norm"), weights.get(f"{name}_norm_bias")
    if norm is not None and norm.scope == "projection":
        x = _norm(x, norm, *learned)
    x = x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
    if norm is not None and norm.scope == "head" and norm.placement == "pre_rope":
        x = _norm(x, norm, *learned)
    if config.rope is not None and name != "v":
        x = _rotate(x, config, positions)
    if norm is not None and norm.placement == "post_rope":
        x = _norm(x, norm, *learned)
    tuning = config.temperature_tuning
    if tuning is not None and name == "q":
        steps = torch.floor((positions.double() + 1) / tuning.floor_scale)
        x = x * (1 + tuning.attn_scale * torch.log1p(steps))[:, None, :, None]
    return x


def layer(
    config: AttentionConfig,
    weights: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the layer's output, and keys and values that attention read.

    Args:
        config: the layer.
        weights: by field name.
        hidden: `(batch, length, hidden_size)`.
        positions: `(batch, length)`.
        visible: `(batch, num_attention_heads, length, kv_len)`.
        caches: keys and values before token generation, BHSD; the token at position `p` replaces
            slot `p`. None for context encoding.
    """
    q, k, v = (heads(config, weights, hidden, positions, name) for name in "qkv")
    if caches is not None:
        slots = torch.arange(caches[0].shape[2])
        hit = (positions[:, :, None] == slots).double()  # (batch, length, slots)
        kept = (1 - hit.sum(dim=1))[:, None, :, None]
        k, v = (
            cache * kept + torch.einsum("bts,bhtd->bhsd", hit, new)
            for cache, new in zip(caches, (k, v), strict=True)
        )
    output, _ = attend(
        q,
        k,
        v,
        visible,
        scale=config.softmax_scale,
        softcap=config.softcap,
        sinks=weights.get("sinks"),
    )
    merged = output.transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(merged, weights["o_proj"], weights.get("o_bias")), k, v


def gradient(tensor: torch.Tensor) -> Array:
    """Return what a leaf collected, zeros if nothing reached it."""
    if tensor.grad is None:
        return np.zeros(tuple(tensor.shape))
    found: Array = tensor.grad.numpy()
    return found
