"""`impl` served: `NeuronAttentionBase` with `KVCacheManager`, step after step of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import impl
from conformance.subjects.base import Unsupported
from conformance.subjects.impl_layer import Layer, make_layer
from conformance.subjects.serving import ServeCall, ServeOutput, ServeStep
from impl.slot_positions import slot_positions


def build_served(call: ServeCall) -> Layer:
    """Build the module of a call.

    Returns:
        The module in evaluation mode, and keyword arguments for its forward.
    """
    return make_layer(
        call.config,
        call.weights,
        positions=call.max_length,
        run=_run_fields(call),
        model=_model_fields(call),
        adapters=call.adapters,
        input_norm=call.input_norm,
    )


def serve(call: ServeCall, layer: Callable[[ServeCall], Layer] = build_served) -> ServeOutput:
    """Take every step of a call, and read the cache back by position.

    Args:
        call: what to serve.
        layer: makes the layer of it.

    Raises:
        Unsupported: the module refuses a step or the cache; its own sentence says why.
    """
    try:
        with torch.no_grad():
            return ImplServer(call, layer).serve()
    except impl.UnsupportedError as error:
        raise Unsupported(str(error)) from error


class ImplServer:
    """A layer of the module and its cache manager, as a model server would drive them.

    * A step finds no cached keys, reads none and is a prompt at once; any other reads the cache.
    * A prompt on a cached prefix is a step of several tokens under `is_prefix_caching`; where the
      layer has chunks, which exclude that, it is a later window of a prompt.
    * A chain of drafts is written whole, as the module does, so that rejected ones stay behind; of
      a tree, whose siblings share a position, only the accepted path is written.

    Args:
        call: what to serve.
        layer: makes the layer of it.
    """

    def __init__(self, call: ServeCall, layer: Callable[[ServeCall], Layer]) -> None:
        self.call = call
        self.module, self.keywords = layer(call)
        scales = None
        if call.keys_as is not None and call.values_as is not None:
            pair = call.keys_as.scale, call.values_as.scale
            if pair[0] is not None and pair[1] is not None:
                scales = [(pair[0], pair[1])]
        self.manager = impl.KVCacheManager(self.module.config, kv_scales=scales)
        self.lengths = call.prior_lengths.clone()
        if call.k_prior is not None and call.v_prior is not None:
            place = torch.arange(call.k_prior.shape[2]).expand(call.cache_rows, -1)
            positions = place.masked_fill(place >= self.lengths[:, None], -1)
            self._write(positions, (call.k_prior, call.v_prior), None)

    def serve(self) -> ServeOutput:
        """Take every step."""
        outputs = [self.take(step) for step in self.call.steps]
        k, v = self._by_position()
        return ServeOutput(outputs=outputs, k_cache=k, v_cache=v)

    def take(self, step: ServeStep) -> Tensor:
        """Take one step and return its output."""
        if step.query_lens is not None and step.key_lens is not None:
            return self._take_packed(step, step.query_lens, step.key_lens)
        first = _first(step.position_ids)
        encodes = step.kind in ("prompt", "piece") and not bool((first > 0).any())
        window = self._window(step, encodes)
        arguments: dict[str, Any] = {**self.keywords, **self._where(step)}
        if encodes:
            arguments["attention_mask"] = step.position_ids >= 0
        elif window < 0 and step.hidden_states.shape[1] > 1:
            arguments["active_mask"] = self._active(step)
        tree = step.active_mask is not None and not _is_chain(step.active_mask)
        result = self.module(
            step.hidden_states,
            position_ids=step.position_ids,
            rotary_position_ids=step.rotary_position_ids,
            residual=step.residual,
            adapter_ids=step.adapter_ids,
            kv_mgr=self.manager,
            get_kv_per_layer=not encodes,
            update_kv_per_layer=not tree,
            windowed_context_encoding_window_idx=window,
            idx=0,
            **arguments,
        )
        if tree:
            kept = step.position_ids.masked_fill(~step.kept, -1)
            self._write(kept, result.present_key_value, step.seq_ids)
        else:
            self.manager.store(0, result.present_key_value)
        self._count(step)
        output: Tensor = result.hidden_states
        return output

    def _take_packed(
        self, step: ServeStep, query_lens: tuple[int, ...], key_lens: tuple[int, ...]
    ) -> Tensor:
        """Take a step that holds sequences side by side."""
        rows = range(len(key_lens)) if step.seq_ids is None else step.seq_ids.tolist()
        queries, keys = torch.tensor(query_lens), torch.tensor(key_lens)
        result = self.module(
            step.hidden_states,
            position_ids=step.position_ids,
            residual=step.residual,
            kv_mgr=self.manager,
            get_kv_per_layer=True,
            update_kv_per_layer=True,
            idx=0,
            num_queries=queries,
            computed_context_lens=keys - queries,
            active_block_table=self._tables(step.seq_ids),
            **self.keywords,
        )
        self.manager.store(0, result.present_key_value)
        for row, length in zip(rows, key_lens, strict=True):
            self.lengths[row] = length
        output: Tensor = result.hidden_states
        return output

    def _window(self, step: ServeStep, encodes: bool) -> int:
        """Which window of a prompt the step is, -1 if the module must not know of any."""
        if step.kind == "piece":
            return step.piece if encodes else max(step.piece, 1)
        chunked = self.call.config.attention_chunk_size is not None
        return 1 if chunked and step.kind == "prompt" and not encodes else -1

    def _active(self, step: ServeStep) -> Tensor:
        tokens = step.hidden_states.shape[1]
        mask = step.active_mask
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return mask[None, None]

    def _where(self, step: ServeStep) -> dict[str, Any]:
        """Keywords that say where the step's sequences are kept."""
        keywords: dict[str, Any] = {}
        if step.seq_ids is not None:
            keywords["seq_ids"] = step.seq_ids
        if self.call.block_tables is not None:
            keywords["active_block_table"] = self._tables(step.seq_ids)
        return keywords

    def _tables(self, seq_ids: Tensor | None) -> Tensor:
        tables = self.call.block_tables
        assert tables is not None
        return tables if seq_ids is None else tables[seq_ids.clamp(min=0)]

    def _write(self, positions: Tensor, new: tuple[Tensor, Tensor], seq_ids: Tensor | None) -> None:
        table = None if self.call.block_tables is None else self._tables(seq_ids)
        updated = self.manager.update_kv_by_layer_id(
            0,
            position_ids=positions,
            kv_per_layer=new,
            seq_ids=seq_ids,
            active_block_table=table,
        )
        self.manager.store(0, updated)

    def _count(self, step: ServeStep) -> None:
        """Note how many tokens each sequence has now."""
        newest = step.position_ids.masked_fill(~step.kept, -1).amax(dim=1)
        for row, position in enumerate(newest.tolist()):
            sequence = row if step.seq_ids is None else int(step.seq_ids[row])
            if sequence >= 0 and position >= 0:
                self.lengths[sequence] = position + 1

    def _by_position(self) -> tuple[Tensor, Tensor]:
        table = self.call.block_tables
        k, v = self.manager.get_kv_by_layer_id(0, active_block_table=table)
        if self.manager.caches[0].k_transposed:
            k = k.transpose(2, 3)
        held = slot_positions(self.manager.layout(0), self.lengths, v.shape[2])
        rows, slots = torch.nonzero(held >= 0, as_tuple=True)
        found = []
        for stored in (k, v):
            shape = (stored.shape[0], stored.shape[1], self.call.max_length, stored.shape[3])
            by_position = stored.new_zeros(shape)
            by_position[rows, :, held[rows, slots]] = stored[rows, :, slots]
            found.append(by_position)
        return found[0], found[1]


def _first(positions: Tensor) -> Tensor:
    """Return each row's first position, `(batch,)`, 0 for a row of padding alone."""
    beyond = torch.iinfo(torch.int64).max
    first = positions.masked_fill(positions < 0, beyond).amin(dim=1)
    return first.masked_fill(first == beyond, 0)


def _is_chain(mask: Tensor) -> bool:
    return torch.equal(mask, torch.ones_like(mask).tril())


def _run_fields(call: ServeCall) -> dict[str, Any]:
    """Return how the module is run: its cache, and what kinds of step it will see."""
    kind = call.cache
    chunked = call.config.attention_chunk_size is not None
    packed = any(step.kind == "packed" for step in call.steps)
    fields: dict[str, Any] = {
        "batch_size": call.cache_rows,
        "seq_len": call.max_length,
        "is_continuous_batching": any(step.seq_ids is not None for step in call.steps),
        "is_prefix_caching": not (chunked or packed) and any(map(_on_prefix, call.steps)),
        "is_chunked_prefill": packed,
        "k_cache_transposed": kind.layout == "transposed",
        "flash_decoding_enabled": kind.layout == "sharded",
    }
    windows = [step.piece_size for step in call.steps if step.kind == "piece"]
    if chunked:
        windows += [step.hidden_states.shape[1] for step in call.steps if _on_prefix(step)]
    if windows:
        fields["windowed_context_encoding_size"] = max(windows)
    if call.speculation_length > 1:
        fields["speculation_length"] = call.speculation_length
    if kind.layout == "contiguous" and any(map(_pads_left, call.steps)):
        fields["padding_side"] = "left"
    if kind.layout == "paged":
        fields |= {
            "is_block_kv_layout": True,
            "pa_num_blocks": call.num_blocks,
            "pa_block_size": kind.size,
        }
    if call.keys_as is not None:
        fields |= {"kv_cache_quant": True, "kv_cache_quant_dtype": call.keys_as.dtype}
    return fields


def _on_prefix(step: ServeStep) -> bool:
    return step.kind == "prompt" and bool((_first(step.position_ids) > 0).any())


def _pads_left(step: ServeStep) -> bool:
    positions = step.position_ids
    return bool(((positions[:, :-1] < 0) & (positions[:, 1:] >= 0)).any())


def _model_fields(call: ServeCall) -> dict[str, Any]:
    """Return what of the model gives its cache another kind than contiguous."""
    layout = call.cache.layout
    if layout == "rolling":
        return {"sliding_window": call.config.sliding_window}
    if layout == "chunk":
        return {"attention_chunk_size": call.config.attention_chunk_size}
    if layout == "sharded":
        return {"num_cores_per_group": call.cache.size}
    return {}
