"""1,500 drawn layers on meshes: every rank returns what the whole layer does."""

from __future__ import annotations

from typing import Any

import pytest

from golden import AttentionConfig, ConfigError
from golden.sharding import Parallelism, place_ranks
from golden.sharding.rules import check_layer
from tests.golden.sharding.drawn import FACTORS, Pair, check, choices, drawn, pairs_of

CASES, BATCHES = 1500, 30


@pytest.mark.parametrize("batch", range(BATCHES))
def test_d23_d25_every_rank_returns_the_whole_layers_output(batch: int) -> None:
    for seed in range(batch, CASES, BATCHES):
        check(drawn(choices(CASES)[0][seed], seed))


def test_the_drawn_cases_are_as_many_as_stated_and_differ() -> None:
    found, _ = choices(CASES)
    assert len(found) == CASES
    assert len({tuple(sorted((k, str(v)) for k, v in c.items())) for c in found}) > CASES * 0.95


def test_every_two_factors_that_can_meet_have_met() -> None:
    found, never = choices(CASES)
    met = {pair for choice in found for pair in pairs_of(choice)}
    assert not met & never
    assert not [pair for pair in never if not ruled_out(pair)]


def ruled_out(pair: Pair) -> bool:
    """Say whether a documented rule keeps two values apart."""
    given: dict[str, Any] = {pair[0]: pair[1], pair[2]: pair[3]}
    mesh, heads = given.get("mesh"), given.get("heads")
    cores, chunked = given.get("cores") == 2, given.get("mask") == "chunk"
    interleaved, strided = given.get("interleave", "none") != "none", given.get("strided", False)
    wanted = [
        cores and (chunked or interleaved or strided or given.get("strategy") is not None),
        cores and mesh is not None and (mesh[1:] != (1, 1) or mesh[0] % 2 == 1),
        cores and heads is not None and all(tp % (2 * heads[1]) for tp in (2, 4, 8)),
        interleaved and (strided or given.get("mask", "chunk") != "chunk"),
        interleaved and mesh is not None and (mesh[1] == 1 or mesh[2] > 1),
        chunked and (strided or (mesh is not None and mesh[2] > 1)),
        strided
        and (given.get("mask", "causal") != "causal" or (mesh is not None and mesh[1] == 1)),
        given.get("sinks", False)
        and mesh is not None
        and all(n % (mesh[0] // mesh[1]) or n % (mesh[0] // mesh[2]) for n, _ in FACTORS["heads"]),
        mesh is not None and heads is not None and not fits(mesh, heads),
        given.get("lora", False) and given.get("prompt") == "packed",
    ]
    return any(wanted)


def fits(mesh: tuple[int, int, int], heads: tuple[int, int]) -> bool:
    """Say whether heads can be spread over a mesh with either strategy."""
    config = AttentionConfig(
        hidden_size=8, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=4
    )
    for strategy in FACTORS["strategy"]:
        tp, cp, dp = mesh
        parallelism = Parallelism(
            tp_degree=tp, cp_degree=cp, attention_dp_degree=dp, strategy=strategy
        )
        try:
            check_layer(config, parallelism)
            place_ranks(config, parallelism)
        except ConfigError:
            continue
        return True
    return False
