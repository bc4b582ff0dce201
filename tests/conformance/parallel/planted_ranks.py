"""Mistakes planted in `impl` on ranks; each rank is a process of its own, so nothing is undone."""

import math
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

import impl.attention_core
import impl.flash_decoding
import impl.state_dict
from conformance.subjects import impl_parallel
from conformance.subjects.impl_parallel import RankCall, run_rank
from impl.attention_core import AttentionCore
from impl.lora import LayerLora
from impl.parallel.groups import ALONE
from impl.parallel.head_layout import HeadLayout
from impl.parallel.layer import LayerParallel, PhaseHeads
from impl.parallel.linear import RowParallelLinear
from impl.parallel.phases import DecodePhase

Result = dict[str, Any]
MAPS = sys.modules["impl.parallel.rank_maps"]  # the package has a function of this name


def o_bias_on_every_rank(rank: int, world_size: int, call: RankCall) -> Result:
    def forward(self: Any, input: torch.Tensor, reduce: Any = None) -> torch.Tensor:
        return reduce(functional.linear(input, self.weight, self.bias)).to(input.dtype)

    RowParallelLinear.forward = forward
    return run_rank(rank, world_size, call)


def kv_heads_tiled(rank: int, world_size: int, call: RankCall) -> Result:
    right = MAPS.head_layout

    def tiled(*sizes: Any) -> HeadLayout:
        layout = right(*sizes)
        heads = max(layout.key_value) + 1
        slots = tuple(slot % heads for slot in range(len(layout.key_value)))
        return HeadLayout(layout.tp_degree, layout.query, slots)

    MAPS.head_layout = tiled
    return run_rank(rank, world_size, call)


def decode_weights_in_rank_order(rank: int, world_size: int, call: RankCall) -> Result:
    """Ranks load the decode weights of their own number, though the mesh orders them."""
    right = impl.state_dict._phases

    def plain(module: Any) -> Any:
        (before, first, heads), (after, second, _) = right(module)
        config, spread = call.config, call.parallelism
        maps = MAPS.rank_maps(
            spread.tp_degree,
            config.num_attention_heads,
            config.num_key_value_heads,
            cp_degree=spread.cp_degree,
        )
        place = maps.decode.ordering.index(rank)
        return [(before, first, heads), (after, second, PhaseHeads(maps.decode, place, ALONE))]

    impl.state_dict._phases = plain
    return run_rank(rank, world_size, call)


def mask_off_by_one(rank: int, world_size: int, call: RankCall) -> Result:
    """Queries behind the first part of the sequence miss their own key."""
    right = impl.attention_core.prefill

    def late(*tensors: Any, rule: Any, position_ids: torch.Tensor, **others: Any) -> Any:
        moved = position_ids - (position_ids > 0).to(torch.int64) if rank >= 2 else position_ids
        return right(*tensors, rule=rule, position_ids=moved, **others)

    impl.attention_core.prefill = late
    return run_rank(rank, world_size, call)


def kv_written_for_another_head(rank: int, world_size: int, call: RankCall) -> Result:
    right = LayerParallel.for_cache
    if rank == 1:
        LayerParallel.for_cache = lambda self, x: right(self, x.flip(1))
    return run_rank(rank, world_size, call)


def sinks_of_another_rank(rank: int, world_size: int, call: RankCall) -> Result:
    right = impl_parallel._build

    def build(given: RankCall) -> Any:
        module, options = right(given)
        if rank == 1:
            sink = module.learned_sinks.sink
            sink.copy_(torch.from_numpy(given.weights["sinks"][: len(sink)]))
        return module, options

    impl_parallel._build = build
    return run_rank(rank, world_size, call)


def adapters_of_prefill_in_decode(rank: int, world_size: int, call: RankCall) -> Result:
    """Decode adds the adapters of the heads of the rank's own number, not of those it holds."""
    right = LayerLora._own

    def plain(self: Any, target: str, slots: Any, *matrices: torch.Tensor) -> Any:
        decodes = len(slots) == 1
        return right(self, target, (rank,) if decodes else slots, *matrices)

    LayerLora._own = plain
    return run_rank(rank, world_size, call)


def batch_rows_swapped(rank: int, world_size: int, call: RankCall) -> Result:
    right = DecodePhase.rows

    def swapped(self: Any, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return right(self, x.roll(x.shape[dim] // 2, dim), dim)

    DecodePhase.rows = swapped
    return run_rank(rank, world_size, call)


def base_two_row_sums(rank: int, world_size: int, call: RankCall) -> Result:
    """Rank 1 hands over the logarithm of its rows in base two, and others take it for natural."""
    if rank == 1:
        impl.flash_decoding.row_sums = _in_base_two(impl.flash_decoding.row_sums)
    return run_rank(rank, world_size, call)


def base_two_row_sums_on_all(rank: int, world_size: int, call: RankCall) -> Result:
    impl.flash_decoding.row_sums = _in_base_two(impl.flash_decoding.row_sums)
    return run_rank(rank, world_size, call)


def _in_base_two(right: Any) -> Any:

    def in_base_two(scores: torch.Tensor) -> Any:
        sums = right(scores)
        return sums._replace(largest=sums.largest / math.log(2))

    return in_base_two


def prefix_counted_from_own_tokens(rank: int, world_size: int, call: RankCall) -> Result:
    """The last context-parallel rank takes cached keys to end where its own queries begin."""
    right = AttentionCore._gathered_prior

    def moved(self: Any, *given: Any) -> Any:
        prior = right(self, *given)
        held = prior.positions
        shift = call.prompts[0].position_ids.shape[1] // call.parallelism.cp_degree
        return replace(prior, positions=torch.where(held >= 0, held + shift, held))

    if rank >= world_size - world_size // call.parallelism.cp_degree:
        AttentionCore._gathered_prior = moved
    return run_rank(rank, world_size, call)


def prefix_of_own_heads(rank: int, world_size: int, call: RankCall) -> Result:
    """Ranks read the heads that decode left them as if they were those of prefill."""

    def own(self: Any, prior: Any, owners: Any = None) -> Any:
        copies = len(self.prefill_heads.key_value) // prior.k.shape[1]
        k, v = (x.repeat_interleave(copies, dim=1) for x in (prior.k, prior.v))
        return replace(prior, k=k, v=v)

    LayerParallel.gather_prior = own
    return run_rank(rank, world_size, call)


def segments_cut_by_piece(rank: int, world_size: int, call: RankCall) -> Result:
    """Every rank counts sequences from the first token of the row."""
    right = impl.attention_core.together

    def first(segments: torch.Tensor, of_keys: torch.Tensor) -> torch.Tensor:
        return right(of_keys[: len(segments)], of_keys)

    impl.attention_core.together = first
    return run_rank(rank, world_size, call)


def sequences_kept_by_every_rank(rank: int, world_size: int, call: RankCall) -> Result:
    """Packed sequences are read from the first data-parallel ranks, whoever keeps them."""
    right = LayerParallel.gather_prior

    def first(self: Any, prior: Any, owners: Any = None) -> Any:
        return right(self, prior, torch.zeros_like(owners))

    LayerParallel.gather_prior = first
    return run_rank(rank, world_size, call)


def killed_in_decode(rank: int, world_size: int, call: RankCall) -> Result:
    right = DecodePhase.reduce

    def reduce(self: Any, product: torch.Tensor) -> torch.Tensor:
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self, product)

    DecodePhase.reduce = reduce
    return run_rank(rank, world_size, call)
