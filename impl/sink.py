"""Learned sink: one logit per query head that takes part in the softmax and carries no value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from impl.errors import ConfigError, explain


class LearnedSink(nn.Module):
    """Holds one sink logit per query head of this rank.

    A row's weights become `exp(s_j) / (exp(sink) + sum_k exp(s_k))`: they sum to less than one, and
    the rest of the probability goes nowhere.

    Args:
        learned_sinks_size: sinks per head; only 1 is defined.
        num_attention_heads: query heads over all ranks.
        torch_dtype: dtype of the logits.
        tensor_model_parallel_size: ranks the heads are split over.

    Raises:
        ConfigError: `learned_sinks_size` is not 1, or the heads do not split evenly.
    """

    def __init__(
        self,
        learned_sinks_size: int,
        num_attention_heads: int,
        torch_dtype: torch.dtype,
        tensor_model_parallel_size: int = 1,
    ) -> None:
        super().__init__()
        if learned_sinks_size != 1:
            raise ConfigError(
                explain(
                    "learned_sinks_size",
                    "be 1 or None",
                    learned_sinks_size,
                    "a head has one sink logit",
                )
            )
        if num_attention_heads % tensor_model_parallel_size:
            raise ConfigError(
                explain(
                    "num_attention_heads",
                    "be a multiple of tensor_model_parallel_size when sinks are learned",
                    f"{num_attention_heads} and {tensor_model_parallel_size}",
                    "sinks have no padded heads",
                )
            )
        heads = num_attention_heads // tensor_model_parallel_size
        self.sink = nn.Parameter(torch.zeros(heads, dtype=torch_dtype), requires_grad=False)

    def get_sink(self) -> Tensor:
        """The logits, `(num_attention_heads / ranks,)`, in `torch_dtype`."""
        return self.sink
