"""Contiguous key/value cache: slot `p` of line `b` holds position `p` of batch row `b`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from impl.config import InferenceConfig
from impl.errors import AttentionError, ShapeError, UnsupportedError, explain
from impl.serving import check_cache_config

KeyValue = tuple[Tensor, Tensor]


def write_positions(cache: Tensor, new: Tensor, position_ids: Tensor) -> Tensor:
    """Copy of a cache with new tokens at their positions.

    A negative position is padding and is written nowhere. A position past the end is an index
    error where the device checks indices (CPU), and undefined elsewhere. Tokens of one row must
    not share a position; which of them would stay is not defined.

    Args:
        cache: `(batch, heads, slots, head_dim)`, BHSD.
        new: `(batch, heads, seq_len, head_dim)`, BHSD; cast to the cache's dtype.
        position_ids: `(batch, seq_len)`, integer.

    Returns:
        Like `cache`; shapes are static and `cache` is not changed.
    """
    slots = cache.shape[2]
    spare = torch.cat((cache, cache[:, :, :1]), dim=2)
    positions = position_ids.to(torch.int64)
    # The spare slot at the end takes padding; a real position past the end must miss it.
    target = torch.where(positions < 0, slots, positions + (positions >= slots).to(torch.int64))
    index = target[:, None, :, None].expand(new.shape)
    return torch.scatter(spare, 2, index, new.to(cache.dtype))[:, :, :slots]


class KVCacheManager(nn.Module):
    """Keeps K and V of every layer and writes new tokens by position.

    Reads and updates are functional: `update_*` returns the new cache and changes nothing, so a
    step can be traced and its outputs aliased to the cache. `store` puts a result into place.

    A layer with a sliding window keeps its keys untransposed whatever `k_cache_transposed` says,
    as its attention layer expects.

    Attributes:
        past_key_values: `K0, V0, K1, V1, ...`, each `(batch, kv_heads, max_length, head_dim)`,
            zeros at first; transposed keys are `(batch, kv_heads, head_dim, max_length)`.

    Args:
        config: gives layers, batch, `max_length`, `head_dim` and the dtype.
        num_kv_head: KV heads of this rank; None is the model's.

    Raises:
        UnsupportedError: paged, quantised, tiled or left-padded caches, or sequence ids.
    """

    def __init__(self, config: InferenceConfig, *, num_kv_head: int | None = None) -> None:
        super().__init__()
        run = config.neuron_config
        check_cache_config(run)
        self.num_kv_head = num_kv_head if num_kv_head is not None else config.kv_heads
        self.kv_shape = (run.cache_lines, self.num_kv_head, run.cache_slots, config.head_width)
        windowed = [config.sliding_window is not None] * config.num_hidden_layers
        if config.layer_types is not None:
            windowed = [kind == "sliding_attention" for kind in config.layer_types]
        self.k_transposed = tuple(run.k_cache_transposed and not w for w in windowed)
        batch, heads, slots, width = self.kv_shape
        zeros: list[nn.Parameter] = []
        for transposed in self.k_transposed:
            k_shape = (batch, heads, width, slots) if transposed else self.kv_shape
            for shape in (k_shape, self.kv_shape):
                zeros.append(
                    nn.Parameter(torch.zeros(shape, dtype=run.layer_dtype), requires_grad=False)
                )
        self.past_key_values = nn.ParameterList(zeros)

    def get_kv_by_layer_id(
        self, idx: int, seq_len: int | None = None, skip_slice: bool = False, **unserved: Any
    ) -> KeyValue:
        """Cache of one layer.

        Args:
            idx: the layer.
            seq_len: slots to return, from slot 0; None is all.
            skip_slice: return all slots whatever `seq_len` is.
            **unserved: arguments of other caches; must be None.

        Returns:
            K and V, views of the cache; K transposed if the layer's keys are.
        """
        _check_unserved(unserved)
        k, v = self.past_key_values[2 * idx], self.past_key_values[2 * idx + 1]
        if seq_len is None or skip_slice:
            return k, v
        return (k[..., :seq_len] if self.k_transposed[idx] else k[:, :, :seq_len]), v[
            :, :, :seq_len
        ]

    def get_cache(self, seq_len: int | None = None, skip_slice: bool = False) -> list[KeyValue]:
        """Cache of every layer; arguments as in `get_kv_by_layer_id`."""
        layers = range(len(self.k_transposed))
        return [self.get_kv_by_layer_id(i, seq_len, skip_slice) for i in layers]

    def update_kv_by_layer_id(
        self,
        idx: int,
        *,
        position_ids: Tensor,
        kv_per_layer: KeyValue,
        is_for_context_encoding: bool = False,
        seq_ids: Tensor | None = None,
        seq_len: int | None = None,
        kvcache_buffer: Sequence[KeyValue] | None = None,
        **unserved: Any,
    ) -> KeyValue:
        """Cache of one layer with a step's keys and values in it.

        Args:
            idx: the layer.
            position_ids: `(batch, seq_len)`, integer; where to write. Prefill and decode are alike.
            kv_per_layer: K and V of the step, each `(batch, kv_heads, seq_len, head_dim)`, BHSD.
            is_for_context_encoding: prefill; no difference in a contiguous cache.
            seq_ids: must be None.
            seq_len: no difference; slots beyond it stay as they are.
            kvcache_buffer: write into a copy of `kvcache_buffer[idx]` instead of the own cache.
            **unserved: arguments of other caches; must be None.

        Returns:
            The whole updated K and V of the layer.

        Raises:
            ShapeError: the new tensors do not fit the cache or the positions.
            UnsupportedError: `seq_ids` is given.
        """
        del is_for_context_encoding, seq_len
        _check_unserved(unserved)
        if seq_ids is not None:
            raise UnsupportedError(
                explain("seq_ids", "be None in this version", "ids", "row b owns cache line b")
            )
        own = self.get_kv_by_layer_id(idx)
        k_cache, v_cache = own if kvcache_buffer is None else kvcache_buffer[idx]
        k, v = kv_per_layer
        batch, heads, _, width = self.kv_shape
        expected = (batch, heads, position_ids.shape[-1], width)
        for name, new in (("k", k), ("v", v)):
            if tuple(new.shape) != expected or position_ids.shape[0] != batch:
                raise ShapeError(
                    explain(name, f"have shape {expected}, BHSD", tuple(new.shape), "is it BHSD?")
                )
        if self.k_transposed[idx]:
            k_new = write_positions(k_cache.transpose(2, 3), k, position_ids).transpose(2, 3)
        else:
            k_new = write_positions(k_cache, k, position_ids)
        return k_new, write_positions(v_cache, v, position_ids)

    def update_cache(
        self,
        is_for_context_encoding: bool,
        seq_ids: Tensor | None,
        position_ids: Tensor,
        new_key_values: Sequence[KeyValue],
        seq_len: int | None = None,
        kvcache_buffer: Sequence[KeyValue] | None = None,
        **unserved: Any,
    ) -> list[Tensor]:
        """Caches of every layer with a step's keys and values in them.

        Args:
            is_for_context_encoding: as in `update_kv_by_layer_id`, like the rest.
            seq_ids: must be None.
            position_ids: `(batch, seq_len)`.
            new_key_values: per layer, K and V of the step.
            seq_len: no difference.
            kvcache_buffer: per layer, the K and V to write into copies of.
            **unserved: must be None.

        Returns:
            `[K0, V0, K1, V1, ...]`, the order of `past_key_values`.
        """
        updated: list[Tensor] = []
        for idx, kv in enumerate(new_key_values):
            updated.extend(
                self.update_kv_by_layer_id(
                    idx,
                    position_ids=position_ids,
                    kv_per_layer=kv,
                    is_for_context_encoding=is_for_context_encoding,
                    seq_ids=seq_ids,
                    seq_len=seq_len,
                    kvcache_buffer=kvcache_buffer,
                    **unserved,
                )
            )
        return updated

    def store(self, idx: int, kv: KeyValue) -> None:
        """Put an updated layer in place, keeping the storage of the cache.

        Args:
            idx: the layer.
            kv: what `update_kv_by_layer_id` returned.
        """
        with torch.no_grad():
            for own, new in zip(self.get_kv_by_layer_id(idx), kv, strict=True):
                own.copy_(new)

    def reset(self) -> None:
        """Forget everything: all slots become zero."""
        with torch.no_grad():
            for cache in self.past_key_values:
                cache.zero_()


def _check_unserved(unserved: dict[str, Any]) -> None:
    given = sorted(name for name, value in unserved.items() if value is not None)
    if given:
        raise AttentionError(
            explain("cache arguments", "be those of a contiguous cache", given, "leave them None")
        )
