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


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCall:
    """What every rank is given.

    Attributes:
        config: the layer.
        parallelism: how it is spread.
        dtype: of all tensors.
        weights: the whole layer's, by the field names of `golden.AttentionWeights`.
        hidden_states: `(batch, q_len, hidden_size)`, the prompt in order.
        position_ids: `(batch, q_len)`, -1 for padding on the right.
        given: by rank, the prompt's tokens that it is handed, in the order it is handed them.
        order: the prompt's tokens in the order that positions and masks are handed over in.
        next_states: `(batch, steps, hidden_size)`, of the tokens decoded one after another.
        next_positions: `(batch, steps)`.
        slots: longest sequence.
        lora: the whole layer's adapters, and which of them each row uses; None without.
    """

    config: AttentionConfig
    parallelism: Parallelism
    dtype: str
    weights: Mapping[str, Array]
    hidden_states: Array
    position_ids: NDArray[np.int64]
    given: tuple[NDArray[np.int64], ...]
    order: NDArray[np.int64]
    next_states: Array
    next_positions: NDArray[np.int64]
    slots: int
    lora: Lora | None = None


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
        `prefill attn` and `decode attn`: outputs of the rank's heads, BHSD;
        `decode logsumexp_sent`, with flash decoding: of its own keys, `(batch, heads of its group,
        tokens, 1)`;
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
    positions = torch.from_numpy(call.position_ids[:, call.order])
    states = torch.from_numpy(call.hidden_states[:, call.given[rank]]).to(dtype)
    cache: dict[str, Any] = {"kv_mgr": manager, "update_kv_per_layer": True, "idx": 0, **options}
    cache["adapter_ids"] = None if call.lora is None else whole(call.lora.adapter_ids)
    place = call.parallelism.interleave
    first = module(
        states,
        attention_mask=positions >= 0,
        position_ids=positions,
        residual=states if place == "before_global" else None,
        **cache,
    )
    manager.store(0, first.present_key_value)
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
    k, v = (_by_position(x, rank % cores, cores) for x in manager.get_kv_by_layer_id(0))
    found = {
        "prefill": first.hidden_states,
        "prefill attn": heads.seen[0],
        "decode": torch.cat(later, dim=1),
        "decode attn": torch.cat(heads.seen[1:], dim=2),
        "k_cache": k,
        "v_cache": v,
    }
    if sent.seen:
        found["decode logsumexp_sent"] = torch.cat(sent.seen, dim=2)
    return {name: value.to(torch.float64).numpy() for name, value in found.items()}


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
    batch = call.hidden_states.shape[0]
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
        },
        model={"num_cores_per_group": cores},
        adapters=Tensors(dtype).adapters(call.lora),
        layer={**flags, "num_cores_per_group": cores},
    )
