"""The cases that acceptance rules are compared on."""

from __future__ import annotations

import itertools

from conformance.cases import DTYPES, Case, Workload
from golden import AttentionConfig


def _layer(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    chunk: int | None = None,
    sinks: int | None = None,
    softcap: float | None = None,
) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        attention_chunk_size=chunk,
        learned_sinks_size=sinks,
        softcap=softcap,
    )


LAYOUTS: tuple[tuple[AttentionConfig, Workload], ...] = (
    (_layer(4, 2, 64, window=96, sinks=1), Workload(phase="cte", lengths=(330,))),
    (_layer(4, 2, 64, sinks=1), Workload(phase="cte", lengths=(512,))),
    (_layer(4, 2, 128), Workload(phase="cte", lengths=(161, 90))),
    (_layer(4, 4, 64, softcap=10.0), Workload(phase="cte", lengths=(200,))),
    (_layer(4, 2, 64, chunk=96), Workload(phase="cte", lengths=(200,))),
    (_layer(4, 2, 64), Workload(phase="cte", lengths=(65,), prior=200)),
    (_layer(4, 1, 32, window=8), Workload(phase="cte", lengths=(37, 16))),
    (_layer(8, 2, 64), Workload(phase="tkg", lengths=(777, 300))),
    (_layer(8, 2, 64, window=128, sinks=1), Workload(phase="tkg", lengths=(700, 90))),
    (_layer(7, 1, 128), Workload(phase="tkg", lengths=(33, 20), steps=3)),
    (_layer(8, 2, 128, sinks=1), Workload(phase="tkg", lengths=(4000,))),
)
"""Layers and workloads: prefill and decode, with lengths off tile edges and unequal."""

REGIMES = ("gaussian", "peaked", "outlier")
SEEDS = range(5)


def rules_cases(*, quick: bool) -> list[Case]:
    """Return the cases, the costly ones first.

    Args:
        quick: one seed, one regime and the smaller layouts alone.
    """
    layouts = LAYOUTS[2:] if quick else LAYOUTS
    regimes, seeds = (REGIMES[:1], SEEDS[:1]) if quick else (REGIMES, SEEDS)
    return [
        Case(config=config, workload=work, dtype=dtype, regime=regime, seed=seed, scope="core")
        for (config, work), dtype, regime, seed in itertools.product(
            layouts, DTYPES, regimes, seeds
        )
    ]
