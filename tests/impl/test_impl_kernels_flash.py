"""Flash attention is the native form's function, forward and backward, tile edges included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from impl_layers import ROUNDOFF, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import ShapeError
from impl.kernels import flash, flash_plan, native
from impl.kernels.flash import flash_attention
from impl.kernels.native import ScoreRule
from impl.masks import visible

Q_TILE, KV_TILE = 3, 4
WIDTH = 8
RULE = ScoreRule(divisor=2.5)


@pytest.fixture(autouse=True)
def _small_tiles_and_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 3 queries and 4 keys, so that short sequences cross many edges of both."""
    monkeypatch.setattr(flash, "Q_TILE", Q_TILE)
    monkeypatch.setattr(flash_plan, "KV_TILE", KV_TILE)
    with torch.enable_grad():
        yield


def heads(
    q_len: int,
    kv_len: int,
    *,
    batch: int = 2,
    group: int = 2,
    kv_heads: int = 2,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signed q, k, v in float64 that ask for gradients, and a sink logit per query head."""
    generator = torch.Generator().manual_seed(q_len + 100 * kv_len)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = drawn(batch, kv_heads * group, q_len, WIDTH) * scale
    k, v = (drawn(batch, kv_heads, kv_len, WIDTH) for _ in range(2))
    sink = drawn(kv_heads * group)
    for tensor in (q, k, v, sink):
        tensor.requires_grad_()
    return q, k, v, sink


def by_position(
    q_len: int, kv_len: int, offset: int = 0, stride: int = 1, origin: int = 0, **limits: Any
) -> Tensor:
    """The plain mask of the same step, `(1, 1, q_len, kv_len)`."""
    q = torch.arange(q_len) * stride + offset + origin
    return visible(q[None], torch.arange(kv_len)[None] + origin, **limits)


def assert_same(got: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Outputs agree, and so do the gradients of a random projection of them."""
    assert relative_error(got.detach(), expected.detach()) < ROUNDOFF
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=got.dtype)
    ours = torch.autograd.grad(got, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < ROUNDOFF * max(1.0, float(b.abs().max()))


LENGTHS = [1, Q_TILE - 1, Q_TILE, Q_TILE + 1, KV_TILE, KV_TILE + 1, 3 * KV_TILE, 3 * KV_TILE + 1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, KV_TILE, KV_TILE + 1])
def test_lengths_and_windows_around_the_edges_of_tiles(length: int, window: int | None) -> None:
    q, k, v, sink = heads(length, length)
    mask = by_position(length, length, sliding_window=window)
    for s in (None, sink):
        got = flash_attention(q, k, v, rule=RULE, sink=s, sliding_window=window)
        expected = native.context_encoding(q, k, v, mask, s, RULE)
        assert_same(got, expected, (q, k, v) if s is None else (q, k, v, s))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, KV_TILE, KV_TILE + 1, 50])
def test_chunks_and_softcap(chunk: int, softcap: float | None) -> None:
    rule = ScoreRule(divisor=2.5, softcap=softcap)
    q, k, v, sink = heads(11, 11, scale=4.0)
    mask = by_position(11, 11, attention_chunk_size=chunk)
    got = flash_attention(q, k, v, rule=rule, sink=sink, attention_chunk_size=chunk)
    assert_same(got, native.context_encoding(q, k, v, mask, sink, rule), (q, k, v, sink))


@pytest.mark.parametrize("origin", [0, 3, 16391])
def test_chunks_that_do_not_begin_with_the_step(origin: int) -> None:
    q, k, v, _ = heads(11, 11)
    mask = by_position(11, 11, origin=origin, attention_chunk_size=5)
    got = flash_attention(
        q, k, v, rule=RULE, attention_chunk_size=5, chunk_origin=torch.full((2,), origin)
    )
    assert_same(got, native.context_encoding(q, k, v, mask, None, RULE), (q, k, v))


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 4), (7, 1), (4, 1), (3, 2)])
def test_groups_of_query_heads(group: int, kv_heads: int) -> None:
    q, k, v, sink = heads(7, 7, group=group, kv_heads=kv_heads)
    got = flash_attention(q, k, v, rule=RULE, sink=sink)
    mask = by_position(7, 7)
    assert_same(got, native.context_encoding(q, k, v, mask, sink, RULE), (q, k, v, sink))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("strided", [False, True])
def test_a_context_parallel_ranks_queries(rank: int, window: int | None, strided: bool) -> None:
    ranks, q_len = 3, 5
    offset, stride = (rank, ranks) if strided else (rank * q_len, 1)
    q, k, v, sink = heads(q_len, ranks * q_len)
    mask = by_position(q_len, ranks * q_len, offset, stride, sliding_window=window)
    got = flash_attention(
        q, k, v, rule=RULE, sink=sink, sliding_window=window, q_offset=offset, q_stride=stride
    )
    assert_same(got, native.context_encoding(q, k, v, mask, sink, RULE), (q, k, v, sink))


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("rotated", [0, 3])
def test_cached_keys_wherever_their_slots_are(window: int | None, rotated: int) -> None:
    """Rows of 6 and 2 cached tokens; a rotated cache holds them out of order."""
    prior_len, step = 7, 6
    lengths = torch.tensor([6, 2])
    q, k, v, sink = heads(step, step)
    _, k_prior, v_prior, _ = heads(1, prior_len)
    slots = torch.arange(prior_len).roll(rotated).expand(2, -1)
    held = torch.where(slots < lengths[:, None], slots, -1)
    q_at = torch.arange(step) + lengths[:, None]
    expected = native.token_generation(
        q,
        k,
        v,
        k_prior,
        v_prior,
        visible(q_at, held, sliding_window=window),
        by_position(step, step, sliding_window=window),
        sink,
        RULE,
    )
    got = flash_attention(
        q,
        k,
        v,
        rule=RULE,
        sink=sink,
        sliding_window=window,
        k_prior=k_prior,
        v_prior=v_prior,
        prior_mask=(held >= 0)[:, None, None],
        prior_positions=held - lengths[:, None],
    )
    assert_same(got, expected, (q, k, v, sink, k_prior, v_prior))


def test_cached_keys_stand_right_before_the_step_unless_told_otherwise() -> None:
    q, k, v, _ = heads(5, 12)
    split = [t.split([7, 5], dim=2) for t in (k, v)]
    got = flash_attention(
        q, split[0][1], split[1][1], rule=RULE, k_prior=split[0][0], v_prior=split[1][0]
    )
    mask = by_position(5, 12, offset=7)
    assert_same(got, native.context_encoding(q, k, v, mask, None, RULE), (q, k, v))


@pytest.mark.parametrize("with_sink", [False, True])
def test_padding_on_either_side_and_rows_that_see_nothing(with_sink: bool) -> None:
    q, k, v, sink = heads(9, 9)
    s = sink if with_sink else None
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :5], valid[1, 6:] = False, False
    mask = by_position(9, 9) & valid[:, None, None]
    expected = native.context_encoding(q, k, v, mask, s, RULE)
    poisoned = [t.detach().masked_fill(~valid[:, None, :, None], float("nan")) for t in (k, v)]
    got = flash_attention(q, *poisoned, rule=RULE, sink=s, mask=valid[:, None, None])
    assert relative_error(got.detach(), expected.detach()) < ROUNDOFF
    assert torch.equal(got[0, :, :5], torch.zeros_like(got[0, :, :5]))
    clean = flash_attention(q, k, v, rule=RULE, sink=s, mask=valid[:, None, None])
    assert_same(clean, expected, (q, k, v, sink) if with_sink else (q, k, v))


@pytest.mark.parametrize("lines", [1, 2])
def test_a_given_mask_narrows_positions_or_stands_alone(lines: int) -> None:
    q, k, v, sink = heads(7, 10)
    given = torch.rand(lines, 1, 7, 10, generator=torch.Generator().manual_seed(3)) < 0.4
    given[:, :, 2] = False
    for causal in (False, True):
        mask = given & by_position(7, 10, offset=2) if causal else given
        got = flash_attention(q, k, v, rule=RULE, sink=sink, causal=causal, q_offset=2, mask=given)
        assert_same(got, native.context_encoding(q, k, v, mask, sink, RULE), (q, k, v, sink))


@pytest.mark.parametrize("length", [8, 9, 10, 17])
def test_a_short_rest_joins_the_last_tile(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_plan, "KV_TILE", 8)
    q, k, v, sink = heads(length, length)
    got = flash_attention(q, k, v, rule=RULE, sink=sink)
    mask = by_position(length, length)
    assert_same(got, native.context_encoding(q, k, v, mask, sink, RULE), (q, k, v, sink))


def test_logits_far_beyond_the_range_of_exp() -> None:
    q, k, v, sink = heads(9, 9, scale=3000.0)
    expected = native.context_encoding(q, k, v, by_position(9, 9), sink, RULE)
    got = flash_attention(q, k, v, rule=RULE, sink=sink)
    # logits reach 1e4, so their own roundoff moves a weight by 1e4 times as much
    assert relative_error(got.detach(), expected.detach()) < 1e4 * ROUNDOFF


PLANTED: dict[str, tuple[str, Any]] = {
    "window one wider": ("mask", lambda plan: {"sliding_window": plan.sliding_window + 1}),
    "skips the window's first key": (
        "_needed",
        lambda plan: {"sliding_window": plan.sliding_window - 1},
    ),
    "offset forgotten": ("mask", lambda plan: {"q_offset": 0}),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_in_the_plan_shows(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, change = PLANTED[bug]
    right = getattr(flash_plan.TilePlan, method)

    def wrong(self: Any, *arguments: Any) -> Any:
        return right(replace(self, **change(self)), *arguments)

    monkeypatch.setattr(flash_plan.TilePlan, method, wrong)
    q, k, v, _ = heads(6, 12)
    mask = by_position(6, 12, offset=6, sliding_window=KV_TILE)
    got = flash_attention(q, k, v, rule=RULE, q_offset=6, sliding_window=KV_TILE)
    expected = native.context_encoding(q, k, v, mask, None, RULE)
    assert relative_error(got.detach(), expected.detach()) > 1e-3


@pytest.mark.parametrize(
    ("limits", "offset", "most"),
    [
        # 12 query tiles of 3; key tiles of 4: causal needs ceil(3 (i + 1) / 4) of them
        ({}, 0, sum(-(-3 * (i + 1) // 4) for i in range(12))),
        # 2 + 4 - 1 keys a tile of queries: at most two tiles
        ({"sliding_window": 3}, 0, 24),
        ({"attention_chunk_size": 4}, 0, 24),
        ({"sliding_window": 1}, 0, 12),
    ],
)
def test_empty_tiles_are_not_computed(limits: dict[str, int], offset: int, most: int) -> None:
    plan = flash_plan.TilePlan(
        q_len=36,
        kv_len=36,
        prior_len=0,
        q_offset=offset,
        q_stride=1,
        causal=True,
        sliding_window=limits.get("sliding_window"),
        attention_chunk_size=limits.get("attention_chunk_size"),
        prior_moves=False,
        chunk_moves=False,
        q_tile=3,
    )
    tiles = [tile for queries in plan.q_tiles() for tile in plan.kv_tiles(*queries)]
    assert 0 < len(tiles) <= most


@pytest.mark.parametrize("kv_tile", [1, KV_TILE, 5, 8, 64])
def test_a_tile_called_full_hides_nothing(kv_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile against the plain mask: empty where left out, all True where called full."""
    monkeypatch.setattr(flash_plan, "KV_TILE", kv_tile)
    for window, chunk, offset, stride in itertools.product(
        (None, 1, 4, 6), (None, 4, 5), (0, 2), (1, 3)
    ):
        q_len, kv_len = 7, offset + 6 * stride + 3
        plan = flash_plan.TilePlan(
            q_len=q_len,
            kv_len=kv_len,
            prior_len=0,
            q_offset=offset,
            q_stride=stride,
            causal=True,
            sliding_window=window,
            attention_chunk_size=chunk,
            prior_moves=False,
            chunk_moves=False,
            q_tile=2,
        )
        mask = by_position(
            q_len, kv_len, offset, stride, sliding_window=window, attention_chunk_size=chunk
        )[0, 0]
        left = mask.clone()
        for start, end in plan.q_tiles():
            for tile in plan.kv_tiles(start, end):
                left[start:end, tile.first : tile.stop] = False
                assert tile.partial or mask[start:end, tile.first : tile.stop].all()
        assert not left.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_one_graph_and_runs_on_fake_tensors(dtype: torch.dtype) -> None:
    q, k, v, sink = (t.detach().to(dtype).requires_grad_() for t in heads(7, 7))

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return flash_attention(q, k, v, rule=RULE, sink=sink, sliding_window=5)

    expected = attend(q, k, v, sink)
    assert expected.dtype is dtype
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    got = compiled(q, k, v, sink)
    assert torch.equal(got, expected)
    upstream = torch.ones_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v, sink), upstream),
        torch.autograd.grad(expected, (q, k, v, sink), upstream),
        strict=True,
    ):
        assert a.dtype is dtype
        assert torch.equal(a, b)
    with FakeTensorMode() as mode:
        fake = attend(*(mode.from_tensor(t) for t in (q, k, v, sink)))
    assert (fake.shape, fake.dtype) == (expected.shape, dtype)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"sliding_window": 2, "causal": False}, "sliding_window must be None unless causal"),
        ({"q_stride": 0}, "q_stride must be at least 1"),
        ({"sink": torch.zeros(3)}, "sink must have shape"),
        ({"mask": torch.ones(2, 7).bool()}, "mask must have shape"),
        ({"mask": torch.ones(2, 1, 7, 8).bool()}, "mask must have shape"),
        ({"k_prior": torch.zeros(2, 2, 3, WIDTH)}, "k_prior and v_prior must be given together"),
        ({"v_prior": torch.zeros(2, 2, 3, WIDTH)}, "be given together"),
        ({"prior_positions": torch.zeros(2, 3)}, "prior_positions must have shape"),
        ({"k": torch.zeros(2, 2, WIDTH, 7)}, "k must have shape .*is it BHSD"),
        ({"q": torch.zeros(2, 5, 7, WIDTH)}, "num_attention_heads must be a multiple of"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], match: str) -> None:
    q, k, v, _ = heads(7, 7)
    arguments = {"q": q, "k": k, "v": v, "rule": RULE, **change}
    with pytest.raises(ShapeError, match=match):
        flash_attention(**arguments)
