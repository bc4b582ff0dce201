"""`impl` served from a cache: every step through the module and its cache manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

import impl
from conformance.cases import Case
from conformance.subjects.base import Unsupported
from conformance.subjects.serving import ServeCall, ServeOutput, ServeStep
from impl.slot_positions import slot_positions

Layer: TypeAlias = tuple[impl.NeuronAttentionBase, dict[str, Any]]
"""A module, and keyword arguments for its forward."""


def serving_gap(case: Case) -> str | None:
    """Return what the module does not serve of a schedule, None if it serves it all."""
    schedule = case.workload.schedule
    if schedule is None:
        return None
    kinds = {part.kind for part in schedule.parts}
    if "packed" in kinds:
        return "the module packs no sequences side by side into a row"
    if case.config.attention_chunk_size is not None and kinds & {"draft", "tree"}:
        return "the module decodes one token a step in a chunked layer"
    return None


class Server:
    """A module and its cache, taking the steps of a call.

    Prompts on cached tokens are context encoding of a later window of the prompt; drafts are
    decode steps with an `active_mask`.

    Attributes:
        lengths: `(cache_rows,)`, int64, tokens that each row holds.
    """

    def __init__(self, call: ServeCall, make: Callable[..., Layer]) -> None:
        self.call = call
        self.dtype = next(iter(call.weights.values())).dtype
        self.left = call.cache.layout == "contiguous" and _only_left(call)
        longest = max(step.hidden_states.shape[1] for step in call.steps)
        self.module, self.keywords = make(
            call,
            k_cache_transposed=call.cache.layout == "transposed",
            padding_side="left" if self.left else "right",
            windowed_context_encoding_size=longest,
        )
        self.manager = impl.KVCacheManager(self._cache_config(), kv_scales=self._scales())
        self.lengths = call.prior_lengths.clone()
        if call.k_prior is not None and call.v_prior is not None:
            place = torch.arange(call.k_prior.shape[2])
            self.manager.write_kv_by_layer_id(
                0,
                position_ids=torch.where(place < self.lengths[:, None], place, -1),
                kv_per_layer=(call.k_prior, call.v_prior),
                active_block_table=call.block_tables,
            )

    def _cache_config(self) -> impl.InferenceConfig:
        call, kind, config = self.call, self.call.cache, self.call.config
        run: dict[str, Any] = {
            "torch_dtype": self.dtype,
            "batch_size": call.cache_rows,
            "seq_len": call.max_length,
            "k_cache_transposed": kind.layout == "transposed",
            "padding_side": "left" if self.left else "right",
            "is_continuous_batching": True,
            "flash_decoding_enabled": kind.layout == "sharded",
        }
        if kind.layout == "paged":
            run |= {"is_block_kv_layout": True, "is_prefix_caching": True}
            run |= {"pa_num_blocks": call.num_blocks, "pa_block_size": kind.size}
        if kind.layout == "rolling":
            run["speculation_length"] = call.speculation_length
        if call.keys_as is not None:
            run |= {"kv_cache_quant": True, "kv_cache_quant_dtype": call.keys_as.dtype}
        return impl.InferenceConfig(
            neuron_config=impl.NeuronConfig(**run),
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window if kind.layout == "rolling" else None,
            attention_chunk_size=config.attention_chunk_size if kind.layout == "chunk" else None,
            num_cores_per_group=kind.size if kind.layout == "sharded" else 1,
        )

    def _scales(self) -> list[tuple[Tensor, Tensor]] | None:
        keys, values = self.call.keys_as, self.call.values_as
        if keys is None or values is None or keys.scale is None or values.scale is None:
            return None
        return [(keys.scale, values.scale)]

    def _table(self, rows: Tensor) -> Tensor | None:
        """Return the block tables of cache rows; None for other caches."""
        tables = self.call.block_tables
        return None if tables is None else tables[rows.clamp(min=0)]

    def take(self, step: ServeStep, norm: Any) -> Tensor:
        """Take one step and write its tokens.

        Raises:
            Unsupported: a step that the module has no form of.
        """
        if step.kind == "packed" or step.residual is not None or step.adapter_ids is not None:
            raise Unsupported(f"the module has no such step: {step.kind}")
        ids = torch.arange(self.call.cache_rows) if step.seq_ids is None else step.seq_ids
        table = self._table(ids)
        call: dict[str, Any] = {"position_ids": step.position_ids, "rmsnorm": norm, "idx": 0}
        call |= {"rotary_position_ids": step.rotary_position_ids, "kv_mgr": self.manager}
        call |= {"seq_ids": step.seq_ids, "active_block_table": table, **self.keywords}
        if self._finds_tokens(step, ids):
            call |= {"get_kv_per_layer": True, **self._phase(step)}
        else:
            call["attention_mask"] = step.position_ids >= 0
        seen = step.active_mask
        as_a_chain = seen is None or torch.equal(seen, seen.new_ones(seen.shape).tril())
        result = self.module(step.hidden_states, update_kv_per_layer=as_a_chain, **call)
        if as_a_chain:
            self.manager.store(0, result.present_key_value)
        else:
            # siblings of a tree share a position, so only the accepted path may be written
            self.manager.write_kv_by_layer_id(
                0,
                position_ids=torch.where(step.kept, step.position_ids, -1),
                kv_per_layer=result.present_key_value,
                seq_ids=step.seq_ids,
                active_block_table=table,
            )
        newest = torch.where(step.kept, step.position_ids, -1).amax(dim=1)
        for row, last in zip(ids.tolist(), newest.tolist(), strict=True):
            if row >= 0 and last >= 0:
                self.lengths[row] = last + 1
        output: Tensor = result.hidden_states
        return output

    def _finds_tokens(self, step: ServeStep, ids: Tensor) -> bool:
        """Whether the step decodes, or some of its rows continue what is cached."""
        if step.kind in ("decode", "drafts"):
            return True
        first = torch.where(step.position_ids < 0, self.call.max_length, step.position_ids)
        return bool(((first.amin(dim=1) > 0) & (ids >= 0) & (step.position_ids >= 0).any(1)).any())

    def _phase(self, step: ServeStep) -> dict[str, Any]:
        """Return what tells the module the phase of a step that reads the cache."""
        if step.kind in ("prompt", "piece"):
            return {"windowed_context_encoding_window_idx": max(step.piece, 1)}
        if step.active_mask is None or step.hidden_states.shape[1] == 1:
            return {}
        return {"active_mask": step.active_mask[None, None]}

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Return what the cache holds, `(cache_rows, heads, max_length, head_dim)`."""
        rows = torch.arange(self.call.cache_rows)
        k, v = self.manager.get_kv_by_layer_id(0, active_block_table=self._table(rows))
        if self.manager.caches[0].k_transposed:
            k = k.transpose(2, 3)
        held = slot_positions(self.manager.layout(0), self.lengths, v.shape[2])
        row, slot = torch.nonzero(held >= 0, as_tuple=True)
        found = []
        for stored in (k, v):
            heads, width = stored.shape[1], stored.shape[3]
            place = stored.new_zeros(len(rows), heads, self.call.max_length, width)
            place[row, :, held[row, slot]] = stored[row, :, slot]
            found.append(place)
        return found[0], found[1]


def _only_left(call: ServeCall) -> bool:
    """Whether every prompt starts sequences anew and is padded on the left, if at all."""
    prompts = [step for step in call.steps if step.kind in ("prompt", "piece")]
    padded = any(bool((step.position_ids[:, 0] < 0).any()) for step in prompts)
    whole = all(
        step.kind in ("prompt", "decode")
        and (step.kind == "decode" or bool((step.position_ids.amax(dim=1) >= 0).all()))
        for step in call.steps
    )
    return padded and whole and len(prompts) == 1 and call.k_prior is None


def serve(call: ServeCall, make: Callable[..., Layer], norm: Any) -> ServeOutput:
    """Serve a schedule.

    Args:
        call: the schedule.
        make: builds the module of a call; takes fields of `impl.NeuronConfig` besides.
        norm: norm of the input, or None.
    """
    server = Server(call, make)
    with torch.no_grad():
        outputs = [server.take(step, norm) for step in call.steps]
        k, v = server.by_position()
    return ServeOutput(outputs=outputs, k_cache=k, v_cache=v)
