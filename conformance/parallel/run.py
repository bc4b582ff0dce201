"""Runs a workload on real ranks of this machine and judges every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from conformance.false_alarms import STANDARD
from conformance.parallel.observations import layer_values
from conformance.parallel.ranks import run_on_ranks
from conformance.parallel.verdict import ParallelVerdict, judge_run
from conformance.parallel.workloads import ParallelWorkload, WorkloadInputs, draw_workload
from conformance.precision import PrecisionProfile, native
from conformance.subjects.impl_parallel import PromptCall, RankCall, run_rank
from golden import Array, weight_shapes
from golden.sharding import strided_order, token_plan

RankSubject = Callable[[int, int, RankCall], Mapping[str, Array]]
"""Called on every rank: `conformance.subjects.impl_parallel.run_rank`, or one like it."""


def judge_on_ranks(
    workload: ParallelWorkload,
    subject: RankSubject = run_rank,
    *,
    threads: bool = False,
    seconds: float = 180.0,
    alpha: float = STANDARD.per_case,
) -> ParallelVerdict:
    """Run a workload on its ranks and judge every rank.

    Args:
        workload: what to run.
        subject: importable by name.
        threads: ranks are threads of one process.
        seconds: time limit of the ranks.
        alpha: chance that correct ranks fail.
    """
    inputs = draw_workload(workload)
    call = rank_call(workload, inputs)
    report = run_on_ranks(subject, workload.world_size, call, threads=threads, seconds=seconds)
    profile = claimed(workload)
    return judge_run(workload, inputs, report, profile, values=layer_values, alpha=alpha)


def claimed(workload: ParallelWorkload) -> PrecisionProfile:
    """Return what `impl` claims; a streamed kernel rounds weights before they are normalised."""
    profile = native(workload.dtype)
    if not workload.parallelism.strided or workload.packed:
        return profile
    stores = {**profile.stores, "unnormalised_weights": workload.dtype}
    return replace(profile, name=f"{profile.name}-streamed", stores=stores)


def rank_call(workload: ParallelWorkload, inputs: WorkloadInputs) -> RankCall:
    """Return what every rank is given."""
    batch, prompts = len(workload.lengths), workload.prompts
    nothing = np.empty((batch, 0, workload.config.input_size))
    following = inputs.hidden_states[prompts:] or (nothing,)
    places = inputs.position_ids[prompts:] or (np.empty((batch, 0), np.int64),)
    return RankCall(
        config=workload.config,
        parallelism=workload.parallelism,
        dtype=workload.dtype,
        weights={name: getattr(inputs.weights, name) for name in weight_shapes(workload.config)},
        batch=batch,
        prompts=tuple(_prompt_call(workload, inputs, call) for call in range(prompts)),
        next_states=np.concatenate(following, axis=1),
        next_positions=np.concatenate(places, axis=1),
        slots=-(-(workload.q_len + workload.steps) // 16) * 16,
        lora=inputs.lora,
    )


def _prompt_call(workload: ParallelWorkload, inputs: WorkloadInputs, call: int) -> PromptCall:
    spread, q_len = workload.parallelism, workload.prompt_lengths[call]
    packing = workload.packings[call] if workload.packed else None
    cached = None
    if packing is not None:
        cached = tuple(k - q for q, k in zip(packing.query_lens, packing.key_lens, strict=True))
    return PromptCall(
        hidden_states=inputs.hidden_states[call],
        position_ids=inputs.position_ids[call],
        given=token_plan(workload.config, spread, q_len).given,
        order=strided_order(q_len, spread.cp_degree) if spread.strided else np.arange(q_len),
        num_queries=None if packing is None else packing.query_lens,
        computed_context_lens=cached,
    )
