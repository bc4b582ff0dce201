"""What the attention module returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class NeuronAttentionBaseOutput:
    """The module's result, readable as a record and as the tuple it used to be.

    As a tuple it has the four values `hidden_states, present_key_value, cos_cache, sin_cache`:
    `len`, iteration, unpacking, slices and negative indices see exactly these. An index counts
    fields, so `output[4]` is `residual`, which joined after the tuple form was fixed at four.

    Attributes:
        hidden_states: `(batch, seq_len, hidden_size)`, in the dtype of the input.
        present_key_value: K and V of this step, each `(batch, kv_heads, seq_len, head_dim)`, BHSD;
            or, with `update_kv_per_layer=True`, the layer's whole updated cache.
        cos_cache: cosines used for RoPE, `(batch, seq_len, rotary_dim)`, for the next layer of the
            same kind; None without RoPE.
        sin_cache: sines, likewise.
        residual: the residual that was passed in, or its sum with the hidden states where the QKV
            kernel would add it.
    """

    hidden_states: Tensor
    present_key_value: tuple[Tensor, Tensor]
    cos_cache: Tensor | None = None
    sin_cache: Tensor | None = None
    residual: Tensor | None = None

    def _unpacked(self) -> tuple[Any, Any, Any, Any]:
        return (self.hidden_states, self.present_key_value, self.cos_cache, self.sin_cache)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._unpacked())

    def __len__(self) -> int:
        return len(self._unpacked())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice) or index < 0:
            return self._unpacked()[index]
        return getattr(self, fields(self)[index].name)
