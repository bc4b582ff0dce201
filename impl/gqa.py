"""Projections of grouped-query attention: hidden states to q, k, v, and heads to hidden states."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from impl.config import check_head_counts
from impl.errors import ConfigError, explain


class GQA(Enum):
    """How key/value heads are laid over tensor-parallel ranks."""

    CONVERT_TO_MHA = "convert-to-mha"
    REPLICATE_TO_TP_DEGREE = "replicate-to-tp-degree"


def determine_sharding_strategy(
    tp_degree: int, source_key_value_heads: int, desired_sharding_strategy: GQA | None = None
) -> GQA:
    """Choose how KV heads meet the ranks.

    Args:
        tp_degree: ranks.
        source_key_value_heads: KV heads of the model.
        desired_sharding_strategy: what to use if it can be; None is replication.

    Returns:
        The desired strategy, but CONVERT_TO_MHA where replication does not come out even.
    """
    desired = desired_sharding_strategy or GQA.REPLICATE_TO_TP_DEGREE
    if desired is GQA.REPLICATE_TO_TP_DEGREE and tp_degree % source_key_value_heads:
        return GQA.CONVERT_TO_MHA
    return desired


def get_shardable_head_counts(
    tp_degree: int, num_attention_heads: int, num_key_value_heads: int, sharding_strategy: GQA
) -> tuple[int, int]:
    """Pad and replicate heads until each rank gets as many.

    Args:
        tp_degree: ranks.
        num_attention_heads: query heads of the model.
        num_key_value_heads: KV heads of the model.
        sharding_strategy: from `determine_sharding_strategy`.

    Returns:
        Query heads and KV heads over all ranks, both multiples of `tp_degree`.
    """
    query_heads = -(-num_attention_heads // tp_degree) * tp_degree
    if num_attention_heads == num_key_value_heads:
        return query_heads, query_heads
    if num_key_value_heads >= tp_degree and num_key_value_heads % tp_degree == 0:
        return query_heads, num_key_value_heads
    if sharding_strategy is GQA.REPLICATE_TO_TP_DEGREE:
        return query_heads, tp_degree
    return query_heads, query_heads


class GroupQueryAttention_QKV(nn.Module):
    """Projects hidden states to flat queries, keys and values.

    Weights are `Wqkv` (rows: all q, then all k, then all v) if fused, else `q_proj`, `k_proj` and
    `v_proj`; query head `h` is rows `h * head_dim` to `(h + 1) * head_dim`.

    Args:
        hidden_size: width of the input.
        head_dim: width of a head.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads, which divide them.
        dtype: dtype of weights and biases.
        bias: whether q, k and v have a bias.
        fused_qkv: one product instead of three.
        clip_qkv: clamp q, k and v to `[-clip_qkv, clip_qkv]`, after the bias.
        gather_output: gather the ranks' outputs; not defined for fused weights.

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
        self.Wqkv: nn.Linear
        self.q_proj: nn.Linear
        self.k_proj: nn.Linear
        self.v_proj: nn.Linear
        for name, width in widths.items():
            setattr(self, name, nn.Linear(hidden_size, width, bias=bias, dtype=dtype))

    @property
    def row_counts(self) -> tuple[int, int, int]:
        """Rows of the q, k and v weights."""
        return (self.q_width, self.kv_width, self.kv_width)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project.

        Args:
            hidden_states: `(batch, seq_len, hidden_size)`, in the layer's dtype.

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
        if self.clip_qkv is not None:
            limit = self.clip_qkv
            q, k, v = q.clamp(-limit, limit), k.clamp(-limit, limit), v.clamp(-limit, limit)
        return q, k, v


class GroupQueryAttention_O(nn.Module):
    """Projects the heads' outputs back to hidden states.

    Args:
        hidden_size: width of the output.
        head_dim: width of a head.
        num_attention_heads: query heads.
        dtype: dtype of weight and bias.
        bias: whether there is a bias.
        layer_name: name of the projection in checkpoints.
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
    ) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias, dtype=dtype)

    def forward(self, attention_output: Tensor) -> Tensor:
        """Project `(batch, seq_len, num_attention_heads * head_dim)` to hidden states."""
        return self.o_proj(attention_output)  # type: ignore[no-any-return]
