"""Projections of grouped-query attention: hidden states to q, k, v, and heads to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from impl.config import check_head_counts
from impl.errors import ConfigError, explain
from impl.parallel.groups import ALONE, Group
from impl.parallel.linear import ColumnParallelLinear, RowParallelLinear

Adapt: TypeAlias = Callable[[str, Tensor], Tensor]
"""Takes the name of a projection and its result; returns the result to use."""


class GroupQueryAttention_QKV(nn.Module):
    """Projects hidden states to flat queries, keys and values.

    Weights are `Wqkv` (rows: all q, then all k, then all v) if fused, else `q_proj`, `k_proj` and
    `v_proj`; query head `h` is rows `h * head_dim` to `(h + 1) * head_dim`.

    Args:
        hidden_size: width of the input.
        head_dim: width of a head.
        num_attention_heads: query heads of this rank.
        num_key_value_heads: KV heads of this rank, which divide them.
        dtype: dtype of weights and biases.
        bias: whether q, k and v have a bias.
        fused_qkv: one product instead of three.
        clip_qkv: clamp q, k and v to `[-clip_qkv, clip_qkv]`, after the bias.
        gather_output: gather the ranks' outputs; not defined for fused weights.
        group: ranks that hold the other heads.

    Raises:
        ConfigError: uneven heads, `fused_qkv` with `gather_output`, or a clip that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        fused_qkv: bool = False,
        clip_qkv: float | None = None,
        gather_output: bool = False,
        group: Group = ALONE,
    ) -> None:
        super().__init__()
        check_head_counts(num_attention_heads, num_key_value_heads)
        if fused_qkv and gather_output:
            raise ConfigError(
                explain(
                    "gather_output",
                    "be False when fused_qkv is True",
                    True,
                    "fused rows are sharded as q, k and v, not in order",
                )
            )
        if clip_qkv is not None and not clip_qkv > 0:
            raise ConfigError(explain("clip_qkv", "be positive or None", clip_qkv))
        self.fused_qkv = fused_qkv
        self.clip_qkv = clip_qkv
        self.q_width = num_attention_heads * head_dim
        self.kv_width = num_key_value_heads * head_dim
        widths = {"q_proj": self.q_width, "k_proj": self.kv_width, "v_proj": self.kv_width}
        if fused_qkv:
            widths = {"Wqkv": sum(widths.values())}
        self.Wqkv: ColumnParallelLinear
        self.q_proj: ColumnParallelLinear
        self.k_proj: ColumnParallelLinear
        self.v_proj: ColumnParallelLinear
        for name, width in widths.items():
            setattr(
                self,
                name,
                ColumnParallelLinear(
                    hidden_size,
                    width,
                    bias=bias,
                    dtype=dtype,
                    group=group,
                    gather_output=gather_output,
                ),
            )

    @property
    def row_counts(self) -> tuple[int, int, int]:
        """Rows of the q, k and v weights."""
        return (self.q_width, self.kv_width, self.kv_width)

    def forward(
        self, hidden_states: Tensor, adapt: Adapt | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project.

        Args:
            hidden_states: `(batch, seq_len, hidden_size)`, in the layer's dtype.
            adapt: changes each projection before it is clipped (LoRA).

        Returns:
            q `(batch, seq_len, num_attention_heads * head_dim)`, and k and v
            `(batch, seq_len, num_key_value_heads * head_dim)`, in the layer's dtype.
        """
        if self.fused_qkv:
            q, k, v = self.Wqkv(hidden_states).split(self.row_counts, dim=-1)
        else:
            q, k, v = (
                self.q_proj(hidden_states),
                self.k_proj(hidden_states),
                self.v_proj(hidden_states),
            )
        if adapt is not None:
            q, k, v = adapt("q_proj", q), adapt("k_proj", k), adapt("v_proj", v)
        if self.clip_qkv is not None:
            limit = self.clip_qkv
            q, k, v = q.clamp(-limit, limit), k.clamp(-limit, limit), v.clamp(-limit, limit)
        return q, k, v


class GroupQueryAttention_O(nn.Module):
    """Projects the heads' outputs back to hidden states.

    Args:
        hidden_size: width of the output.
        head_dim: width of a head.
        num_attention_heads: query heads of this rank.
        dtype: dtype of weight and bias.
        bias: whether there is a bias; it is added once, to the sum over ranks.
        layer_name: name of the projection in checkpoints.
        group: ranks that hold the other heads.
        reduce_dtype: dtype of the sum over ranks; None is `dtype`.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_attention_heads: int,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        layer_name: str = "o_proj",
        group: Group = ALONE,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.o_proj = RowParallelLinear(
            num_attention_heads * head_dim,
            hidden_size,
            bias=bias,
            dtype=dtype,
            group=group,
            reduce_dtype=reduce_dtype,
        )

    def forward(
        self, attention_output: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Project `(batch, seq_len, num_attention_heads * head_dim)` to hidden states.

        Args:
            attention_output: the outputs of this rank's heads.
            reduce: see `impl.parallel.linear.RowParallelLinear`.
        """
        return self.o_proj(attention_output, reduce)  # type: ignore[no-any-return]
