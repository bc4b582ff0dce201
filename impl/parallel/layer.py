"""What one attention layer needs to know of its ranks: groups, heads and phases."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.config import InferenceConfig
from impl.kernels import PriorKeys
from impl.kv_cache import KVCacheManager
from impl.neuron_config import NeuronConfig
from impl.parallel.collectives import all_gather
from impl.parallel.groups import ALONE, Group, core_group, process_groups
from impl.parallel.head_layout import PADDING, Slots, slots_of
from impl.parallel.phases import DecodePhase, PrefillPhase
from impl.parallel.prior import prior_plan
from impl.parallel.rank_maps import StageMap, rank_maps
from impl.parallel.sharding_strategy import GQA
from impl.parallel.token_order import TokenOrder


class PhaseHeads:
    """Heads of this rank in one phase.

    Args:
        stage: who holds what.
        rank: this rank.
        tp: ranks that share the heads.

    Attributes:
        held: what this rank holds: `query` and `key_value`.
        query: query head in each slot of this rank.
        key_value: KV head in each slot of this rank.
    """

    def __init__(self, stage: StageMap, rank: int, tp: Group) -> None:
        self.held = stage.layout.shard(stage.shard(rank))
        self.query, self.key_value = self.held.query, self.held.key_value
        self._tp = tp
        row = stage.mesh.rows[stage.mesh.coordinates(rank)[0]]
        shards = [stage.layout.shard(stage.shard(other)) for other in row]
        self._all_query = tuple(head for s in shards for head in s.query)
        self._all_key_value = tuple(head for s in shards for head in s.key_value)

    def gather_query(self, flat: Tensor, width: int) -> Tensor:
        """Flat queries of all heads of the model.

        Args:
            flat: `(batch, tokens, slots * width)`, of this rank.
            width: `head_dim`.
        """
        return self._gather(flat, self._all_query, width)

    def gather_key(self, flat: Tensor, width: int) -> Tensor:
        """Flat keys of all heads of the model; see `gather_query`."""
        return self._gather(flat, self._all_key_value, width)

    def own_query(self, flat: Tensor, width: int) -> Tensor:
        """This rank's slots of flat queries of all heads."""
        return self._own(flat, self.query, width)

    def own_key(self, flat: Tensor, width: int) -> Tensor:
        """This rank's slots of flat keys of all heads."""
        return self._own(flat, self.key_value, width)

    def _gather(self, flat: Tensor, slots: Slots, width: int) -> Tensor:
        if self._tp.size == 1:
            return flat
        every = _split(all_gather(flat, flat.dim() - 1, self._tp), width)
        heads = range(max(slots) + 1)
        return torch.cat([every[..., slots.index(head), :] for head in heads], dim=-1)

    def _own(self, flat: Tensor, slots: Slots, width: int) -> Tensor:
        if self._tp.size == 1:
            return flat
        heads = _split(flat, width)
        zeros = torch.zeros_like(heads[..., 0, :])
        own = [zeros if head == PADDING else heads[..., head, :] for head in slots]
        return torch.cat(own, dim=-1)


class LayerParallel:
    """A layer's share of the run on this rank.

    Args:
        run: how the model is run.
        num_attention_heads: query heads of the model.
        num_key_value_heads: KV heads of the model.
        strategy: desired sharding of KV heads.
        attention_chunk_size: chunks that context parallelism cuts; None cuts the sequence.
        sequence_parallel: each rank is given its piece of the sequence; None is `run`'s.
        stays_split_before: see `PrefillPhase`.
        stays_split_after: see `PrefillPhase`.
        num_cores_per_group: ranks that share a KV head's tokens in decode (flash decoding).

    Attributes:
        shares_weights: both phases use the same shard of the weights.
        prefill, decode: phases.
        prefill_heads, decode_heads: this rank's heads in them.
        core_group: ranks that share the tokens of this rank's KV head; itself alone without flash
            decoding.

    Raises:
        ConfigError: no process group of `tp_degree` ranks, or decode would read heads that this
            rank does not have in prefill.
    """

    def __init__(
        self,
        run: NeuronConfig,
        num_attention_heads: int,
        num_key_value_heads: int,
        *,
        strategy: GQA | None = None,
        attention_chunk_size: int | None = None,
        sequence_parallel: bool | None = None,
        stays_split_before: bool = False,
        stays_split_after: bool = False,
        num_cores_per_group: int = 1,
    ) -> None:
        groups = process_groups(run)
        self.core_group = core_group(run, num_cores_per_group)
        self.rank = groups.rank
        self.shares_weights = run.cp_degree == run.attention_dp_degree
        maps = rank_maps(
            run.tp_degree,
            num_attention_heads,
            num_key_value_heads,
            cp_degree=run.cp_degree,
            dp_degree=run.attention_dp_degree,
            switch_cc=run.switch_cc,
            strategy=strategy,
        )
        self.prefill_heads = PhaseHeads(maps.prefill, groups.rank, groups.prefill.tp)
        self.decode_heads = PhaseHeads(maps.decode, groups.rank, groups.decode.tp)
        self.prefill = PrefillPhase(
            groups.prefill,
            TokenOrder(
                run.cp_degree,
                strided=run.strided_context_parallel_kernel_enabled,
                chunk=attention_chunk_size,
            ),
            sequence_parallel=(
                run.sequence_parallel_enabled if sequence_parallel is None else sequence_parallel
            ),
            stays_split_before=stays_split_before,
            stays_split_after=stays_split_after,
        )
        # without a sum over heads there is nothing to order
        dispatch = run.ep_dispatch_cc_option if groups.decode.tp.size > 1 else "AR_AG"
        self.decode = DecodePhase(groups.decode, dispatch)
        self._prior = prior_plan(maps, groups.rank)
        self._prior_group = {
            "none": ALONE,
            "prefill": groups.prefill.split,
            "decode": groups.decode.split,
            "all": groups.world,
        }[self._prior.exchange]
        self._cached = slots_of(self.decode_heads.key_value, self.prefill_heads.key_value)
        self._caches_all = self.decode_heads.key_value == self.prefill_heads.key_value

    def make_cache(self, config: InferenceConfig) -> KVCacheManager:
        """Make this rank's cache: for its KV heads and its rows of the batch.

        Args:
            config: the model's configuration.
        """
        return KVCacheManager(
            config,
            num_kv_head=len(self.decode_heads.key_value),
            dp_rank=self.decode.stage.split.rank,
            core=self.core_group.rank,
        )

    def for_cache(self, x: Tensor) -> Tensor:
        """Heads of a prefill's keys or values that this rank reads in decode.

        Args:
            x: `(batch, kv_heads of prefill, tokens, head_dim)`, BHSD.

        Returns:
            `(batch, kv_heads of decode, tokens, head_dim)`; zeros where decode has padding.
        """
        if self._caches_all:
            return x
        zeros = torch.zeros_like(x[:, :1])
        picked = [zeros if slot is None else x[:, slot : slot + 1] for slot in self._cached]
        return torch.cat(picked, dim=1)

    def gather_prior(self, prior: PriorKeys, owners: Tensor | None = None) -> PriorKeys:
        """Cached keys that a prefill reads: of its own heads, every row and every core's tokens.

        Args:
            prior: of this rank's cache: keys and values of its decode heads, BHSD; positions
                `(batch, slots)` of every row of the step.
            owners: `(batch,)`, integer: which data-parallel group keeps each row, where keys and
                values have a line for every row, any for a row that others keep; None where each
                group has its own rows and no others, in order.

        Returns:
            Keys and values `(batch, kv_heads of prefill, slots of all cores, head_dim)`.
        """
        k, v, positions = prior.k, prior.v, prior.positions
        if self.core_group.size > 1:
            both = all_gather(torch.cat((k, v), dim=1), 2, self.core_group)
            k, v = both.chunk(2, dim=1)
            positions = all_gather(positions.contiguous(), 1, self.core_group)
        if self._prior.own:
            return PriorKeys(k=k, v=v, positions=positions)
        heads = k.shape[1]
        caches = all_gather(torch.cat((k, v), dim=1)[None], 0, self._prior_group)
        zeros = torch.zeros_like(caches[0, :, 0])
        groups = []
        for sources in self._prior.sources:
            picked = [
                zeros if source is None else caches[source.member, :, first + source.slot]
                for first in (0, heads)
                for source in sources
            ]
            groups.append(torch.stack(picked, dim=1))
        rows = torch.cat(groups)
        if owners is not None:
            lines = torch.arange(k.shape[0], device=k.device)
            rows = rows.index_select(0, owners.clamp(min=0) * k.shape[0] + lines)
        k, v = rows.chunk(2, dim=1)
        return PriorKeys(k=k, v=v, positions=positions)


def _split(flat: Tensor, width: int) -> Tensor:
    """Cut the last axis into heads of `width`."""
    return flat.reshape(*flat.shape[:-1], -1, width)
