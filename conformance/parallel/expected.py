"""Runs golden on every rank of a parallel case: what each should return, cache and compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from conformance.error_model import Outputs, RowMask
from conformance.expected import Reference, written
from conformance.parallel.stages import OBSERVABLE, Seen
from conformance.parallel.workloads import ParallelWorkload, WorkloadInputs
from golden import Array, Observer, Positions, unobserved
from golden.sharding import (
    PADDING,
    CoreCache,
    RankCapture,
    RankObserver,
    RankStage,
    ShardedLayer,
    ShardedResult,
    encode_packed_sharded,
    encode_sharded,
    generate_sharded,
    shard,
    token_plan,
)


@dataclass(frozen=True, slots=True, eq=False)
class RankReference:
    """Golden's answer to a parallel case, rank by rank.

    Attributes:
        workload: the case.
        inputs: its arrays.
        layer: cut for the ranks, exact: without a reduction dtype.
    """

    workload: ParallelWorkload
    inputs: WorkloadInputs
    layer: ShardedLayer

    def values(self, observe: RankObserver) -> dict[Seen, Array]:
        """Run all calls and return what every rank returned, cached and computed.

        Args:
            observe: gives each rank its observer, which the captured stages have passed.
        """
        found: dict[Seen, Array] = {}
        caches: Any = self.layer.empty_caches(
            batch=len(self.workload.lengths),
            max_length=max(self.workload.lengths) + self.workload.steps,
        )
        for call, (hidden, positions) in enumerate(
            zip(self.inputs.hidden_states, self.inputs.position_ids, strict=True)
        ):
            capture = RankCapture(frozenset(map(partial(self._golden, call), self.workload.stages)))
            seen = _both(observe, capture if self.workload.stages else None)
            result = self._call(call, hidden, positions, caches, seen)
            caches = result.caches
            for rank, stage in itertools.product(
                range(self.workload.world_size), self.workload.stages
            ):
                value = capture.values.get((rank, self._golden(call, stage)))
                if value is not None:
                    found[self.seen(rank, call, stage)] = as_judged(stage, value)
            for rank, output in enumerate(result.outputs):
                found[self.seen(rank, call, "output")] = output
                k, v = entries_written(caches[rank], self.entries(rank, call))
                found[self.seen(rank, call, "k_cache")] = k
                found[self.seen(rank, call, "v_cache")] = v
        return found

    def seen(self, rank: int, call: int, what: str) -> Seen:
        """Name a value of one rank."""
        return Seen(rank, call, what, self.workload.prompts)

    def _call(
        self, call: int, hidden: Array, positions: Positions, caches: Any, observe: RankObserver
    ) -> ShardedResult[Any]:
        """Run one call on every rank."""
        if call < len(self.workload.packings):
            packing = self.workload.packings[call]
            return encode_packed_sharded(
                self.layer,
                hidden,
                query_lens=packing.query_lens,
                key_lens=packing.key_lens,
                caches=caches,
                observe=observe,
            )
        run = encode_sharded if call < self.workload.prompts else generate_sharded
        return run(
            self.layer,
            hidden,
            position_ids=positions,
            caches=caches,
            lora=self.inputs.lora,
            observe=observe,
        )

    def entries(self, rank: int, call: int) -> Positions:
        """Return the positions that a call writes to a rank's cache, `(rows, tokens)`, or -1."""
        packings = self.workload.packings
        by_row = packings[call].rows if call < len(packings) else self.inputs.position_ids[call]
        positions = by_row[self._rows(rank)]
        cores = self.workload.parallelism.cores_per_group
        return np.where(positions % cores == rank % cores, positions, -1)

    def _golden(self, call: int, stage: str) -> str:
        """Return golden's name of a stage: flash decoding projects joined outputs."""
        joins = call >= self.workload.prompts and self.workload.parallelism.cores_per_group > 1
        return "attn_merged" if joins and stage == "attn" else stage

    def counted(self, seen: Seen, value: Array) -> RowMask:
        """Tell which rows of a value hold something: neither padded tokens nor padded heads.

        Args:
            seen: which value.
            value: golden's, for its shape.

        Returns:
            Bool, shaped like all axes but the last.
        """
        used = self._used(seen)
        heads = self._heads(seen)
        if heads is None:
            whole: RowMask = np.broadcast_to(used, value.shape[:-1]).copy()
            return whole
        real = np.array(heads) != PADDING
        counted: RowMask = real[None, :, None] & np.broadcast_to(used[:, None], value.shape[:-1])
        return counted

    def _used(self, seen: Seen) -> RowMask:
        """Tell which tokens hold something, `(batch, tokens)` of that value."""
        if seen.what in ("k_cache", "v_cache"):
            return self.entries(seen.rank, seen.call) >= 0
        used: RowMask = self.inputs.position_ids[seen.call] >= 0
        if seen.call >= self.workload.prompts:
            return used if seen.what == "output" else self._decode_rows(seen, used)
        plan = token_plan(self.workload.config, self.workload.parallelism, used.shape[1])
        kind = "reduced" if seen.what == "output" else OBSERVABLE[seen.what].tokens
        if seen.what == "output" or (kind == "reduced" and plan.scatters):
            return used[:, plan.returned[seen.rank]]
        if kind == "all" or (plan.gathers_heads and seen.what in ("o_product", "o_reduced")):
            return used
        return used[:, plan.queries[seen.rank]]

    def _decode_rows(self, seen: Seen, used: RowMask) -> RowMask:
        """Cut the batch as a data-parallel step does."""
        mesh, dispatch = self.layer.decode.mesh, self.workload.parallelism.ep_dispatch
        if seen.what != "o_reduced" or len(mesh.rows) == 1 or dispatch == "AR_AG":
            return used[self._rows(seen.rank)]
        if dispatch == "AG_AR":
            return used
        piece = np.split(used, mesh.world_size)
        return piece[mesh.inverted[seen.rank]]

    def _rows(self, rank: int) -> slice:
        mesh = self.layer.decode.mesh
        share = len(self.workload.lengths) // len(mesh.rows)
        return slice(mesh.row_of(rank) * share, (mesh.row_of(rank) + 1) * share)

    def _heads(self, seen: Seen) -> tuple[int, ...] | None:
        cached = seen.what in ("k_cache", "v_cache")
        decodes = seen.call >= self.workload.prompts
        stage: RankStage = self.layer.decode if decodes or cached else self.layer.prefill
        part = stage.part(seen.rank)
        kind = "key" if cached else "none"
        if seen.what in OBSERVABLE:
            kind = OBSERVABLE[seen.what].heads
        if kind == "none":
            return None
        if kind == "key":
            return stage.layout.kv_part(part)
        cores = self.workload.parallelism.cores_per_group
        if seen.what != "logsumexp_sent":
            return stage.layout.q_part(part)
        first = part - part % cores  # flash decoding attends with all queries of the group
        return tuple(h for core in range(cores) for h in stage.layout.q_part(first + core))


def as_judged(stage: str, value: Array) -> Array:
    """Return a stage with an axis of features, and finite: the logsumexp of no keys is 0."""
    if stage != "logsumexp_sent":
        return value
    finite: Array = np.where(np.isneginf(value), 0.0, value)[..., None]
    return finite


def rank_reference(workload: ParallelWorkload, inputs: WorkloadInputs) -> RankReference:
    """Cut a case's layer for its ranks."""
    exact = replace(workload.parallelism, reduce_dtype=None)
    return RankReference(workload, inputs, shard(workload.config, inputs.weights, exact))


def reference(ranks: RankReference, spread: Callable[[Observer], RankObserver]) -> Reference:
    """Return golden's answer under names that the judge of one rank takes as they are.

    Args:
        ranks: the case on its ranks.
        spread: turns an observer of one rank into one of all.
    """

    def evaluate(*, observe: Observer = unobserved) -> Outputs:
        return named(ranks.values(spread(observe)))

    exact = ranks.values(spread(unobserved))
    rows = {str(seen): ranks.counted(seen, value) for seen, value in exact.items()}
    return Reference(named(exact), rows, evaluate)


def entries_written(cache: Any, positions: Positions) -> tuple[Array, Array]:
    """Return the entries of a rank's cache at these positions, zeros for -1.

    Args:
        cache: contiguous, or one core's of flash decoding.
        positions: `(rows, tokens)`, int64.

    Returns:
        Keys and values, `(rows, heads, tokens, head_dim)`.
    """
    if isinstance(cache, CoreCache):
        slots = np.where(positions >= 0, positions // cache.cores, -1)
        return written(cache.held.k, slots), written(cache.held.v, slots)
    return written(cache.k, positions), written(cache.v, positions)


def named(values: Mapping[Seen, Array]) -> dict[str, Array]:
    """Return values under the judge's names, in the order in which ranks compute them."""
    return {str(seen): values[seen] for seen in in_turn(values)}


def in_turn(values: Iterable[Seen]) -> list[Seen]:
    """Sort by call and stage, then by rank."""
    return sorted(values, key=lambda seen: (seen.turn, seen.rank))


def _both(observe: RankObserver, capture: RankCapture | None) -> RankObserver:
    """Return observers that capture what another observer let pass."""
    if capture is None:
        return observe

    def of_rank(rank: int) -> Observer:
        first, keep = observe(rank), capture(rank)
        return lambda stage, value, how=None, /: keep(stage, first(stage, value, how))

    return of_rank
