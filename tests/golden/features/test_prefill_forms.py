"""Prefix-cached, windowed and packed prefill give what one context encoding gives."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.packing
import golden.serving
from golden import (
    Causal,
    Chunked,
    ConfigError,
    DynamicNTKScaling,
    Packing,
    RopeConfig,
    SameSegment,
    ShapeError,
    attend,
    empty_cache,
    forward,
    packed_forward,
    visible_keys,
    windowed_encoding,
)
from golden.tiles import cells_of
from tests.golden.features.served import CACHES, SERVED, Whole, whole
from tests.golden.layers import (
    LAYERS,
    assert_within,
    attend_bound,
    identical,
    integer_weights,
    problem,
    sampled,
    seen,
)

LENGTH = 10


# Windowed context encoding


@pytest.mark.parametrize(("cache", "layer"), SERVED)
@pytest.mark.parametrize("window", [1, 3, 4, LENGTH, 99])
def test_w1_any_encoding_window_is_one_context_encoding(
    cache: str, layer: str, window: int
) -> None:
    config = LAYERS[layer]
    sequences = whole(config, 4, 2, LENGTH)
    result = windowed_encoding(
        config,
        integer_weights(config, 4),
        sequences.states,
        position_ids=sequences.positions,
        cache=CACHES[cache](config, 2, LENGTH),
        encoding_window=window,
    )
    assert_within(result.output, sequences.output, sequences.bound)


def test_w1_an_encoding_window_must_be_positive() -> None:
    config = LAYERS["mha"]
    with pytest.raises(ConfigError, match="encoding_window must be positive, got 0"):
        windowed_encoding(
            config,
            integer_weights(config),
            np.zeros((1, 2, 8)),
            position_ids=[0, 1],
            cache=empty_cache(config, batch=1, max_length=2),
            encoding_window=0,
        )


# Prefix-cached prefill


def check_prefix(layer: str) -> None:
    """Rows share no prefix length: the prior of each is masked by its own positions."""
    config = LAYERS[layer]
    weights = integer_weights(config, 6)
    sequences = whole(config, 6, 2, LENGTH)
    lengths = [6, 2]
    positions = np.where(np.arange(6) < np.array(lengths)[:, None], np.arange(6), -1)
    cache = forward(
        config,
        weights,
        sequences.states[:, :6],
        position_ids=positions,
        cache=empty_cache(config, batch=2, max_length=LENGTH),
    ).cache
    suffix = np.array([[6, 7, 8, 9], [2, 3, 4, -1]])
    got = forward(
        config,
        weights,
        np.take_along_axis(sequences.states, np.maximum(suffix, 0)[..., None], axis=1),
        position_ids=suffix,
        cache=cache,
    ).output
    for row in range(2):
        at = suffix[row][suffix[row] >= 0]
        assert_within(got[row, : at.size], sequences.output[row, at], sequences.bound[row, at])


@pytest.mark.parametrize("layer", LAYERS)
def test_f2_a_prefix_of_each_row_s_own_length_is_attended_with_window_and_sinks(
    layer: str,
) -> None:
    check_prefix(layer)


@pytest.mark.parametrize("layer", ["window-sinks", "chunk-post-norm"])
def test_the_comparison_sees_prior_keys_without_the_layer_s_mask(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden.serving, "layer_mask", lambda config: Causal())
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_prefix(layer)


# Packed sequences


def check_packed(
    cache: str, layer: str, cached: list[int], new: list[int], *, padding: int = 0
) -> None:
    config = LAYERS[layer]
    weights, count = integer_weights(config, 8), len(new)
    sequences = whole(config, 8, count, LENGTH)
    held = CACHES[cache](config, count, LENGTH)
    for row, length in enumerate(cached):
        if length:
            held = forward(
                config,
                weights,
                sequences.states[row : row + 1, :length],
                position_ids=[np.arange(length)],
                cache=held,
                seq_ids=[row],
            ).cache
    spans = list(zip(cached, new, strict=True))
    packed = [sequences.states[row, a : a + n] for row, (a, n) in enumerate(spans)]
    tail = np.full((padding, config.hidden_size), 1e6)
    result = packed_forward(
        config,
        weights,
        np.concatenate([*packed, tail])[None],
        query_lens=new,
        key_lens=[a + n for a, n in spans],
        cache=held,
    )
    start = 0
    for row, (a, n) in enumerate(spans):
        part = result.output[0, start : start + n]
        assert_within(part, sequences.output[row, a : a + n], sequences.bound[row, a : a + n])
        start += n
    check_next(sequences, [a + n for a, n in spans], config, result.cache)


def check_next(sequences: Whole, at: list[int], config: Any, cache: Any) -> None:
    rows = [row for row, p in enumerate(at) if p < LENGTH]
    places = np.array([at[row] for row in rows], dtype=np.int64)
    got = forward(
        config,
        integer_weights(config, 8),
        sequences.states[rows, places][:, None],
        position_ids=places[:, None],
        cache=cache,
        seq_ids=rows,
    ).output[:, 0]
    assert_within(got, sequences.output[rows, places], sequences.bound[rows, places])


@pytest.mark.parametrize(("cache", "layer"), SERVED)
def test_p2_packed_sequences_are_the_separate_ones(cache: str, layer: str) -> None:
    check_packed(cache, layer, cached=[0, 4, 7, 0], new=[5, 3, 1, 0], padding=2)


@sampled
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4),
    layer=st.sampled_from(sorted(LAYERS)),
)
def test_p3_any_mixture_of_prefill_and_decode_packs(
    lengths: list[tuple[int, int]], layer: str
) -> None:
    cached, new = [a for a, _ in lengths], [n for _, n in lengths]
    check_packed("paged", layer, cached, new)


def test_p1_packing_s_numbers() -> None:
    packing = Packing(query_lens=(3, 1, 0, 2), key_lens=(3, 5, 2, 6))
    assert packing.q_positions.tolist() == [[0, 1, 2, 4, 4, 5]]
    assert packing.q_segments.tolist() == [[0, 0, 0, 1, 3, 3]]
    assert packing.kv_positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]]
    assert packing.kv_segments.tolist() == [[0] * 3 + [1] * 5 + [2] * 2 + [3] * 6]
    assert packing.rows.tolist() == [[0, 1, 2], [4, -1, -1], [-1, -1, -1], [4, 5, -1]]


def test_m6_packed_keys_of_the_core_are_separate_attentions() -> None:
    packing = Packing(query_lens=(2, 3), key_lens=(4, 3))
    p = problem(1, batch=1, q_len=5, kv_len=7)
    mask = Causal() & SameSegment(packing.q_segments, packing.kv_segments)
    got = attend(
        p.q, p.k, p.v, q_positions=packing.q_positions, kv_positions=packing.kv_positions, mask=mask
    ).output
    visible = seen(mask, packing.q_positions, packing.kv_positions, p.shape)
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale).output
    for q, kv in (((0, 2), (0, 4)), ((2, 5), (4, 7))):
        alone = attend(
            p.q[:, :, slice(*q)],
            p.k[:, :, slice(*kv)],
            p.v[:, :, slice(*kv)],
            q_positions=packing.q_positions[:, slice(*q)],
            kv_positions=packing.kv_positions[:, slice(*kv)],
            mask=Causal(),
        ).output
        assert_within(got[:, :, slice(*q)], alone, bound[:, :, slice(*q)])


def test_m6_the_documented_picture_and_padding() -> None:
    segments = np.array([[0, 0, 1, 1, -1]])
    places = np.zeros((1, 5), dtype=np.int64)
    mask = SameSegment(segments, segments)
    rows = ["".join("01"[int(x)] for x in row) for row in visible_keys(mask, places, places)[0, 0]]
    assert rows == ["11000", "11000", "00110", "00110", "00000"]
    with pytest.raises(ShapeError, match="segments must have the positions' shapes"):
        mask.visible(places[:, :3], places)
    with pytest.raises(ShapeError, match="segments must have the positions' shapes"):
        mask.coverage(cells_of(places[:, :3], 2), cells_of(places, 2))


@sampled
@given(seed=st.integers(0, 2**32), size=st.integers(1, 4))
def test_m6_coverage_and_blocks_never_contradict_the_mask(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    q, kv = rng.integers(-1, 3, (2, 6)), rng.integers(-1, 3, (2, 7))
    mask = SameSegment(q, kv)
    q_cells, kv_cells = cells_of(np.zeros_like(q), size), cells_of(np.zeros_like(kv), size)
    visible = mask.visible(np.zeros_like(q), np.zeros_like(kv))
    coverage = mask.coverage(q_cells, kv_cells)
    for i in range(q_cells.edges.size - 1):
        for j in range(kv_cells.edges.size - 1):
            tile = visible[
                :,
                :,
                q_cells.edges[i] : q_cells.edges[i + 1],
                kv_cells.edges[j] : kv_cells.edges[j + 1],
            ]
            assert (coverage.some[:, :, i, j] | ~tile.any(axis=(2, 3))).all()
            assert (~coverage.every[:, :, i, j] | tile.all(axis=(2, 3))).all()
    part = mask.block(slice(1, 2), slice(None), slice(1, 4), np.array([0, 5]))
    got = part.visible(np.zeros((1, 3), dtype=np.int64), np.zeros((1, 2), dtype=np.int64))
    assert (got == visible[1:2, :, 1:4][..., [0, 5]]).all()


def test_the_comparison_sees_packed_sequences_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden.packing, "SameSegment", lambda q, kv: Causal())
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_packed("contiguous", "mha", [0, 3], [4, 2])


def test_the_comparison_sees_positions_that_restart_at_the_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FromZero(Packing):
        @property
        def rows(self) -> Any:
            return Packing(self.query_lens, self.query_lens).rows

    monkeypatch.setattr(golden.packing, "Packing", FromZero)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_packed("contiguous", "mha", [0, 3], [4, 2])


@pytest.mark.parametrize(
    ("new", "every"), [((3,), (2,)), ((-1,), (2,)), ((1, 1), (2,)), ((1,), (2, 2))]
)
def test_p1_lengths_that_do_not_fit_are_refused(
    new: tuple[int, ...], every: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"got {list(new)} and {list(every)}")):
        Packing(new, every)


def test_packed_hidden_states_are_one_long_enough_row() -> None:
    config = LAYERS["mha"]
    for shape in ((1, 2, 8), (2, 3, 8)):
        with pytest.raises(ShapeError, match="hidden_states must be one row of at least 3 tokens"):
            packed_forward(
                config,
                integer_weights(config),
                np.zeros(shape),
                query_lens=[3],
                key_lens=[3],
                cache=empty_cache(config, batch=1, max_length=4),
            )


def test_c3_a_packed_sequence_without_a_cache_row_is_padding() -> None:
    config = LAYERS["mha"]
    sequences = whole(config, 8, 2, LENGTH)
    held = CACHES["paged"](config, 2, LENGTH)
    result = packed_forward(
        config,
        integer_weights(config, 8),
        np.concatenate([sequences.states[0, :4], sequences.states[1, :3]])[None],
        query_lens=[4, 3],
        key_lens=[4, 3],
        cache=held,
        seq_ids=[-1, 1],
    )
    assert (result.output[0, :4] == 0).all()
    assert_within(result.output[0, 4:], sequences.output[1, :3], sequences.bound[1, :3])
    at = np.full((2, 1), 9)
    assert (result.cache.prior(at).positions[0] == -1).all()


@pytest.mark.parametrize("seq_len", [0, 128])
def test_packed_rows_cannot_scale_rope_by_their_own_length(seq_len: int) -> None:
    scaling = DynamicNTKScaling(factor=2.0, original_max_position_embeddings=2, seq_len=seq_len)
    config = replace(LAYERS["mha"], rope=RopeConfig(scaling=scaling))
    lengths: dict[str, Any] = {"query_lens": [2, 1], "key_lens": [2, 1]}
    hidden, cache = np.ones((1, 3, 8)), empty_cache(config, batch=2, max_length=4)
    if seq_len:
        packed_forward(config, integer_weights(config), hidden, cache=cache, **lengths)
        return
    with pytest.raises(ConfigError, match="packed sequences share a row"):
        packed_forward(config, integer_weights(config), hidden, cache=cache, **lengths)


def test_sinks_and_chunks_go_together_in_golden() -> None:
    """The public module refuses the pair; its mathematics is plain."""
    p = problem(2, q_len=6, kv_len=6)
    sinks = np.array([0.5, -1.0, 0.0, 2.0])
    places = np.tile(np.arange(6), (2, 1))
    got = attend(
        p.q,
        p.k,
        p.v,
        q_positions=places,
        kv_positions=places,
        mask=Causal() & Chunked(3),
        sinks=sinks,
    ).output
    visible = seen(Causal() & Chunked(3), places, places, p.shape)
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale, sinks=sinks).output
    for start in (0, 3):
        part = slice(start, start + 3)
        alone = attend(
            p.q[:, :, part],
            p.k[:, :, part],
            p.v[:, :, part],
            q_positions=places[:, part],
            kv_positions=places[:, part],
            mask=Causal(),
            sinks=sinks,
        ).output
        assert_within(got[:, :, part], alone, bound[:, :, part])
    assert not identical(got[:, :, 3:], got[:, :, :3])
