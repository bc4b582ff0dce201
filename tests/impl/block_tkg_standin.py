"""A stand-in for nki-library's `attention_block_tkg` that computes what its documentation says.

It has the documented parameters and no others, asserts what the kernel asserts of shapes, records
what it is called with, and answers with the documented formula in float64 NumPy, one head and one
token at a time: nothing of `impl` is in it, so that a wrong layout, order of heads, scale or mask
shows in numbers. It says nothing of the kernel itself, of which no part was run.

Source: aws-neuron/nki-library at commit 0759719, `experimental/transformer/attention_block_tkg.py`
and its reference `attention_block_tkg_torch.py`, `core/attention/attention_tkg_torch.py`,
`core/embeddings/rope_torch.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nki_packages import UNQUANTISED, Recorder
from torch import Tensor

Array = np.ndarray[Any, Any]


class BlockStandin(Recorder):
    """`attention_block_tkg` as documented; the step's keys are returned, not written."""

    def __call__(
        self,
        X: Tensor,
        *,
        X_hidden_dim_actual: int | None,
        rmsnorm_X_enabled: bool,
        rmsnorm_X_eps: float | None,
        rmsnorm_X_gamma: Tensor | None,
        W_qkv: Tensor,
        bias_qkv: Tensor | None,
        quantization_type_qkv: Any,
        weight_dequant_scale_qkv: Tensor | None,
        input_dequant_scale_qkv: Tensor | None,
        rmsnorm_QK_pre_rope_enabled: bool,
        rmsnorm_QK_pre_rope_eps: float,
        rmsnorm_QK_pre_rope_W_Q: Tensor | None,
        rmsnorm_QK_pre_rope_W_K: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        rope_contiguous_layout: bool,
        rmsnorm_QK_post_rope_enabled: bool,
        rmsnorm_QK_post_rope_eps: float,
        rmsnorm_QK_post_rope_W_Q: Tensor | None,
        rmsnorm_QK_post_rope_W_K: Tensor | None,
        K_cache_transposed: bool,
        active_blocks_table: Tensor | None,
        K_cache: Tensor,
        V_cache: Tensor,
        attention_mask: Tensor,
        sink: Tensor | None,
        softmax_scale: float | None = None,
        update_cache: bool,
        kv_cache_update_idx: Tensor | None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        W_out: Tensor | None,
        bias_out: Tensor | None,
        quantization_type_out: Any,
        weight_dequant_scale_out: Tensor | None,
        input_dequant_scale_out: Tensor | None,
        transposed_out: bool,
        out_in_sb: bool,
        sbm: Any = None,
        skip_attention: bool = False,
        KVDP: int = 1,
        KVDP_replica_group: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: value for name, value in locals().items() if name != "self"}
        self.calls.append(given)
        batch, q_len, hidden = X.shape
        width, slots = V_cache.shape[-1], V_cache.shape[-2]
        assert (hidden % 128, width % 2, slots % 128) == (0, 0, 0)
        assert width <= 128
        heads = W_qkv.shape[1] // width - 2
        assert W_qkv.shape == (hidden, (heads + 2) * width)
        assert heads > 0
        assert batch * q_len * heads <= 128
        assert q_len <= 8
        assert V_cache.shape == (batch, 1, slots, width)
        assert K_cache.shape == ((batch, 1, width, slots) if K_cache_transposed else V_cache.shape)
        assert attention_mask.shape == (slots, batch, heads, q_len)
        assert attention_mask.dtype == torch.uint8
        for table in (cos, sin):
            assert table is None or table.shape == (width // 2, batch, q_len)
        if cos is not None:
            assert width in (64, 128)
        assert sink is None or sink.shape == (heads, 1)
        assert W_out is not None
        assert W_out.shape == (heads * width, hidden)
        assert bias_qkv is None or bias_qkv.shape == (1, W_qkv.shape[1])
        assert bias_out is None or bias_out.shape == (1, hidden)
        assert rmsnorm_X_enabled == (rmsnorm_X_gamma is not None)
        assert rmsnorm_X_gamma is None or rmsnorm_X_gamma.shape == (1, hidden)
        if rmsnorm_QK_pre_rope_enabled or rmsnorm_QK_post_rope_enabled:
            assert width == 128
        assert quantization_type_qkv is quantization_type_out is UNQUANTISED
        assert all(value.is_contiguous() for value in given.values() if isinstance(value, Tensor))
        # what is bound asks for nothing else
        assert (update_cache, transposed_out, out_in_sb, skip_attention) == (False,) * 4
        out, k, v = _compute({n: _array(value) for n, value in given.items()}, heads)
        return tuple(torch.from_numpy(part).to(X.dtype) for part in (out, k, v))  # type: ignore[return-value]


def _array(value: Any) -> Any:
    return value.double().numpy() if isinstance(value, Tensor) else value


def _rms(x: Array, weight: Array | None, eps: float) -> Array:
    normed: Array = x / np.sqrt(np.mean(x * x) + eps)
    return normed if weight is None else normed * weight[0]


def _turned(x: Array, cos: Array, sin: Array, halves: bool) -> Array:
    """Rotate one head of one token; `cos` and `sin` have a value for each pair."""
    out = np.empty_like(x)
    half = len(x) // 2
    first, second = (
        (slice(None, half), slice(half, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
    )
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin
    return out


def _compute(a: dict[str, Any], heads: int) -> tuple[Array, Array, Array]:
    """The formula, over float64 arrays named as the kernel's parameters."""
    batch, q_len, hidden = a["X"].shape
    width = a["V_cache"].shape[-1]
    parts = np.empty((batch, q_len, heads + 2, width))
    for b in range(batch):
        for s in range(q_len):
            x = a["X"][b, s]
            if a["rmsnorm_X_enabled"]:
                x = _rms(x, a["rmsnorm_X_gamma"], a["rmsnorm_X_eps"])
            flat = x @ a["W_qkv"]
            if a["bias_qkv"] is not None:
                flat = flat + a["bias_qkv"][0]
            parts[b, s] = flat.reshape(heads + 2, width)
            for head in range(heads + 1):  # the last one is the key
                name, row = "K" if head == heads else "Q", parts[b, s, head]
                for when in ("pre", "post"):
                    if a[f"rmsnorm_QK_{when}_rope_enabled"]:
                        weight = a[f"rmsnorm_QK_{when}_rope_W_{name}"]
                        row = _rms(row, weight, a[f"rmsnorm_QK_{when}_rope_eps"])
                    if when == "pre" and a["cos"] is not None:
                        angles = (a["cos"][:, b, s], a["sin"][:, b, s])
                        row = _turned(row, *angles, halves=a["rope_contiguous_layout"])
                parts[b, s, head] = row
    k_new, v_new = parts[:, :, heads], parts[:, :, heads + 1]
    scale = width**-0.5 if a["softmax_scale"] is None else a["softmax_scale"]
    out = np.zeros((batch * q_len, hidden))
    for b in range(batch):
        keys, values = a["K_cache"][b, 0].copy(), a["V_cache"][b, 0].copy()
        if a["K_cache_transposed"]:
            keys = keys.T.copy()
        keys[-q_len:], values[-q_len:] = k_new[b], v_new[b]
        for s in range(q_len):
            merged = np.empty((heads, width))
            for head in range(heads):
                seen = a["attention_mask"][:, b, head, s] != 0
                scores = keys @ (parts[b, s, head] * scale)
                scores[~seen] = -np.inf
                logits = scores if a["sink"] is None else np.append(scores, a["sink"][head, 0])
                weights = np.exp(logits - logits.max())
                weights = weights / weights.sum()
                merged[head] = weights[: len(values)] @ values
            line = merged.reshape(-1) @ a["W_out"]
            out[b * q_len + s] = line if a["bias_out"] is None else line + a["bias_out"][0]
    return out, k_new.transpose(2, 0, 1).copy(), v_new[:, None].copy()
