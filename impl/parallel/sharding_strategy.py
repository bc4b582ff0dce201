"""How many heads tensor-parallel ranks hold, padding and copies included."""

from __future__ import annotations

from enum import Enum


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
