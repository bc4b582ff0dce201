"""A layer on many ranks computes what it computes on one."""

import pytest
from impl_layers import ROUNDOFF, positions, relative_error, tokens
from parallel_layers import BATCH, SEQ, build, checkpoint, encode
from thread_ranks import on_ranks
from torch import Tensor

MESHES = [(2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 1), (4, 2, 1), (8, 4, 1), (8, 2, 2), (4, 4, 4)]
MESHES += [(8, 4, 2), (8, 8, 1), (4, 1, 2), (8, 1, 4)]
"""World size, CP, DP."""
HEADS = [(8, 2), (7, 1), (6, 2), (4, 4), (2, 1)]


def served(mesh: tuple[int, int, int], kv: int) -> bool:
    world, cp, dp = mesh
    if dp > 1 and cp == 1:
        return max(kv // (world // dp), 1) == max(kv // world, 1)
    if cp > 1 and dp == 1:
        return world >= kv
    return cp == dp or world // dp >= kv


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_prefill_and_decode_on_ranks_equal_those_on_one(
    mesh: tuple[int, int, int], heads: int, kv: int
) -> None:
    world, cp, dp = mesh
    if not served(mesh, kv):
        pytest.skip("refused by the configuration")
    whole = all(heads % (world // degree) == 0 for degree in (cp, dp))
    state = checkpoint(heads, kv, bias=True, sinks=whole)
    run = {"tp_degree": world, "cp_degree": cp, "attention_dp_degree": dp, "fused_qkv": kv == 2}
    alone = build(heads, kv, {}, state)
    first = encode(alone)
    step = tokens(1, BATCH, seed=9)
    at = positions(1, SEQ, BATCH)
    second = alone(step, None, at, past_key_value=first.present_key_value)

    def rank_steps(rank: int) -> tuple[Tensor, ...]:
        made = build(heads, kv, run, state)
        output = encode(made)
        k, v = output.present_key_value
        rows = BATCH // dp
        row = made.parallel.decode.stage.split.rank * rows
        cache = (k[row : row + rows], v[row : row + rows])
        later = made(step, None, at, past_key_value=cache)
        return output.hidden_states, later.hidden_states

    for got_first, got_second in on_ranks(world, rank_steps):
        assert relative_error(got_first, first.hidden_states) < ROUNDOFF
        assert relative_error(got_second, second.hidden_states) < ROUNDOFF


def test_columns_of_trn2s_wiring_join_in_the_order_of_the_mesh() -> None:
    """Process groups number ranks upwards, and a column of the mesh is 12, 8, 28, 24, ..."""
    state = checkpoint(64, 8)
    alone = encode(build(64, 8, {}, state)).hidden_states

    def prefill(_: int) -> Tensor:
        output: Tensor = encode(
            build(64, 8, {"tp_degree": 64, "cp_degree": 8}, state)
        ).hidden_states
        return output

    for got in on_ranks(64, prefill):
        assert relative_error(got, alone) < ROUNDOFF
