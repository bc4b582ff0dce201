"""Heads over ranks: counts, padding, replication, and that every query finds its keys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from golden import AttentionConfig, ConfigError, fuse_qkv, split_qkv
from golden.sharding import (
    CONVERT_TO_MHA,
    PADDING,
    REPLICATE_TO_TP_DEGREE,
    HeadLayout,
    head_layout,
    rank_config,
    rank_weights,
)
from golden.sharding.head_layout import GQAStrategy, repeated
from golden.sharding.rank_weights import take_heads, whole_projection
from tests.golden.layers import LAYERS, identical, integer_weights, normal

NO = PADDING


def layer(heads: int, kv_heads: int) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=4, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=2
    )


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "desired", "strategy", "counts"),
    [
        (32, 56, 8, None, REPLICATE_TO_TP_DEGREE, (64, 32)),
        (4, 6, 2, None, REPLICATE_TO_TP_DEGREE, (8, 4)),
        (32, 56, 8, CONVERT_TO_MHA, CONVERT_TO_MHA, (64, 64)),
        (64, 40, 8, CONVERT_TO_MHA, CONVERT_TO_MHA, (64, 64)),
        (64, 40, 8, None, REPLICATE_TO_TP_DEGREE, (64, 64)),
        (2, 32, 8, None, CONVERT_TO_MHA, (32, 8)),
        (3, 8, 2, None, CONVERT_TO_MHA, (9, 9)),
        (16, 40, 10, None, CONVERT_TO_MHA, (48, 48)),
        (1, 8, 2, None, CONVERT_TO_MHA, (8, 2)),
        (4, 6, 6, None, CONVERT_TO_MHA, (8, 8)),
        (8, 4, 4, None, REPLICATE_TO_TP_DEGREE, (8, 8)),
        (8, 8, 1, None, REPLICATE_TO_TP_DEGREE, (8, 8)),
        (8, 8, 8, None, REPLICATE_TO_TP_DEGREE, (8, 8)),
        (4, 16, 8, None, CONVERT_TO_MHA, (16, 8)),
    ],
)
def test_d8_head_counts(
    tp: int,
    heads: int,
    kv_heads: int,
    desired: GQAStrategy | None,
    strategy: GQAStrategy,
    counts: tuple[int, int],
) -> None:
    layout = head_layout(layer(heads, kv_heads), tp, desired=desired)
    assert layout.strategy == strategy
    assert (len(layout.q_heads), len(layout.kv_heads)) == counts


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "ours", "public"),
    [(4, 6, 3, 8, 16), (6, 12, 4, 12, 36), (32, 40, 10, 64, 256)],
)
def test_d8_converted_heads_are_padded_from_the_count_after_replication(
    tp: int, heads: int, kv_heads: int, ours: int, public: int
) -> None:
    layout = head_layout(layer(heads, kv_heads), tp)
    assert layout.strategy == CONVERT_TO_MHA
    assert len(layout.kv_heads) == len(layout.q_heads) == ours
    # the snapshot pads `repeats * kv_heads` heads by `target / kv_heads`, not `target / heads`
    assert public == heads // kv_heads * kv_heads * len(layout.q_heads) // kv_heads


def test_d5_queries_are_padded_at_the_end_of_their_group() -> None:
    layout = head_layout(layer(6, 2), 4)
    assert layout.q_heads == (0, 1, 2, NO, 3, 4, 5, NO)
    assert layout.kv_heads == (0, 0, 1, 1)


def test_d5_multi_head_attention_is_replicated_like_any_other() -> None:
    layout = head_layout(layer(2, 2), 4)
    assert layout.q_heads == (0, NO, 1, NO)
    assert layout.kv_heads == (0, 0, 1, 1)


def test_d6_converted_heads_are_padded_at_the_end() -> None:
    layout = head_layout(layer(6, 3), 4)
    assert layout.q_heads == (0, 1, 2, 3, 4, 5, NO, NO)
    assert layout.kv_heads == (0, 0, 1, 1, 2, 2, NO, NO)


def test_repeated_heads_stand_next_to_each_other() -> None:
    assert repeated(2, 3) == (0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize("desired", [None, CONVERT_TO_MHA])
@pytest.mark.parametrize("tp", [*range(1, 17), 24, 32, 48, 64, 128, 512])
def test_d7_every_query_of_every_rank_finds_its_own_keys(
    tp: int, desired: GQAStrategy | None
) -> None:
    for kv_heads, group in itertools.product((1, 2, 3, 4, 5, 8, 10, 16), (1, 2, 3, 4, 7, 8)):
        layout = head_layout(layer(kv_heads * group, kv_heads), tp, desired=desired)
        assert sorted(set(layout.q_heads) - {NO}) == list(range(kv_heads * group))
        assert [h for h in layout.q_heads if h != NO] == sorted(set(layout.q_heads) - {NO})
        assert set(layout.kv_heads) - {NO} == set(range(kv_heads))
        assert len(layout.q_heads) - kv_heads * group < tp
        for part in range(tp):
            check_part(layout, part, group)


def check_part(layout: HeadLayout, part: int, group: int) -> None:
    q, kv = layout.q_part(part), layout.kv_part(part)
    local, rest = divmod(len(q), len(kv))
    assert rest == 0
    for slot, head in enumerate(q):
        if head != NO:
            assert kv[slot // local] == head // group


@pytest.mark.parametrize(
    ("tp", "desired", "message"),
    [
        (0, None, "tp_degree must be positive, got 0"),
        (2, "tile", "strategy must be 'replicate-to-tp-degree' or 'convert-to-mha', got 'tile'"),
    ],
)
def test_layouts_that_cannot_be_are_refused(
    tp: int, desired: GQAStrategy | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        head_layout(layer(4, 2), tp, desired=desired)


def test_d14_a_rank_holds_rows_of_q_k_v_and_columns_of_o() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    layout = head_layout(config, 4)
    for part in range(4):
        own = rank_weights(config, weights, layout, part)
        q, kv = slice(4 * part, 4 * part + 4), slice(4 * (part // 2), 4 * (part // 2) + 4)
        assert identical(own.q_proj, weights.q_proj[q])
        assert identical(own.k_proj, weights.k_proj[kv])
        assert identical(own.v_proj, weights.v_proj[kv])
        assert identical(own.o_proj, np.ascontiguousarray(weights.o_proj[:, q]))
        assert weights.q_bias is not None
        assert own.q_bias is not None
        assert identical(own.q_bias, weights.q_bias[q])
        assert own.o_bias is None
        assert own.q_norm is weights.q_norm


def test_d14_fused_rows_of_a_rank_are_its_q_k_and_v() -> None:
    config = LAYERS["gqa-bias-rms"]
    layout = head_layout(config, 2)
    own = rank_weights(config, integer_weights(config), layout, 1)
    matrix, bias = fuse_qkv(own)
    assert matrix.shape == ((2 + 1 + 1) * config.head_dim, config.hidden_size)
    assert bias is not None
    for got, want in zip(
        split_qkv(rank_config(config, layout), matrix),
        (own.q_proj, own.k_proj, own.v_proj),
        strict=True,
    ):
        assert identical(got, want)


def test_d14_gathered_fused_rows_are_not_the_layers_fused_rows() -> None:
    config = LAYERS["gqa-bias-rms"]
    weights = integer_weights(config)
    layout = head_layout(config, 2)
    parts = [fuse_qkv(rank_weights(config, weights, layout, part))[0] for part in range(2)]
    gathered, whole = np.concatenate(parts), fuse_qkv(weights)[0]
    assert gathered.shape == whole.shape
    assert not identical(gathered, whole)  # [q0 k0 v0 q1 k1 v1], not [q k v]


def test_d7_heads_of_padding_have_zero_weights_everywhere() -> None:
    config = layer(6, 2)
    layout = head_layout(config, 4)
    own = rank_weights(config, integer_weights(config), layout, 1)
    assert not own.q_proj[2:].any()
    assert not own.o_proj[:, 2:].any()
    assert own.q_proj[:2].any()


def test_d13_a_ranks_layer_has_its_heads_and_no_output_bias() -> None:
    config = LAYERS["gqa-bias-rms"]
    own = rank_config(config, head_layout(config, 4))
    assert (own.num_attention_heads, own.num_key_value_heads) == (1, 1)
    assert own.qkv_bias
    assert not own.o_bias
    assert (own.head_dim, own.softmax_scale) == (config.head_dim, config.softmax_scale)


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(4, 6, 2), (4, 6, 3), (8, 2, 2), (3, 8, 2)])
def test_d19_joining_ranks_projections_gives_the_layers_own(
    tp: int, heads: int, kv_heads: int
) -> None:
    layout = head_layout(layer(heads, kv_heads), tp)
    for sources, count in ((layout.q_part, heads), (layout.kv_part, kv_heads)):
        whole = normal(tp, 2, 3, count * 2)
        parts = [take_heads(whole, sources(part), 2, axis=2) for part in range(tp)]
        assert identical(whole_projection(parts, [sources(p) for p in range(tp)], 2), whole)
