"""Judges `impl` on the ranks of a `torchrun`: one host or several, any number of ranks.

    torchrun --nproc-per-node 4 -m conformance.parallel.under_torchrun --cp-degree 2

On several hosts the same command runs on each, with torchrun's own `--nnodes`, `--node-rank`,
`--master-addr`. Every rank runs its part of one layer, prefill and decode; rank 0 gathers what they
found, judges it and prints the verdict. The exit code of every rank is 0 if they conform, else 1.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import torch
import torch.distributed as dist

from conformance.parallel.observations import layer_values
from conformance.parallel.rank_reports import RankReport, RunReport
from conformance.parallel.run import claimed, rank_call
from conformance.parallel.verdict import judge_run
from conformance.parallel.workloads import ParallelWorkload, draw_workload
from conformance.subjects.impl_parallel import run_rank
from golden import AttentionConfig, RopeConfig
from golden.sharding import Parallelism
from impl.parallel import init_process_group

_HEAD_DIM = 16


def workload_for(world_size: int, cp_degree: int, dp_degree: int, dtype: str) -> ParallelWorkload:
    """Return a layer that fits this many ranks: two query heads a rank, sinks and biases."""
    heads = 2 * world_size
    config = AttentionConfig(
        hidden_size=64,
        num_attention_heads=heads,
        num_key_value_heads=max(1, world_size // (2 * dp_degree)),
        head_dim=_HEAD_DIM,
        qkv_bias=True,
        o_bias=True,
        rope=RopeConfig(theta=10000.0),
        learned_sinks_size=1,
    )
    spread = Parallelism(
        tp_degree=world_size,
        cp_degree=cp_degree,
        attention_dp_degree=dp_degree,
        reduce_dtype="float32",
    )
    length = 8 * max(cp_degree, 4)
    return ParallelWorkload(
        config=config,
        parallelism=spread,
        lengths=(length, length // 2) * max(dp_degree, 1),
        steps=4,
        dtype=dtype,
        stages=("attn",),
    )


@click.command()
@click.option("--cp-degree", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dp-degree", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
def main(cp_degree: int, dp_degree: int, dtype: str) -> None:
    """Judge `impl` on the ranks that torchrun has started."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    init_process_group("cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    workload = workload_for(world_size, cp_degree, dp_degree, dtype)
    inputs = draw_workload(workload)
    with torch.no_grad():
        result = run_rank(rank, world_size, rank_call(workload, inputs))
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(result, gathered)
    outcome = [False]
    if gathered is not None:
        ranks = tuple(
            RankReport(other, "finished", result=found) for other, found in enumerate(gathered)
        )
        report = RunReport(ranks, time.perf_counter() - started)
        verdict = judge_run(workload, inputs, report, claimed(workload), values=layer_values)
        click.echo(f"{verdict.verdict} on {world_size} ranks: {workload.id}")
        if verdict.reason:
            click.echo(verdict.reason)
        outcome = [verdict.verdict == "CONFORMS"]
    dist.broadcast_object_list(outcome)
    dist.destroy_process_group()
    sys.exit(0 if outcome[0] else 1)


if __name__ == "__main__":
    main()
