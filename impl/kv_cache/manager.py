"""The cache manager: keys and values of every layer, by the names NxD Inference users know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from impl.config import InferenceConfig
from impl.errors import AttentionError, ConfigError, ShapeError, explain
from impl.kv_cache.codec import Codec
from impl.kv_cache.lines import cache_lines
from impl.kv_cache.plan import plan_caches
from impl.kv_cache.step import Step
from impl.slot_positions import SlotLayout

KeyValue: TypeAlias = tuple[Tensor, Tensor]
Scales: TypeAlias = tuple[Tensor | float, Tensor | float]


class KVCacheManager(nn.Module):
    """Keeps K and V of every layer and writes new tokens by position.

    `update_*` is functional: it returns the new cache and changes nothing, so a step can be traced
    and its outputs aliased to the cache; `store` puts a result into place. `write_kv_by_layer_id`
    does both at once without a copy, and so does a layer's decode step under
    `attn_block_tkg_nki_kernel_cache_update`.

    Which cache a layer gets follows from the configuration; `impl.kv_cache.plan` says how. What
    slots hold at a step follows from `layout` and the step's positions, so a slot left over from an
    earlier sequence or a rejected draft is never seen (`impl.slot_positions`).

    Attributes:
        caches: the cache of each layer.
        past_key_values: `K0, V0, K1, V1, ...` as stored, zeros at first.

    Args:
        config: gives layers, lines, lengths, kinds and dtypes.
        num_kv_head: KV heads of this rank; None is the model's.
        core: under flash decoding this core's rank among the `num_cores_per_group` of its group;
            None keeps the slots of all of them side by side, in one process.
        dp_rank: this rank among the `attention_dp_degree` that divide the sequence ids.
        kv_scales: static scales of keys and of values, a pair per layer; None casts directly.

    Raises:
        ConfigError: a field is missing or does not fit another.
        UnsupportedError: a combination that no cache here keeps.
    """

    def __init__(
        self,
        config: InferenceConfig,
        *,
        num_kv_head: int | None = None,
        core: int | None = None,
        dp_rank: int = 0,
        kv_scales: Sequence[Scales] | None = None,
    ) -> None:
        super().__init__()
        run = config.neuron_config
        self.caches = plan_caches(config, num_kv_head, core=core)
        if not 0 <= dp_rank < run.attention_dp_degree:
            raise ConfigError(
                explain("dp_rank", f"be in 0..{run.attention_dp_degree - 1}", dp_rank)
            )
        self.dp_rank, self.dp_degree = dp_rank, run.attention_dp_degree
        self.lines = run.cache_lines // run.attention_dp_degree
        self.first_line = dp_rank * self.lines
        if kv_scales is not None and (not run.kv_cache_quant or len(kv_scales) != len(self.caches)):
            raise ConfigError(
                explain(
                    "kv_scales",
                    "come with kv_cache_quant and have a pair per layer",
                    f"{run.kv_cache_quant} and {len(kv_scales)} for {len(self.caches)}",
                )
            )
        stored = run.kv_cache_quant_dtype if run.kv_cache_quant else run.layer_dtype
        codecs: list[Codec] = []
        zeros: list[nn.Parameter] = []
        for idx, cache in enumerate(self.caches):
            scales = (None, None) if kv_scales is None else kv_scales[idx]
            for keys, scale in zip((True, False), scales, strict=True):
                codecs.append(
                    Codec(
                        stored,
                        run.layer_dtype,
                        heads=cache.heads,
                        width=cache.width,
                        scale=scale,
                        bound=run.kv_cache_quant_bound,
                    )
                )
                empty = torch.zeros(cache.stored_shape(keys), dtype=stored)
                zeros.append(nn.Parameter(empty, requires_grad=False))
        self.codecs = nn.ModuleList(codecs)
        self.past_key_values = nn.ParameterList(zeros)

    def layout(self, idx: int) -> SlotLayout:
        """Which position each slot of a layer holds, as `slot_positions` takes it."""
        return self.caches[idx].layout

    def seated(self, position_ids: Tensor, seq_ids: Tensor | None) -> Tensor:
        """Positions of a step with those of idle rows set to -1, so that they find nothing.

        Args:
            position_ids: `(batch, seq_len)`, integer.
            seq_ids: as in `update_kv_by_layer_id`.

        Returns:
            Like `position_ids`, int64.
        """
        lines = self._lines(seq_ids, position_ids)
        return position_ids.to(torch.int64).masked_fill(lines[:, None] < 0, -1)

    def owners(self, seq_ids: Tensor, batch: int) -> Tensor:
        """Which data-parallel rank keeps each sequence.

        Args:
            seq_ids: `(batch,)`, integer.
            batch: sequences of the step.

        Returns:
            `(batch,)`, int64; negative for a sequence that none keeps.

        Raises:
            ShapeError: ids of another shape or dtype.
        """
        every = cache_lines(seq_ids, batch, self.lines * self.dp_degree, seq_ids.device)
        return torch.div(every, self.lines, rounding_mode="floor")

    def get_kv_by_layer_id(
        self,
        idx: int,
        seq_len: int | None = None,
        skip_slice: bool = False,
        *,
        seq_ids: Tensor | None = None,
        active_block_table: Tensor | None = None,
        kvcache_buffer: Sequence[KeyValue] | None = None,
        is_for_context_encoding: bool = False,
        scatter_index: Tensor | None = None,
        **unserved: Any,
    ) -> KeyValue:
        """Cache of one layer, as the layer takes it.

        Args:
            idx: the layer.
            seq_len: positions in use lie below it, so slots beyond are left out; None is all.
            skip_slice: return all slots whatever `seq_len` is.
            seq_ids: `(batch,)`, integer, sequence of each row; None is every line in order.
            active_block_table: `(batch, blocks)`, integer; for a paged cache, and only there.
            kvcache_buffer: read `kvcache_buffer[idx]`, as stored, in place of the own cache.
            is_for_context_encoding: no difference.
            scatter_index: no difference; it is where an update writes.
            **unserved: arguments of other caches; must be None.

        Returns:
            K and V in the layer's dtype, `(batch, kv_heads, slots, head_dim)`, BHSD, K with its
            last axes exchanged if the layer's keys are transposed. Views of the cache if it stores
            the layer's dtype and neither `seq_ids` nor a table is given.
        """
        del is_for_context_encoding, scatter_index
        _check_unserved(unserved)
        cache = self.caches[idx]
        lines = None
        if seq_ids is not None:
            batch = seq_ids.shape[0] if seq_ids.dim() else 0
            lines = cache_lines(
                seq_ids, batch, self.lines, seq_ids.device, first_line=self.first_line
            )
        found: list[Tensor] = []
        for keys, stored in zip((True, False), self.stored_kv(idx, kvcache_buffer), strict=True):
            rows = cache.read(
                stored,
                keys,
                lines=lines,
                block_table=active_block_table,
                length=None if skip_slice else seq_len,
            )
            rows = self._codec(idx, keys).decode(rows)
            found.append(rows.transpose(2, 3) if keys and cache.k_transposed else rows)
        return found[0], found[1]

    def get_cache(
        self, seq_len: int | None = None, skip_slice: bool = False, **arguments: Any
    ) -> list[KeyValue]:
        """Cache of every layer; arguments as in `get_kv_by_layer_id`."""
        layers = range(len(self.caches))
        return [self.get_kv_by_layer_id(i, seq_len, skip_slice, **arguments) for i in layers]

    def update_kv_by_layer_id(
        self,
        idx: int,
        *,
        position_ids: Tensor,
        kv_per_layer: KeyValue,
        is_for_context_encoding: bool = False,
        seq_ids: Tensor | None = None,
        seq_len: int | None = None,
        scatter_index: Tensor | None = None,
        active_block_table: Tensor | None = None,
        kvcache_buffer: Sequence[KeyValue] | None = None,
        **unserved: Any,
    ) -> KeyValue:
        """Cache of one layer with a step's keys and values in it.

        Of a prompt longer than the layer's cache the tokens stay that later ones can see. A token
        that must not be cached (padding, a rejected draft) has a negative position. Tokens of one
        row must not share a position. Of a rolling cache `speculation_length` must cover the step:
        more rejected drafts than its ring has room for have overwritten tokens still in reach.

        Args:
            idx: the layer.
            position_ids: `(batch, seq_len)`, integer; where to write. Prefill and decode are alike.
            kv_per_layer: K and V of the step, each `(batch, kv_heads, seq_len, head_dim)`, BHSD.
            is_for_context_encoding: prefill; no difference.
            seq_ids: `(batch,)`, integer, sequence of each row; one that has no line here writes
                nothing. None takes lines in order, and leaves those beyond the batch alone.
            seq_len: no difference; slots beyond it stay as they are.
            scatter_index: `(batch, seq_len)`, integer: slots to write in place of those that follow
                from `position_ids`, negative for none; the slot mapping of a paged cache.
            active_block_table: `(batch, blocks)`, integer; for a paged cache without
                `scatter_index`.
            kvcache_buffer: write into a copy of `kvcache_buffer[idx]` instead of the own cache.
            **unserved: arguments of other caches; must be None.

        Returns:
            The whole updated K and V of the layer, as stored.

        Raises:
            ShapeError: tensors do not fit the cache or each other.
        """
        del is_for_context_encoding, seq_len
        _check_unserved(unserved)
        k, v = self.stored_kv(idx, kvcache_buffer)
        fresh = (
            k.clone(memory_format=torch.contiguous_format),
            v.clone(memory_format=torch.contiguous_format),
        )
        self._write(
            idx, fresh, position_ids, kv_per_layer, seq_ids, scatter_index, active_block_table
        )
        return fresh

    def write_kv_by_layer_id(
        self,
        idx: int,
        *,
        position_ids: Tensor,
        kv_per_layer: KeyValue,
        is_for_context_encoding: bool = False,
        seq_ids: Tensor | None = None,
        seq_len: int | None = None,
        scatter_index: Tensor | None = None,
        active_block_table: Tensor | None = None,
        kvcache_buffer: Sequence[KeyValue] | None = None,
        **unserved: Any,
    ) -> KeyValue:
        """Do what `update_kv_by_layer_id` and `store` do, in place.

        Arguments and result are as there, but `kvcache_buffer[idx]` itself is written to.
        """
        del is_for_context_encoding, seq_len
        _check_unserved(unserved)
        stored = self.stored_kv(idx, kvcache_buffer)
        with torch.no_grad():
            self._write(
                idx,
                stored,
                position_ids,
                kv_per_layer,
                seq_ids,
                scatter_index,
                active_block_table,
            )
        return stored

    def slots_read(
        self,
        idx: int,
        position_ids: Tensor,
        *,
        seq_len: int | None = None,
        seq_ids: Tensor | None = None,
        scatter_index: Tensor | None = None,
        **others: Any,
    ) -> Tensor | None:
        """Slots that a step's tokens go to in what `get_kv_by_layer_id` returns as views.

        Args:
            idx: the layer.
            position_ids: `(batch, seq_len)`, integer; negative for padding.
            seq_len: as in `get_kv_by_layer_id`, like the rest.
            seq_ids: see `seq_len`.
            scatter_index: see `seq_len`; the slots themselves.
            **others: no difference.

        Returns:
            `(batch, seq_len)`, int64, negative for nowhere; None if copies are returned, or not all
            of the slots.

        Raises:
            ShapeError: `scatter_index` has another shape.
        """
        del others
        if seq_ids is not None or self._codec(idx, True).codes:
            return None
        _check_scatter_index(scatter_index, position_ids)
        positions = position_ids.to(torch.int64)
        return self.caches[idx].slots_read(positions, scatter_index, length=seq_len)

    def stored_kv(self, idx: int, kvcache_buffer: Sequence[KeyValue] | None = None) -> KeyValue:
        """K and V of a layer as they are stored, those of `kvcache_buffer` if it is given."""
        if kvcache_buffer is not None:
            return kvcache_buffer[idx]
        return self.past_key_values[2 * idx], self.past_key_values[2 * idx + 1]

    def update_cache(
        self,
        is_for_context_encoding: bool,
        seq_ids: Tensor | None,
        position_ids: Tensor,
        new_key_values: Sequence[KeyValue],
        seq_len: int | None = None,
        **arguments: Any,
    ) -> list[Tensor]:
        """Caches of every layer with a step's keys and values in them.

        Args:
            is_for_context_encoding: as in `update_kv_by_layer_id`, like the rest.
            seq_ids: `(batch,)` or None.
            position_ids: `(batch, seq_len)`.
            new_key_values: per layer, K and V of the step.
            seq_len: no difference.
            **arguments: see `update_kv_by_layer_id`.

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
                    **arguments,
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
            for own, new in zip(self.stored_kv(idx), kv, strict=True):
                own.copy_(new)

    def reset(self) -> None:
        """Forget everything: all slots become zero."""
        with torch.no_grad():
            for cache in self.past_key_values:
                cache.zero_()

    def _codec(self, idx: int, keys: bool) -> Codec:
        codec = self.codecs[2 * idx + (not keys)]
        assert isinstance(codec, Codec)
        return codec

    def _lines(self, seq_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        return cache_lines(
            seq_ids,
            position_ids.shape[0],
            self.lines,
            position_ids.device,
            first_line=self.first_line,
        )

    def _write(
        self,
        idx: int,
        stored: KeyValue,
        position_ids: Tensor,
        kv_per_layer: KeyValue,
        seq_ids: Tensor | None,
        scatter_index: Tensor | None,
        block_table: Tensor | None,
    ) -> None:
        cache = self.caches[idx]
        if position_ids.dim() != 2 or position_ids.is_floating_point():
            raise ShapeError(
                explain(
                    "position_ids",
                    "be integers (batch, seq_len)",
                    f"{position_ids.dtype} {tuple(position_ids.shape)}",
                )
            )
        _check_scatter_index(scatter_index, position_ids)
        batch, seq_len = position_ids.shape
        expected = (batch, cache.heads, seq_len, cache.width)
        for name, new in zip(("k", "v"), kv_per_layer, strict=True):
            if tuple(new.shape) != expected:
                raise ShapeError(
                    explain(name, f"have shape {expected}, BHSD", tuple(new.shape), "is it BHSD?")
                )
        step = Step(
            positions=position_ids.to(torch.int64),
            lines=self._lines(seq_ids, position_ids),
            scatter_index=scatter_index,
            block_table=block_table,
        )
        places = cache.places(step)
        for keys, own, new in zip((True, False), stored, kv_per_layer, strict=True):
            cache.write(own, keys, self._codec(idx, keys).encode(new), step, places)


def _check_scatter_index(scatter_index: Tensor | None, position_ids: Tensor) -> None:
    if scatter_index is not None and scatter_index.shape != position_ids.shape:
        shape = tuple(position_ids.shape)
        raise ShapeError(
            explain("scatter_index", f"have shape {shape}", tuple(scatter_index.shape))
        )


def _check_unserved(unserved: dict[str, Any]) -> None:
    given = sorted(name for name, value in unserved.items() if value is not None)
    if given:
        raise AttentionError(
            explain("cache arguments", "be those a cache here reads", given, "leave them None")
        )
