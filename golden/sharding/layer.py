"""A layer cut for its ranks, and the steps that prefill and decode have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from golden.cache import empty_cache
from golden.caches.held import Cache
from golden.config import AttentionConfig
from golden.lora import Lora
from golden.sharding.core_cache import core_cache
from golden.sharding.head_layout import HeadLayout, Heads, head_layout
from golden.sharding.mesh import Mesh
from golden.sharding.parallelism import Parallelism
from golden.sharding.placement import Ordering, place_ranks
from golden.sharding.rank_weights import rank_config, rank_lora, rank_weights
from golden.sharding.rules import check_batch, check_layer
from golden.sharding.tokens import Tokens
from golden.stages import Array
from golden.weights import AttentionWeights

C = TypeVar("C", bound=Cache)


@dataclass(frozen=True, slots=True, eq=False)
class RankStage:
    """One stage, prefill or decode: who holds what.

    Attributes:
        mesh: the ranks.
        layout: heads over the parts of a row.
        config: the layer as one rank computes it.
        ordering: rank ordering of the weights.
        weights: by rank; ranks with one part share them.
    """

    mesh: Mesh
    layout: HeadLayout
    config: AttentionConfig
    ordering: Ordering
    weights: tuple[AttentionWeights, ...]

    def part(self, rank: int) -> int:
        """Return which part of the weights a rank holds."""
        return self.ordering[rank] % self.mesh.tp_degree

    def lora(self, config: AttentionConfig, lora: Lora | None, rank: int) -> Lora | None:
        """Return a rank's part of the layer's adapters."""
        return None if lora is None else rank_lora(config, lora, self.layout, self.part(rank))


@dataclass(frozen=True, slots=True, eq=False)
class ShardedLayer:
    """A layer cut for its ranks.

    Attributes:
        config: the whole layer.
        parallelism: how it is spread.
        o_bias: the output bias, which every rank holds whole; None without.
        prefill: ranks of context encoding.
        decode: ranks of token generation.
        written: per rank, which of its prefill key/value heads goes to each head of its cache.
    """

    config: AttentionConfig
    parallelism: Parallelism
    o_bias: Array | None
    prefill: RankStage
    decode: RankStage
    written: tuple[Heads, ...]

    def empty_caches(self, *, batch: int, max_length: int) -> tuple[Cache, ...]:
        """Return an empty cache per rank, for its heads and its rows of the batch.

        Raises:
            ConfigError: `batch` or `max_length` is not positive, or the batch cannot be cut.
        """
        check_batch(batch, self.parallelism)
        rows = batch // self.parallelism.attention_dp_degree
        cores, config = self.parallelism.cores_per_group, self.decode.config
        if cores == 1:
            empty = empty_cache(config, batch=rows, max_length=max_length)
            return (empty,) * self.decode.mesh.world_size
        return tuple(
            core_cache(config, batch=rows, max_length=max_length, core=rank % cores, cores=cores)
            for rank in range(self.decode.mesh.world_size)
        )


def shard(
    config: AttentionConfig, weights: AttentionWeights, parallelism: Parallelism
) -> ShardedLayer:
    """Cut a layer for its ranks.

    Raises:
        ConfigError: the layer cannot be spread so.
    """
    check_layer(config, parallelism)
    placement = place_ranks(config, parallelism)

    def stage(mesh: Mesh, ordering: Ordering) -> RankStage:
        layout = head_layout(config, mesh.tp_degree, desired=parallelism.strategy)
        parts = [rank_weights(config, weights, layout, part) for part in range(mesh.tp_degree)]
        return RankStage(
            mesh,
            layout,
            rank_config(config, layout),
            ordering,
            tuple(parts[place % mesh.tp_degree] for place in ordering),
        )

    return ShardedLayer(
        config,
        parallelism,
        weights.o_bias,
        stage(parallelism.prefill_mesh, placement.prefill),
        stage(parallelism.decode_mesh, placement.decode),
        placement.written,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ShardedResult(Generic[C]):
    """What every rank returns.

    Attributes:
        outputs: by rank, `(batch, tokens of the rank, hidden_size)`, float64.
        tokens: by rank, the token of the call that each row of its output is.
        caches: by rank, after this call's keys and values were written.
        residuals: by rank, the layer's input at the tokens of its output, where the order changed
            and the caller cannot add its own; None where it can, or where it was added.
    """

    outputs: tuple[Array, ...]
    tokens: tuple[Tokens, ...]
    caches: tuple[C, ...]
    residuals: tuple[Array, ...] | None = None

    @property
    def output(self) -> Array:
        """The whole output in order, each token from the first rank that has it."""
        length = max(int(tokens.max(initial=-1)) for tokens in self.tokens) + 1
        batch, _, width = self.outputs[0].shape
        whole = np.zeros((batch, length, width))
        for tokens, output in zip(reversed(self.tokens), reversed(self.outputs), strict=True):
            whole[:, tokens] = output
        return whole
