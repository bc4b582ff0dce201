"""Attention over parts of the keys, joined through logsumexp, is attention over all of them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden.split_kv
from golden import (
    Array,
    Attended,
    Causal,
    ConfigError,
    Everything,
    Explicit,
    Held,
    Mask,
    ShapeError,
    SlidingWindow,
    attend,
    attend_parts,
    cut_keys,
    merge_attended,
    sharded_cache,
)
from tests.golden.layers import (
    LAYERS,
    Problem,
    assert_within,
    attend_bound,
    gamma,
    identical,
    normal,
    problem,
    sampled,
    seen,
)

HEADS = 4


def positions_of(p: Problem) -> tuple[Array, Array]:
    batch, _, q_len, kv_len = p.shape
    q = np.tile(np.arange(kv_len - q_len, kv_len), (batch, 1))
    return q, np.tile(np.arange(kv_len), (batch, 1))


def merge_bounds(
    p: Problem, mask: Mask, *, parts: int, sinks: Array | None, softcap: float | None
) -> tuple[Array, Array]:
    """Bound the difference of a merge from the whole.

    Each part lies within the bound of one attention whose values are as large as the largest, and
    the shares of a merge, `exp(l_p - l)`, err by twice the log-sum-exp's bound and a few roundings;
    they mix outputs no larger than the largest value.
    """
    largest = np.broadcast_to(np.abs(p.v).max(axis=2, keepdims=True), p.v.shape)
    visible = seen(mask, *positions_of(p), p.shape)
    one = attend_bound(p.q, p.k, largest, visible, scale=p.scale, softcap=softcap, sinks=sinks)
    share = np.expm1(4.0 * one.logsumexp + gamma(2 * parts + 8))[..., None]
    group = p.q.shape[1] // p.k.shape[1]
    output = 2.0 * one.output + share * np.repeat(largest[:, :, :1], group, axis=1)
    magnitude = 1.0 + np.abs(one.logsumexp) + math.log(parts)
    return output, 2.0 * one.logsumexp + gamma(parts + 8) * magnitude


def check_split(
    p: Problem,
    mask: Mask,
    cuts: list[int],
    *,
    sinks: Array | None = None,
    softcap: float | None = None,
) -> None:
    q_positions, kv_positions = positions_of(p)
    whole = attend(
        p.q,
        p.k,
        p.v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=mask,
        sinks=sinks,
        softcap=softcap,
    )
    parts = cut_keys(Held(p.k, p.v, kv_positions), cuts)
    merged = attend_parts(
        p.q, parts, q_positions=q_positions, mask=mask, sinks=sinks, softcap=softcap
    )
    output, logsumexp = merge_bounds(p, mask, parts=len(parts), sinks=sinks, softcap=softcap)
    assert_within(merged.output, whole.output, output)
    finite = np.isfinite(whole.logsumexp)
    assert (np.isfinite(merged.logsumexp) == finite).all()
    scale = gamma(len(parts) + 8) * np.abs(whole.logsumexp[finite])
    assert_within(merged.logsumexp[finite], whole.logsumexp[finite], logsumexp[finite] + scale)


@sampled
@given(
    seed=st.integers(0, 2**32),
    q_len=st.integers(1, 4),
    kv_len=st.integers(4, 9),
    cuts=st.lists(st.integers(0, 4), max_size=4).map(sorted),
    window=st.sampled_from([None, 1, 3]),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    size=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_j1_a_merge_at_any_cut_is_the_whole(
    seed: int,
    q_len: int,
    kv_len: int,
    cuts: list[int],
    window: int | None,
    sinks: bool,
    softcap: float | None,
    size: float,
) -> None:
    p = problem(seed, q_len=q_len, kv_len=kv_len, size=size)
    mask: Mask = Causal() if window is None else Causal() & SlidingWindow(window)
    logits = normal(seed + 9, HEADS, size=2.0) if sinks else None
    check_split(p, mask, cuts, sinks=logits, softcap=softcap)


def test_j1_flash_decoding_s_cores_merge_to_the_whole() -> None:
    p = problem(3, q_len=2, kv_len=9)
    q_positions, kv_positions = positions_of(p)
    layer = LAYERS["gqa-bias-rms"]  # two key/value heads of width four, as the problem's
    cache = sharded_cache(layer, batch=2, max_length=12, cores=4)
    cache = cache.write(p.k, p.v, kv_positions)
    sinks = normal(4, HEADS)
    merged = attend_parts(
        p.q,
        cache.shards(np.full((2, 1), 12)),
        q_positions=q_positions,
        mask=Causal(),
        sinks=sinks,
    )
    whole = attend(
        p.q,
        p.k,
        p.v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=Causal(),
        sinks=sinks,
    )
    output, _ = merge_bounds(p, Causal(), parts=4, sinks=sinks, softcap=None)
    assert_within(merged.output, whole.output, output)


def test_j2_a_part_that_sees_nothing_counts_nothing() -> None:
    p = problem(1)
    q_positions, kv_positions = positions_of(p)
    full = Held(p.k, p.v, kv_positions)
    empty = Held(p.k, p.v, np.full_like(kv_positions, -1))
    alone = attend_parts(p.q, [full], q_positions=q_positions, mask=Causal())
    beside = attend_parts(p.q, [empty, full, empty], q_positions=q_positions, mask=Causal())
    assert identical(alone.output, beside.output)
    assert identical(alone.logsumexp, beside.logsumexp)
    nothing = attend_parts(p.q, [empty, empty], q_positions=q_positions, mask=Causal())
    assert (nothing.output == 0).all()
    assert np.isneginf(nothing.logsumexp).all()


def test_j3_a_sink_of_an_empty_prior_still_counts_once() -> None:
    p = problem(2)
    q_positions, kv_positions = positions_of(p)
    empty = Held(p.k, p.v, np.full_like(kv_positions, -1))
    zeros, ones = np.zeros_like(p.q), np.ones_like(p.v)
    sinks = np.array([0.0, 1.0, -1.0, 2.0])
    got = attend_parts(
        zeros,
        [empty, Held(p.k, ones, kv_positions)],
        q_positions=q_positions,
        mask=Everything(),
        sinks=sinks,
    ).output
    want = 5.0 / (5.0 + np.exp(sinks))  # uniform scores: n / (n + e^sink)
    assert_within(
        got, np.broadcast_to(want[:, None, None], got.shape), gamma(40) * want[:, None, None]
    )


def test_a_mask_by_index_is_given_part_by_part() -> None:
    p = problem(5)
    q_positions, kv_positions = positions_of(p)
    allowed = np.random.default_rng(0).random((5, 5)) < 0.6
    parts = cut_keys(Held(p.k, p.v, kv_positions), [2])
    got = attend_parts(
        p.q,
        parts,
        q_positions=q_positions,
        mask=[Explicit(allowed[:, :2]), Explicit(allowed[:, 2:])],
    ).output
    want = attend(
        p.q,
        p.k,
        p.v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        mask=Explicit(allowed),
    ).output
    bound, _ = merge_bounds(p, Explicit(allowed), parts=2, sinks=None, softcap=None)
    assert_within(got, want, bound)


# Planted defects


def test_the_comparison_sees_a_merge_that_reads_log2(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge_attended
    monkeypatch.setattr(
        golden.split_kv,
        "merge_attended",
        lambda parts: right([Attended(o, log / math.log(2.0)) for o, log in parts]),
    )
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_split(problem(0), Causal(), [2])


def test_the_comparison_sees_a_sink_counted_on_every_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sinks = normal(1, HEADS)
    right = attend

    def everywhere(*arguments: object, **options: object) -> Attended:
        return right(*arguments, **options | {"sinks": sinks})  # type: ignore[arg-type]

    monkeypatch.setattr(golden.split_kv, "attend", everywhere)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_split(problem(0), Causal(), [2], sinks=sinks)


def test_the_comparison_sees_shares_left_at_their_part_s_maximum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        golden.split_kv,
        "merge_attended",
        lambda parts: Attended(
            sum(p.output for p in parts) / len(parts),
            np.logaddexp.reduce([p.logsumexp for p in parts]),
        ),
    )
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_split(problem(0), Causal(), [2])


# Callers' mistakes


def test_parts_are_at_least_one_of_one_shape_with_a_mask_each() -> None:
    p = problem(0)
    q_positions, kv_positions = positions_of(p)
    held = Held(p.k, p.v, kv_positions)
    with pytest.raises(ConfigError, match="parts must hold at least one result, got none"):
        merge_attended([])
    left = attend_parts(p.q, [held], q_positions=q_positions, mask=Causal())
    with pytest.raises(ShapeError, match="parts must have one shape"):
        merge_attended([left, Attended(left.output[:1], left.logsumexp[:1])])
    with pytest.raises(ConfigError, match="mask must be one, or one per part, got 1 for 2"):
        attend_parts(p.q, [held, held], q_positions=q_positions, mask=[Causal()])
    with pytest.raises(ConfigError, match=re.escape("cuts must ascend from 0 to 5, got [3, 2]")):
        cut_keys(held, [3, 2])
