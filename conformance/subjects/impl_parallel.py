"""`impl` on one rank of many: prefill, then decode steps, with the rank's own cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import impl
from conformance.subjects.impl_layer import make_layer
from conformance.tensors import Tensors, whole
from golden import Array, AttentionConfig, Lora
from golden.sharding import Parallelism

BLOCK = 16
"""Slots of a block of a paged cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCall:
    """One call of a prompt, whole or a piece, or a row of packed prompts.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`, in order; `(1, q_len, hidden_size)` if packed.
        position_ids: `(batch, q_len)`, -1 for padding on the right; likewise.
        given: by rank, the tokens that it is handed, in the order it is handed them.
        order: the tokens in the order that positions and masks are handed over in.
        num_queries: new tokens of each packed sequence; None unless packed.
        computed_context_lens: cached tokens of each; likewise.
    """

    hidden_states: Array
    position_ids: NDArray[np.int64]
    given: tuple[NDArray[np.int64], ...]
    order: NDArray[np.int64]
    num_queries: tuple[int, ...] | None = None
    computed_context_lens: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCall:
    """What every rank is given.

    Attributes:
        config: the layer.
        parallelism: how it is spread.
        dtype: of all tensors.
        weights: the whole layer's, by the field names of `golden.AttentionWeights`.
        batch: sequences.
        prompts: calls of the prompt; each later one goes over what those before it have cached.
        next_states: `(batch, steps, hidden_size)`, of the tokens decoded one after another.
        next_positions: `(batch, steps)`.
        slots: longest sequence.
        lora: the whole layer's adapters, and which of them each row uses; None without.
    """

    config: AttentionConfig
    parallelism: Parallelism
    dtype: str
    weights: Mapping[str, Array]
    batch: int
    prompts: tuple[PromptCall, ...]
    next_states: Array
    next_positions: NDArray[np.int64]
    slots: int
    lora: Lora | None = None

    @property
    def block_tables(self) -> NDArray[np.int64] | None:
        """Blocks of each sequence in the pool of the data-parallel rank that keeps it; if packed.

        `(batch, blocks)`; later blocks of a sequence come first in the pool.
        """
        if self.prompts[0].num_queries is None:
            return None
        share = self.batch // self.parallelism.attention_dp_degree
        pool = np.arange(share * (self.slots // BLOCK))[::-1].reshape(share, -1)
        return np.tile(pool, (self.parallelism.attention_dp_degree, 1))


@dataclass(slots=True)
class _Heads:
    """Keeps what the output projection is given: the outputs of the rank's heads."""

    width: int
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        flat = arguments[0]
        self.seen.append(flat.unflatten(-1, (-1, self.width)).transpose(1, 2))


@dataclass(slots=True)
class _Sent:
    """Keeps the logsumexp of the rank's own keys that flash decoding sends; of no keys it is 0."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        largest, total = (part.flatten(1, 2) for part in arguments[0])
        self.seen.append(torch.where(total == 0, 0.0, largest + total.log()))


def run_rank(rank: int, world_size: int, call: RankCall) -> dict[str, Array]:
    """Run the layer on this rank.

    Returns:
        `prefill` and `decode`: what the layer returned, `(batch, tokens, hidden_size)`;
        `prefill attn` and `decode attn`: outputs of the rank's heads, BHSD; `prefill 1` and on,
        with theirs: of further calls of the prompt; `decode logsumexp_sent`, with flash decoding:
        of its own keys, `(batch, heads of its group, tokens, 1)`;
        `k_cache` and `v_cache`: the rank's cache afterwards. Float64, exact.
    """
    del world_size
    module, options = _build(call)
    dtype = getattr(torch, call.dtype)
    heads = _Heads(call.config.head_dim)
    for phase in (True, False):
        module.get_o_proj(phase).register_forward_pre_hook(heads)
        if module.parallel.shares_weights:
            break
    sent = _Sent()
    if call.parallelism.cores_per_group > 1:
        module.row_sum_exchange.register_forward_pre_hook(sent)
    manager = module.parallel.make_cache(module.config)
    cache: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0, **options}
    tables = call.block_tables
    if tables is not None:
        cache["active_block_table"] = torch.from_numpy(tables)
    cache["adapter_ids"] = None if call.lora is None else whole(call.lora.adapter_ids)
    found: dict[str, Tensor] = {}
    for index, prompt in enumerate(call.prompts):
        states = torch.from_numpy(prompt.hidden_states[:, prompt.given[rank]]).to(dtype)
        output = module(
            states,
            residual=states if call.parallelism.interleave == "before_global" else None,
            **_prompt_arguments(call, index),
            **cache,
        )
        manager.store(0, output.present_key_value)
        name = f"prefill {index}" if index else "prefill"
        found |= {name: output.hidden_states, f"{name} attn": heads.seen[index]}
    later = []
    for step in range(call.next_states.shape[1]):
        now = slice(step, step + 1)
        output = module(
            torch.from_numpy(call.next_states[:, now]).to(dtype),
            position_ids=torch.from_numpy(call.next_positions[:, now]),
            get_kv_per_layer=True,
            **cache,
        )
        manager.store(0, output.present_key_value)
        later.append(output.hidden_states)
    cores = call.parallelism.cores_per_group
    own = None
    if tables is not None:
        own = module.parallel.decode.rows(cache["active_block_table"])
    kept = manager.get_kv_by_layer_id(0, active_block_table=own)
    k, v = (_by_position(x, rank % cores, cores) for x in kept)
    found |= {
        "decode": torch.cat(later, dim=1),
        "decode attn": torch.cat(heads.seen[len(call.prompts) :], dim=2),
        "k_cache": k,
        "v_cache": v,
    }
    if sent.seen:
        found["decode logsumexp_sent"] = torch.cat(sent.seen, dim=2)
    return {name: value.to(torch.float64).numpy() for name, value in found.items()}


def _prompt_arguments(call: RankCall, index: int) -> dict[str, Any]:
    """Return what a call of the prompt is told of its tokens and of those before them."""
    prompt = call.prompts[index]
    if prompt.num_queries is not None:
        return {
            "num_queries": torch.tensor(prompt.num_queries),
            "computed_context_lens": torch.tensor(prompt.computed_context_lens),
            "get_kv_per_layer": True,
        }
    positions = torch.from_numpy(prompt.position_ids[:, prompt.order])
    if index:
        return {
            "position_ids": positions,
            "get_kv_per_layer": True,
            "windowed_context_encoding_window_idx": index,
        }
    return {"position_ids": positions, "attention_mask": positions >= 0}


def _by_position(cache: Tensor, core: int, cores: int) -> Tensor:
    """Put a core's slots at the positions they hold, zeros at those of other cores."""
    if cores == 1:
        return cache
    whole = cache.new_zeros(*cache.shape[:2], cache.shape[2] * cores, cache.shape[3])
    whole[:, :, core::cores] = cache
    return whole


def _build(call: RankCall) -> tuple[impl.NeuronAttentionBase, dict[str, Any]]:
    config, spread = call.config, call.parallelism
    dtype = getattr(torch, call.dtype)
    batch = call.batch
    flags: dict[str, Any] = {}
    if spread.interleave != "none":
        flags = {
            "optimize_interleave_attn": True,
            "is_post_global_attn_layer": spread.interleave == "after_global",
            "is_pre_global_attn_layer": spread.interleave == "before_global",
        }
    cores = spread.cores_per_group
    reduce_dtype = None if spread.reduce_dtype is None else getattr(torch, spread.reduce_dtype)
    return make_layer(
        config,
        {name: torch.from_numpy(np.array(array)).to(dtype) for name, array in call.weights.items()},
        positions=call.slots,
        run={
            "batch_size": batch,
            "seq_len": call.slots,
            "tp_degree": spread.tp_degree,
            "cp_degree": spread.cp_degree,
            "attention_dp_degree": spread.attention_dp_degree,
            "is_continuous_batching": spread.attention_dp_degree > 1,
            "sequence_parallel_enabled": spread.sequence_parallel,
            "strided_context_parallel_kernel_enabled": spread.strided,
            "logical_nc_config": 2 if spread.strided else 1,
            "ep_dispatch_cc_option": spread.ep_dispatch,
            "rpl_reduce_dtype": reduce_dtype,
            "flash_decoding_enabled": cores > 1,
            **_prompt_fields(call),
        },
        model={"num_cores_per_group": cores},
        adapters=Tensors(dtype).adapters(call.lora),
        layer={**flags, "num_cores_per_group": cores},
    )


def _prompt_fields(call: RankCall) -> dict[str, Any]:
    """Return what the configuration says of a prompt in several calls, or of packed prompts."""
    tables = call.block_tables
    if tables is not None:
        return {
            "is_chunked_prefill": True,
            "is_block_kv_layout": True,
            "pa_num_blocks": int(tables.max()) + 1,
            "pa_block_size": BLOCK,
        }
    if len(call.prompts) == 1:
        return {}
    longest = max(prompt.position_ids.shape[1] for prompt in call.prompts)
    return {"windowed_context_encoding_size": longest}
