"""Context encoding on ranks: orders of tokens, residual streams, meshes of 64 and 512."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from golden import (
    Array,
    AttentionConfig,
    AttentionWeights,
    Capture,
    QKNorm,
    RopeConfig,
    context_encoding,
    encode_projected,
    project_qkv,
)
from golden.norms import normalise
from golden.sharding import (
    EIGHT_BY_EIGHT,
    Parallelism,
    RankCapture,
    encode_sharded,
    shard,
    token_plan,
)
from golden.sharding.parallelism import Interleave
from tests.golden.layers import (
    LAYERS,
    assert_within,
    gamma,
    integer_weights,
    normal,
    small_integers,
)
from tests.golden.sharding.drawn import check, drawn, encoded, plain

CHUNKED = replace(LAYERS["chunk-post-norm"], attention_chunk_size=4)


@pytest.mark.parametrize("wiring", EIGHT_BY_EIGHT)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_d17_eight_by_eight_meshes_of_every_wiring(wiring: str, sequence_parallel: bool) -> None:
    case = drawn(plain((8, 8), (64, 8, 1), sequence_parallel=sequence_parallel), 1, steps=1)
    check(replace(case, parallelism=replace(case.parallelism, eight_by_eight=wiring)))


@pytest.mark.parametrize("degrees", [(512, 1, 1), (512, 8, 8), (256, 16, 4), (512, 64, 1)])
def test_d23_worlds_of_up_to_512_ranks(degrees: tuple[int, int, int]) -> None:
    check(drawn(plain((14, 2), degrees, norm="flat-rms"), 2, steps=1))


def tokens_of(config: AttentionConfig, q_len: int, **options: Any) -> list[list[list[int]]]:
    plan = token_plan(config, Parallelism(**options), q_len)
    return [[t.tolist() for t in part] for part in (plan.given, plan.queries, plan.returned)]


def test_d16_a_contiguous_rank_has_a_run_of_queries() -> None:
    given, queries, returned = tokens_of(LAYERS["mha"], 8, tp_degree=4, cp_degree=2)
    assert given == returned == [list(range(8))] * 4
    assert queries == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_d16_a_strided_rank_has_every_second_query() -> None:
    given, queries, returned = tokens_of(LAYERS["mha"], 8, tp_degree=2, cp_degree=2, strided=True)
    assert given == returned == [[0, 2, 4, 6, 1, 3, 5, 7]] * 2
    assert queries == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_d16_a_chunked_rank_has_its_share_of_every_chunk() -> None:
    _, queries, returned = tokens_of(CHUNKED, 10, tp_degree=2, cp_degree=2)
    assert queries == [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]]
    assert returned == [list(range(10))] * 2


def test_d17_a_sequence_parallel_rank_is_given_and_returns_a_piece() -> None:
    given, queries, returned = tokens_of(
        LAYERS["mha"], 8, tp_degree=4, cp_degree=2, sequence_parallel=True
    )
    assert given == returned == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert queries == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_d18_between_chunked_layers_pieces_stay_as_chunks_were_cut() -> None:
    options = {"tp_degree": 4, "cp_degree": 2, "sequence_parallel": True}
    in_order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    in_share = [[0, 1], [4, 5], [2, 3], [6, 7]]
    for place, (first, last) in {
        "none": (in_order, in_order),
        "after_global": (in_order, in_share),
        "between": (in_share, in_share),
        "before_global": (in_share, in_order),
    }.items():
        given, _, returned = tokens_of(CHUNKED, 8, interleave=place, **options)
        assert (given, returned) == (first, last)


PLACES: tuple[Interleave, ...] = ("after_global", "between", "before_global")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_d18_what_one_chunked_layer_returns_is_what_the_next_is_given(
    sequence_parallel: bool,
) -> None:
    """Llama 4's pattern: pieces cut by chunk pass from layer to layer without a gather."""
    plans = [
        token_plan(
            CHUNKED,
            Parallelism(
                tp_degree=4, cp_degree=2, interleave=place, sequence_parallel=sequence_parallel
            ),
            16,
        )
        for place in PLACES
    ]
    for before, after in pairwise(plans):
        for returned, given in zip(before.returned, after.given, strict=True):
            assert np.array_equal(returned, given)
    for first, last in zip(plans[0].given, plans[-1].returned, strict=True):
        assert np.array_equal(first, last)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_d18_the_residual_stream_follows_its_tokens(
    place: Interleave, sequence_parallel: bool
) -> None:
    weights, states = integer_weights(CHUNKED), small_integers(0, 2, 16, 8)
    output, bound = encoded(CHUNKED, weights, states, parts=1)
    parallelism = Parallelism(
        tp_degree=4, cp_degree=2, interleave=place, sequence_parallel=sequence_parallel
    )
    result = encode_sharded(
        shard(CHUNKED, weights, parallelism), states, position_ids=np.arange(16)
    )
    for rank, tokens in enumerate(result.tokens):
        held = result.outputs[rank]
        if result.residuals is not None:  # before a global layer it is in the output already
            held = held + result.residuals[rank]
        want = (states + output)[:, tokens]
        assert_within(held, want, bound[:, tokens] + gamma(2) * np.abs(want))
    assert (result.residuals is None) == (place == "before_global")


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("layer", ["window-sinks", "gqa-bias-rms"])
def test_d24_a_ring_gives_what_an_all_gather_does(degree: int, layer: str) -> None:
    heads = {"window-sinks": (4, 1), "gqa-bias-rms": (4, 2)}[layer]
    options = {"mask": "window3", "sinks": True} if layer == "window-sinks" else {"norm": "head"}
    for strided in (False, True):
        if not (strided and "mask" in options):
            case = plain(heads, (4, degree, 1), kv_exchange="ring", strided=strided, **options)
            check(drawn(case, degree, steps=1))


def test_d24_a_ring_looks_at_each_rows_keys_once_with_the_sink_on_its_own() -> None:
    config = LAYERS["window-sinks"]
    layer = shard(
        config, integer_weights(config), Parallelism(tp_degree=4, cp_degree=4, kv_exchange="ring")
    )
    widths: list[tuple[int, int]] = []

    def observe(rank: int) -> Any:
        def see(stage: str, value: Array, how: Any = None, /) -> Array:
            if stage == "qk":
                widths.append((rank, value.shape[-1]))
            return value

        return see

    encode_sharded(layer, small_integers(0, 1, 8, 8), position_ids=np.arange(8), observe=observe)
    assert widths == [(rank, 2) for rank in range(4) for _ in range(4)]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("weighted", [True, False])
def test_n6_d19_a_flat_norm_takes_the_mean_square_of_the_whole_projection(
    kind: Any, weighted: bool
) -> None:
    config = AttentionConfig(
        hidden_size=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        qk_norm=QKNorm(kind=kind, scope="projection", weighted=weighted),
        rope=RopeConfig(),
    )
    weights, states = integer_weights(config), small_integers(0, 1, 4, 8)
    whole, ranks = Capture(), RankCapture(frozenset({"q_norm_scale", "k_norm_scale"}))
    context_encoding(config, weights, states, position_ids=np.arange(4), observe=whole)
    layer = shard(config, weights, Parallelism(tp_degree=4))
    encode_sharded(layer, states, position_ids=np.arange(4), observe=ranks)
    for (_, stage), got in ranks.values.items():
        assert (np.abs(got - whole.values[stage]) <= gamma(64) * whole.values[stage]).all()
    # the module's own norm of a rank's part depends on the degree
    flat = project_qkv(config, weights, states).q
    assert config.qk_norm is not None
    alone = normalise(flat[..., :8], config.qk_norm, None, None)
    assert np.abs(alone - normalise(flat, config.qk_norm, None, None)[..., :8]).max() > 0.01


def test_n6_a_part_is_normalised_as_within_the_whole() -> None:
    x = normal(0, 2, 3, 8)
    for kind in ("rms", "layer"):
        norm = QKNorm(kind=kind, weighted=False)
        whole = normalise(x, norm, None, None)
        for part in (slice(0, 3), slice(3, 8)):
            assert np.array_equal(
                normalise(x[..., part], norm, None, None, whole=x), whole[..., part]
            )


def test_rotary_positions_go_with_their_tokens() -> None:
    axes = AttentionConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope=RopeConfig(mrope_section=(1, 1)),
        softmax_scale=2.0**-5,
    )
    weights, states = integer_weights(axes), small_integers(0, 2, 8, 8)
    rotary = np.random.default_rng(0).integers(0, 9, (2, 2, 8))
    for config, given in ((LAYERS["mha"], rotary[0]), (axes, rotary)):
        want, bound = encoded(config, weights, states, parts=1, rotary_position_ids=given)
        parallelism = Parallelism(tp_degree=4, cp_degree=2, strided=True)
        options = {"position_ids": np.arange(8), "rotary_position_ids": given}
        got = encode_sharded(shard(config, weights, parallelism), states, **options)
        assert_within(got.output, want, bound)


def test_output_puts_the_tokens_of_all_ranks_in_order() -> None:
    config, weights = LAYERS["mha"], integer_weights(LAYERS["mha"])
    states = small_integers(0, 1, 8, 8)
    want, bound = encoded(config, weights, states, parts=1)
    for options in ({"sequence_parallel": True}, {"strided": True}, {}):
        parallelism = Parallelism(tp_degree=4, cp_degree=2, **options)
        result = encode_sharded(
            shard(config, weights, parallelism), states, position_ids=np.arange(8)
        )
        assert_within(result.output, want, bound)


def test_one_rank_is_golden_itself() -> None:
    config: AttentionConfig = LAYERS["gqa-bias-rms"]
    weights: AttentionWeights = integer_weights(config)
    states = small_integers(0, 2, 4, 8)
    want = encode_projected(
        config, weights, project_qkv(config, weights, states), position_ids=np.arange(4)
    )
    got = encode_sharded(shard(config, weights, Parallelism()), states, position_ids=np.arange(4))
    assert np.array_equal(got.outputs[0], want.output)
    assert np.array_equal(got.caches[0].k, want.cache.k)
