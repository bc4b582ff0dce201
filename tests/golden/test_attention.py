from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    BoolArray,
    Problem,
    U,
    assert_within,
    attend_bound,
    attend_by_hand,
    gamma,
    identical,
    normal,
    problem,
    problems,
    sampled,
    seen,
    small_integers,
    visibilities,
)
from scipy.special import logsumexp as scipy_logsumexp

import golden.attention
from golden import (
    Accumulation,
    Array,
    Attended,
    Capture,
    Causal,
    Chunked,
    ConfigError,
    Everything,
    Explicit,
    Mask,
    Observer,
    ShapeError,
    SlidingWindow,
    attend,
    unobserved,
)


def run(p: Problem, mask: Mask | None = None, **changes: Any) -> Attended:
    """Attend causally at positions 0, 1, ..., unless told otherwise."""
    arguments: dict[str, Any] = {
        "q_positions": np.arange(p.q.shape[2]),
        "kv_positions": np.arange(p.k.shape[2]),
        "mask": Causal() if mask is None else mask,
    }
    return attend(p.q, p.k, p.v, **(arguments | changes))


def check_against_hand(
    p: Problem,
    mask: Mask,
    visible: BoolArray,
    *,
    softcap: float | None = None,
    sinks: Array | None = None,
    observe: Observer = unobserved,
) -> None:
    got = run(p, mask, softcap=softcap, sinks=sinks, observe=observe)
    output, logsumexp = attend_by_hand(
        p.q, p.k, p.v, visible, scale=p.scale, softcap=softcap, sinks=sinks
    )
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale, softcap=softcap, sinks=sinks)
    assert_within(got.output, output, bound.output)
    assert_within(got.logsumexp, logsumexp, bound.logsumexp)


# The definition, derived twice


@sampled
@given(data=st.data(), p=problems())
def test_attend_is_its_formula_for_any_heads_mask_cap_and_sinks(
    data: st.DataObject, p: Problem
) -> None:
    visible = data.draw(visibilities(p))
    softcap = data.draw(st.sampled_from([None, 0.5, 20.0]))
    sinks = normal(7, p.q.shape[1], size=2.0) if data.draw(st.booleans()) else None
    check_against_hand(p, Explicit(visible), visible, softcap=softcap, sinks=sinks)


MASKED: dict[str, Callable[[int, int], bool]] = {
    "causal": lambda i, j: j <= i,
    "window": lambda i, j: i - 3 < j <= i,
    "chunk": lambda i, j: j <= i and i // 3 == j // 3,
}
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Causal() & SlidingWindow(3),
    "chunk": Causal() & Chunked(3),
}


def pairs_seen(name: str, p: Problem) -> BoolArray:
    q_len, kv_len = p.shape[2:]
    table = [[MASKED[name](i, j) for j in range(kv_len)] for i in range(q_len)]
    return np.broadcast_to(np.array(table, dtype=np.bool_), p.shape)


@pytest.mark.parametrize("name", MASKS)
def test_attend_is_its_formula_under_the_masks_of_a_layer(name: str) -> None:
    p = problem(3, q_len=8, kv_len=8, size=2.0)
    check_against_hand(p, MASKS[name], pairs_seen(name, p))


def weights_a_little_too_large(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return value * (1.0 + 1e-12) if stage == "weights" else value


def exponentials_in_base_2(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return value ** math.log(2.0) if stage == "exp" else value


def sinks_half_as_heavy(
    stage: str, value: Array, accumulation: Accumulation | None = None, /
) -> Array:
    return 2.0 * value if stage == "exp" else value


def cap_ignored(stage: str, value: Array, accumulation: Accumulation | None = None, /) -> Array:
    return 20.0 * np.arctanh(value / 20.0) if stage == "softcap" else value


@pytest.mark.parametrize(
    "defect",
    [weights_a_little_too_large, exponentials_in_base_2, sinks_half_as_heavy, cap_ignored],
    ids=lambda defect: defect.__name__,
)
def test_the_comparison_with_the_formula_sees_a_defect_in_a_stage(defect: Observer) -> None:
    p = problem(3, size=2.0)
    sinks = normal(4, 4)
    visible = pairs_seen("causal", p)
    check_against_hand(p, Causal(), visible, softcap=20.0, sinks=sinks)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_hand(p, Causal(), visible, softcap=20.0, sinks=sinks, observe=defect)


def test_the_comparison_with_the_formula_sees_heads_tiled_instead_of_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tiled(rows: Array, columns: Array) -> Array:
        source = np.arange(rows.shape[1]) % columns.shape[1]
        product: Array = rows @ columns[:, source]
        return product

    monkeypatch.setattr(golden.attention, "grouped_matmul", tiled)
    p = problem(3)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_hand(p, Causal(), pairs_seen("causal", p))


@pytest.mark.parametrize("name", MASKS)
def test_the_comparison_with_the_formula_sees_a_mask_off_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = {"causal": Causal, "window": SlidingWindow, "chunk": Chunked}[name]
    right = owner.visible

    def off_by_one(self: Mask, q_positions: Array, kv_positions: Array) -> BoolArray:
        shifted: BoolArray = right(self, q_positions - 1, kv_positions)
        return shifted

    p = problem(3, q_len=8, kv_len=8)
    monkeypatch.setattr(owner, "visible", off_by_one)
    with pytest.raises(AssertionError, match="exceeds bound"):
        check_against_hand(p, MASKS[name], pairs_seen(name, p))


# A1: grouped-query attention


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 7), (1, 8), (1, 1)])
def test_a1_a_query_head_reads_the_kv_head_of_its_group(kv_heads: int, group: int) -> None:
    p = problem(11, kv_heads=kv_heads, group=group)
    repeated = Problem(
        p.q,
        np.stack([p.k[:, h // group] for h in range(kv_heads * group)], axis=1),
        np.stack([p.v[:, h // group] for h in range(kv_heads * group)], axis=1),
    )
    visible = pairs_seen("causal", p)
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale)
    assert_within(run(p).output, run(repeated).output, bound.output)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 7), (4, 2), (1, 8)])
def test_a1_values_that_name_their_kv_head_arrive_at_its_query_heads(
    kv_heads: int, group: int
) -> None:
    p = problem(12, batch=1, kv_heads=kv_heads, group=group, q_len=1, kv_len=1)
    names = np.arange(kv_heads, dtype=np.float64)[None, :, None, None]
    output = run(Problem(p.q, p.k, np.broadcast_to(names, p.v.shape))).output
    expected = [head for head in range(kv_heads) for _ in range(group)]
    assert output[0, :, 0, 0].tolist() == expected


# Closed forms


@sampled
@given(data=st.data(), p=problems())
def test_queries_of_zero_give_the_mean_of_the_visible_values(
    data: st.DataObject, p: Problem
) -> None:
    visible = data.draw(visibilities(p))
    output = run(Problem(0.0 * p.q, p.k, p.v), Explicit(visible)).output
    group = p.shape[1] // p.k.shape[1]
    for b, h, i in np.ndindex(p.shape[:3]):
        values = p.v[b, h // group][visible[b, h, i]]
        count = max(len(values), 1)
        mean = np.array([math.fsum(channel) / count for channel in values.T])
        assert_within(output[b, h, i], mean, gamma(count + 3) * np.abs(values).sum(axis=0) / count)


@pytest.mark.parametrize("kv_len", [1, 2, 8, 32, 64, 128, 1024])
def test_uniform_scores_and_values_of_one_give_exactly_one(kv_len: int) -> None:
    p = problem(0, q_len=3, kv_len=kv_len)
    output = run(Problem(0.0 * p.q, p.k, np.ones_like(p.v)), Everything()).output
    assert identical(output, np.ones_like(output))


@pytest.mark.parametrize("kv_len", [3, 7, 33, 49, 127])
def test_values_of_one_give_one_whatever_the_scores(kv_len: int) -> None:
    p = problem(0, q_len=3, kv_len=kv_len, size=3.0)
    output = run(Problem(p.q, p.k, np.ones_like(p.v)), Everything()).output
    assert_within(output, np.ones_like(output), gamma(2 * kv_len + 2))


@pytest.mark.parametrize("sink", [-30.0, -1.5, 0.0, 1.0, 20.0])
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_a4_scores_of_zero_and_values_of_one_give_n_over_n_plus_exp_sink(
    sink: float, count: int
) -> None:
    p = problem(0, q_len=2, kv_len=count)
    zeros = Problem(0.0 * p.q, p.k, np.ones_like(p.v))
    result = run(zeros, Everything(), sinks=np.full(4, sink))
    total = count + math.exp(sink)
    assert_within(result.output, np.full(p.q.shape, count / total), gamma(2 * count + 12))
    bound = gamma(count + 12) * (1.0 + abs(math.log(total)) + abs(sink))
    assert_within(result.logsumexp, np.full(p.shape[:3], math.log(total)), bound)


@pytest.mark.parametrize(
    ("mask", "used"),
    [
        (Causal(), lambda i: range(i + 1)),
        (Causal() & SlidingWindow(1), lambda i: range(i, i + 1)),
        (Causal() & SlidingWindow(4), lambda i: range(i - 3, i + 1)),
        (Causal() & SlidingWindow(5), lambda i: range(i - 4, i + 1)),
        (Causal() & Chunked(4), lambda i: range(i - i % 4, i + 1)),
        (Everything(), lambda i: range(2**20)),
    ],
    ids=["causal", "window-1", "window-4", "window-5", "chunk-4", "everything"],
)
@pytest.mark.parametrize("start", [0, 3, 16383, 20001])
def test_a_ramp_of_powers_of_2_shows_which_keys_were_used(
    mask: Mask, used: Callable[[int], range], start: int
) -> None:
    p = problem(0, batch=1, kv_heads=1, group=1, q_len=12, kv_len=12, head_dim=1)
    ramp = np.exp2(np.arange(12.0))[None, None, :, None]
    positions = np.arange(start, start + 12)
    output = run(
        Problem(0.0 * p.q, p.k, ramp), mask, q_positions=positions, kv_positions=positions
    ).output
    for i, position in enumerate(positions.tolist()):
        keys = [j for j in range(12) if start + j in used(position)]
        sum_of_ramp = sum(2**j for j in keys)  # a wrong set of keys is off by at least 1
        error = abs(output[0, 0, i, 0] * len(keys) - sum_of_ramp)
        assert error <= gamma(2 * len(keys) + 4) * sum_of_ramp


def test_one_visible_key_returns_its_value_bit_for_bit() -> None:
    p = problem(5, q_len=6, kv_len=6, size=30.0)
    output = run(p, Causal() & SlidingWindow(1)).output
    assert identical(output, p.v.repeat(2, axis=1))


@sampled
@given(seed=st.integers(0, 2**32), shift=st.integers(-700, 700), with_sinks=st.booleans())
def test_a2_shifting_every_score_and_sink_of_a_row_changes_no_bit(
    seed: int, shift: int, with_sinks: bool
) -> None:
    q, k = small_integers(seed, 2, 4, 3, 2), small_integers(seed + 1, 2, 2, 5, 2)
    v, sinks = normal(seed + 2, 2, 2, 5, 4), small_integers(seed + 3, 4)
    shifted = np.full((2, 4, 3, 1), float(shift))
    plain = attend(
        np.concatenate([q, np.zeros_like(shifted)], axis=-1),
        np.concatenate([k, np.ones((2, 2, 5, 1))], axis=-1),
        v,
        q_positions=np.arange(2, 5),
        kv_positions=np.arange(5),
        mask=Causal(),
        softmax_scale=1.0,
        sinks=sinks if with_sinks else None,
    )
    moved = attend(
        np.concatenate([q, shifted], axis=-1),
        np.concatenate([k, np.ones((2, 2, 5, 1))], axis=-1),
        v,
        q_positions=np.arange(2, 5),
        kv_positions=np.arange(5),
        mask=Causal(),
        softmax_scale=1.0,
        sinks=sinks + shift if with_sinks else None,
    )
    assert identical(moved.output, plain.output)
    bound = 4.0 * U * (np.abs(plain.logsumexp) + abs(shift))
    assert_within(moved.logsumexp, plain.logsumexp + shift, bound)


# A2: log-sum-exp and the range of exp


@sampled
@given(p=problems(), size=st.sampled_from([1.0, 30.0, 1e4]))
def test_a2_logsumexp_is_that_of_scipy_at_any_size(p: Problem, size: float) -> None:
    big = Problem(size * p.q, p.k, p.v)
    scores = p.scale * big.q @ p.k.repeat(p.shape[1] // p.k.shape[1], axis=1).swapaxes(-1, -2)
    result = run(big, Everything())
    bound = attend_bound(big.q, p.k, p.v, np.ones(p.shape, dtype=np.bool_), scale=p.scale)
    assert_within(result.logsumexp, scipy_logsumexp(scores, axis=-1), bound.logsumexp)


@sampled
@given(p=problems(), size=st.sampled_from([1.0, 30.0, 1e4]))
def test_a2_a4_a_sink_enters_logsumexp_as_one_more_score(p: Problem, size: float) -> None:
    big, sinks = Problem(size * p.q, p.k, p.v), normal(1, p.shape[1], size=size)
    scores = p.scale * big.q @ p.k.repeat(p.shape[1] // p.k.shape[1], axis=1).swapaxes(-1, -2)
    column = np.broadcast_to(sinks[:, None, None], (*p.shape[:3], 1))
    expected = scipy_logsumexp(np.concatenate([scores, column], axis=-1), axis=-1)
    visible = np.ones(p.shape, dtype=np.bool_)
    bound = attend_bound(big.q, p.k, p.v, visible, scale=p.scale, sinks=sinks)
    assert_within(run(big, Everything(), sinks=sinks).logsumexp, expected, bound.logsumexp)


@pytest.mark.parametrize("score", [-1e300, -1e4, -745.0, 709.0, 710.0, 1e4, 1e300])
def test_a2_one_score_of_any_size_gives_its_value(score: float) -> None:
    value = normal(0, 1, 1, 1, 4)
    result = attend(
        np.full((1, 1, 1, 1), score),
        np.ones((1, 1, 1, 1)),
        value,
        q_positions=[0],
        kv_positions=[0],
        mask=Causal(),
    )
    assert identical(result.output, value)
    assert result.logsumexp.item() == score


def test_a2_a_sink_of_any_size_takes_or_leaves_everything() -> None:
    p = problem(6)
    heavy = run(p, sinks=np.full(4, 1e300))
    light = run(p, sinks=np.full(4, -1e300))
    assert identical(heavy.output, np.zeros_like(p.q))
    assert (heavy.logsumexp == 1e300).all()
    assert identical(light.output, run(p).output)
    assert identical(light.logsumexp, run(p).logsumexp)


def test_a4_a_sink_of_plus_infinity_is_no_number_and_silent() -> None:
    p = problem(6)
    result = run(p, sinks=np.array([np.inf, 0.0, 0.0, 0.0]))
    assert np.isnan(result.output[:, 0]).all()
    assert np.isfinite(result.output[:, 1:]).all()


def test_a4_a_sink_of_minus_infinity_is_no_sink() -> None:
    p = problem(6)
    assert identical(run(p, sinks=np.full(4, -np.inf)).output, run(p).output)


def test_a4_each_query_head_has_its_own_sink() -> None:
    p = problem(6)
    sinks = np.array([-np.inf, 1e300, -np.inf, 1e300])
    output, without = run(p, sinks=sinks).output, run(p).output
    assert identical(output[:, ::2], without[:, ::2])
    assert not output[:, 1::2].any()


# A3: soft cap


@pytest.mark.parametrize("softcap", [2.0**30, 2.0**40])
def test_a3_a_wide_cap_is_no_cap(softcap: float) -> None:
    p = problem(8)
    bound = attend_bound(p.q, p.k, p.v, pairs_seen("causal", p), scale=p.scale).output
    largest = np.abs(p.scale * p.q @ p.k.repeat(2, axis=1).swapaxes(-1, -2)).max()
    moved = largest**3 / (3.0 * softcap**2)  # |c tanh(x / c) - x| <= |x|^3 / (3 c^2)
    limit = bound + math.expm1(2.0 * moved) * np.abs(p.v).max()
    assert_within(run(p, softcap=softcap).output, run(p).output, limit)


@pytest.mark.parametrize("softcap", [2.0**-30, 2.0**-45])
def test_a3_a_narrow_cap_makes_the_scores_uniform(softcap: float) -> None:
    p = problem(8)
    uniform = run(Problem(0.0 * p.q, p.k, p.v)).output
    limit = (math.expm1(2.0 * softcap) + gamma(20)) * np.abs(p.v).max()
    assert_within(run(p, softcap=softcap).output, uniform, limit)


def test_a3_capped_scores_stay_within_the_cap_and_keep_their_sign() -> None:
    p = problem(8, size=30.0)
    capture = Capture()
    run(p, softcap=5.0, observe=capture)
    scores, capped = capture.values["scores"], capture.values["softcap"]
    assert (np.abs(capped) <= 5.0).all()
    assert (np.sign(capped) == np.sign(scores)).all()
    assert (np.abs(capped) <= np.abs(scores) * (1.0 + 4.0 * U)).all()


def test_a3_the_cap_acts_on_scaled_scores() -> None:
    p = problem(8, size=3.0)
    halved = run(Problem(0.5 * p.q, p.k, p.v), softmax_scale=1.0, softcap=2.0)
    assert identical(halved.output, run(p, softmax_scale=0.5, softcap=2.0).output)
    assert not identical(halved.output, run(p, softmax_scale=1.0, softcap=2.0).output)


def test_a3_the_cap_does_not_lift_a_masked_score() -> None:
    p = problem(8)
    output = run(p, Causal() & SlidingWindow(1), softcap=0.5).output
    assert identical(output, p.v.repeat(2, axis=1))


# A5: rows that see no key


@pytest.mark.parametrize("sinks", [None, [-2.0, 0.0, 0.25, 800.0]], ids=["no-sink", "sink"])
@pytest.mark.parametrize("reason", ["mask", "padded-query", "empty-slots", "no-keys"])
def test_a5_a_row_that_sees_no_key_is_zeros(sinks: list[float] | None, reason: str) -> None:
    p = problem(9, q_len=3, kv_len=0 if reason == "no-keys" else 5)
    row = np.array([True, False, True])[:, None] & np.ones(p.shape[3], dtype=np.bool_)
    changes: dict[str, dict[str, Any]] = {
        "mask": {"mask": Explicit(row)},
        "padded-query": {"mask": Everything(), "q_positions": [4, -1, 4]},
        "empty-slots": {"mask": Everything(), "kv_positions": np.full(5, -1)},
        "no-keys": {"mask": Everything()},
    }
    result = run(p, sinks=sinks, **changes[reason])
    zeros = result.output[:, :, 1]
    assert identical(zeros, np.zeros_like(zeros))
    expected = [-math.inf] * 4 if sinks is None else sinks
    assert result.logsumexp[:, :, 1].tolist() == [expected] * 2


# A6: masked keys


POISONS = [math.nan, math.inf, -math.inf, 1e308, -1e308]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a6_what_a_masked_key_holds_changes_no_bit(
    poison: float, where: str, softcap: float | None
) -> None:
    p = problem(10, q_len=4, kv_len=8)
    slots = np.array([3, -1, 0, 1, -1, 7, 2, -1])  # empty slots, and one key in the future
    hidden = (slots < 0) | (slots == 7)
    k, v = p.k.copy(), p.v.copy()
    if where != "v":
        k[:, :, hidden] = poison
    if where != "k":
        v[:, :, hidden] = poison
    sinks = normal(1, 4)
    clean = run(p, kv_positions=slots, sinks=sinks, softcap=softcap)
    dirty = run(Problem(p.q, k, v), kv_positions=slots, sinks=sinks, softcap=softcap)
    assert identical(dirty.output, clean.output)
    assert identical(dirty.logsumexp, clean.logsumexp)


@sampled
@given(data=st.data(), p=problems())
def test_a6_poison_in_values_reaches_exactly_the_rows_that_see_it(
    data: st.DataObject, p: Problem
) -> None:
    visible = data.draw(visibilities(p))
    key = data.draw(st.integers(0, p.shape[3] - 1))
    head = data.draw(st.integers(0, p.k.shape[1] - 1))
    v = p.v.copy()
    v[0, head, key, 0] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    clean, dirty = (run(Problem(p.q, p.k, x), Explicit(visible)).output for x in (p.v, v))
    reads = np.zeros(p.q.shape, dtype=np.bool_)
    group = p.shape[1] // p.k.shape[1]
    reads[0, head * group : (head + 1) * group, :, 0] = visible[
        0, head * group : (head + 1) * group, :, key
    ]
    assert identical(dirty[~reads], clean[~reads])
    if math.isnan(v[0, head, key, 0]):
        assert np.isnan(dirty[reads]).all()
    else:
        assert (dirty[reads] == v[0, head, key, 0]).all()


@pytest.mark.parametrize("key", [0, 2, 4])
def test_a6_a_causal_nan_value_poisons_the_rows_from_its_key_on(key: int) -> None:
    p = problem(10)
    v = p.v.copy()
    v[:, :, key] = math.nan
    clean, dirty = run(p).output, run(Problem(p.q, p.k, v)).output
    assert identical(dirty[:, :, :key], clean[:, :, :key])
    assert np.isnan(dirty[:, :, key:]).all()


@pytest.mark.parametrize("key", [0, 2, 4])
def test_a6_a_causal_nan_key_leaves_the_rows_before_it_alone(key: int) -> None:
    p = problem(10)
    k = p.k.copy()
    k[:, :, key] = math.nan
    clean, dirty = run(p), run(Problem(p.q, k, p.v))
    assert identical(dirty.output[:, :, :key], clean.output[:, :, :key])
    assert identical(dirty.logsumexp[:, :, :key], clean.logsumexp[:, :, :key])
    assert np.isnan(dirty.logsumexp[:, :, key:]).all()


def test_a6_a_causal_nan_key_poisons_the_rows_from_its_key_on() -> None:
    p = problem(10)
    k = p.k.copy()
    k[:, :, 2] = math.nan
    assert np.isnan(run(Problem(p.q, k, p.v)).output[:, :, 2:]).all()


@pytest.mark.parametrize("where", ["q", "sinks"])
def test_a_nan_that_a_row_reads_never_becomes_zeros(where: str) -> None:
    p = problem(10)
    q, sinks = p.q.copy(), np.zeros(4)
    if where == "q":
        q[:] = math.nan
    else:
        sinks[:] = math.nan
    assert np.isnan(run(Problem(q, p.k, p.v), sinks=sinks).output).all()


# Positions: decode, padding, cache slots out of order


@sampled
@given(
    seed=st.integers(0, 2**32),
    start=st.sampled_from([0, 1, 5, 16384]),
    name=st.sampled_from(sorted(MASKS)),
)
def test_queries_and_keys_of_different_length_meet_by_position(
    seed: int, start: int, name: str
) -> None:
    p = problem(seed, q_len=3, kv_len=8)
    kv_positions = np.arange(start, start + 8)
    whole = problem(seed, q_len=8, kv_len=8)
    long = Problem(np.concatenate([whole.q[:, :, :5], p.q], axis=2), p.k, p.v)
    rows = run(long, MASKS[name], q_positions=kv_positions, kv_positions=kv_positions)
    last = run(p, MASKS[name], q_positions=kv_positions[5:], kv_positions=kv_positions)
    visible = seen(MASKS[name], kv_positions[5:], kv_positions, p.shape)
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale)
    assert_within(last.output, rows.output[:, :, 5:], bound.output)
    assert_within(last.logsumexp, rows.logsumexp[:, :, 5:], bound.logsumexp)


@sampled
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    left=st.booleans(),
    name=st.sampled_from(sorted(MASKS)),
)
def test_a_padded_batch_of_unequal_lengths_equals_its_rows_alone(
    seed: int, lengths: list[int], left: bool, name: str
) -> None:
    longest = max(lengths)
    p = problem(seed, batch=len(lengths), q_len=longest, kv_len=longest)
    positions = np.full((len(lengths), longest), -1)
    for row, length in zip(positions, lengths, strict=True):
        row[longest - length if left else 0 :][:length] = np.arange(length)
    batched = run(p, MASKS[name], q_positions=positions, kv_positions=positions).output
    for b, length in enumerate(lengths):
        at = np.flatnonzero(positions[b] >= 0)
        alone = Problem(
            p.q[b : b + 1][:, :, at], p.k[b : b + 1][:, :, at], p.v[b : b + 1][:, :, at]
        )
        visible = seen(MASKS[name], np.arange(length), np.arange(length), alone.shape)
        bound = attend_bound(alone.q, alone.k, alone.v, visible, scale=p.scale)
        assert_within(batched[b : b + 1][:, :, at], run(alone, MASKS[name]).output, bound.output)
        assert not batched[b][:, positions[b] < 0].any()


@sampled
@given(
    seed=st.integers(0, 2**32), order=st.permutations(range(7)), name=st.sampled_from(sorted(MASKS))
)
def test_the_order_of_cache_slots_does_not_matter(seed: int, order: list[int], name: str) -> None:
    p = problem(seed, q_len=7, kv_len=7)
    permuted = Problem(p.q, p.k[:, :, order], p.v[:, :, order])
    bound = attend_bound(p.q, p.k, p.v, pairs_seen(name, p), scale=p.scale)
    got, want = run(permuted, MASKS[name], kv_positions=np.array(order)), run(p, MASKS[name])
    assert_within(got.output, want.output, bound.output)
    assert_within(got.logsumexp, want.logsumexp, bound.logsumexp)


@sampled
@given(data=st.data(), p=problems())
def test_batch_rows_and_kv_groups_do_not_mix(data: st.DataObject, p: Problem) -> None:
    visible = data.draw(visibilities(p))
    rows = data.draw(st.permutations(range(p.shape[0])))
    groups = data.draw(st.permutations(range(p.k.shape[1])))
    size = p.shape[1] // p.k.shape[1]
    heads = [group * size + member for group in groups for member in range(size)]
    moved = Problem(p.q[rows][:, heads], p.k[rows][:, groups], p.v[rows][:, groups])
    got = run(moved, Explicit(visible[rows][:, heads])).output
    want = run(p, Explicit(visible)).output[rows][:, heads]
    bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale).output[rows][:, heads]
    assert_within(got, want, bound)


# Algebra


@sampled
@given(data=st.data(), p=problems(), a=st.integers(-3, 3), b=st.integers(-3, 3))
def test_output_is_linear_in_the_values(data: st.DataObject, p: Problem, a: int, b: int) -> None:
    visible = data.draw(visibilities(p))
    one, two = small_integers(1, *p.v.shape), small_integers(2, *p.v.shape)
    sinks = normal(3, p.shape[1])

    def output(v: Array) -> Array:
        return run(Problem(p.q, p.k, v), Explicit(visible), sinks=sinks).output

    together = abs(a) * np.abs(one) + abs(b) * np.abs(two)
    bound = 2.0 * attend_bound(p.q, p.k, together, visible, scale=p.scale, sinks=sinks).output
    assert_within(output(a * one + b * two), a * output(one) + b * output(two), bound)


@sampled
@given(data=st.data(), p=problems(), with_sinks=st.booleans())
def test_parts_of_the_keys_merge_through_logsumexp_at_any_cut(
    data: st.DataObject, p: Problem, with_sinks: bool
) -> None:
    visible = data.draw(visibilities(p))
    cut = data.draw(st.integers(0, p.shape[3]))
    sinks = normal(3, p.shape[1]) if with_sinks else None
    whole = run(p, Explicit(visible), sinks=sinks)
    merged, limit = np.zeros_like(whole.output), np.zeros_like(whole.output)
    total = np.full(p.shape[:3], -np.inf)
    whole_bound = attend_bound(p.q, p.k, p.v, visible, scale=p.scale, sinks=sinks)
    for keys, part_sinks in ((slice(0, cut), sinks), (slice(cut, None), None)):
        part = Problem(p.q, p.k[:, :, keys], p.v[:, :, keys])
        seen_here = visible[..., keys]
        result = run(part, Explicit(seen_here) if seen_here.shape[-1] else None, sinks=part_sinks)
        bound = attend_bound(part.q, part.k, part.v, seen_here, scale=p.scale, sinks=part_sinks)
        empty = np.isneginf(whole.logsumexp)
        difference = np.where(
            empty, -np.inf, result.logsumexp - np.where(empty, 0.0, whole.logsumexp)
        )
        share = np.exp(difference)[..., None]
        merged += share * result.output
        slack = bound.logsumexp + whole_bound.logsumexp + gamma(8)
        limit += share * (bound.output + np.expm1(slack)[..., None] * np.abs(result.output))
        total = np.logaddexp(total, result.logsumexp)
    assert_within(merged, whole.output, limit + whole_bound.output)
    finite = np.isfinite(whole.logsumexp)
    assert (np.isfinite(total) == finite).all()
    assert_within(total[finite], whole.logsumexp[finite], 3.0 * whole_bound.logsumexp[finite])


# Inputs


def test_the_default_scale_is_the_root_of_head_dim() -> None:
    p = problem(0, head_dim=16)
    assert identical(run(p).output, run(p, softmax_scale=0.25).output)


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float16,
        np.int8,
        np.uint8,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_inputs_of_any_real_dtype_are_widened_without_change(dtype: Any) -> None:
    drawn = [np.abs(small_integers(seed, 1, 2, 3, 4)) for seed in range(3)]
    narrow = Problem(*(x.astype(dtype) for x in drawn))
    wide = run(Problem(*drawn))
    assert run(narrow).output.dtype == np.float64
    assert identical(run(narrow).output, wide.output)


def test_inputs_may_be_views_and_are_not_changed() -> None:
    p = problem(1, q_len=4, kv_len=4)
    views = Problem(
        *(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)[..., ::-1] for x in (p.q, p.k, p.v))
    )
    before = [x.copy() for x in (views.q, views.k, views.v)]
    copies = Problem(*before)
    visible = pairs_seen("causal", p)
    bound = attend_bound(copies.q, copies.k, copies.v, visible, scale=p.scale)
    assert_within(run(views).output, run(copies).output, bound.output)
    assert all(map(identical, (views.q, views.k, views.v), before))


def test_values_may_have_another_width_than_queries_and_keys() -> None:
    p = problem(1)
    wide = np.concatenate([p.v, normal(9, 2, 2, 5, 3)], axis=-1)
    result = run(Problem(p.q, p.k, wide))
    assert result.output.shape == (2, 4, 5, 7)
    assert result.logsumexp.shape == (2, 4, 5)
    visible = pairs_seen("causal", p)
    expected, _ = attend_by_hand(p.q, p.k, wide, visible, scale=p.scale)
    bound = attend_bound(p.q, p.k, wide, visible, scale=p.scale)
    assert_within(result.output, expected, bound.output)


@pytest.mark.parametrize("rows", [1, 2, None], ids=["one-row", "row-each", "flat"])
def test_positions_of_one_row_serve_the_batch(rows: int | None) -> None:
    p = problem(1)
    positions = np.arange(5) if rows is None else np.tile(np.arange(5), (rows, 1))
    got = run(p, q_positions=positions, kv_positions=positions)
    assert identical(got.output, run(p).output)


def arguments(**changes: Any) -> dict[str, Any]:
    p = problem(0, batch=2, kv_heads=2, group=2, q_len=3, kv_len=5, head_dim=4)
    defaults = {
        "q": p.q,
        "k": p.k,
        "v": p.v,
        "q_positions": np.arange(3),
        "kv_positions": np.arange(5),
        "mask": Everything(),
    }
    return defaults | changes


BROKEN: dict[str, Any] = {
    "q-axes": (
        ShapeError,
        {"q": np.ones((4, 3, 4))},
        "q must have shape (any, any, any, any), BHSD, got (4, 3, 4)",
    ),
    "q-complex": (
        ShapeError,
        {"q": np.ones((2, 4, 3, 4), dtype=complex)},
        "q must hold real numbers, got dtype complex128; convert it to float64 first",
    ),
    "q-bool": (
        ShapeError,
        {"q": np.ones((2, 4, 3, 4), dtype=bool)},
        "q must hold real numbers, got dtype bool",
    ),
    "q-object": (
        ShapeError,
        {"q": np.ones((2, 4, 3, 4), dtype=object)},
        "q must hold real numbers, got dtype object",
    ),
    "k-batch": (
        ShapeError,
        {"k": np.ones((3, 2, 5, 4))},
        "k must have shape (2, any, any, 4), BHSD, got (3, 2, 5, 4)",
    ),
    "k-width": (
        ShapeError,
        {"k": np.ones((2, 2, 5, 3))},
        "k must have shape (2, any, any, 4), BHSD, got (2, 2, 5, 3)",
    ),
    "v-heads": (
        ShapeError,
        {"v": np.ones((2, 1, 5, 4))},
        "v must have shape (2, 2, 5, any), BHSD, got (2, 1, 5, 4)",
    ),
    "v-length": (
        ShapeError,
        {"v": np.ones((2, 2, 6, 4))},
        "v must have shape (2, 2, 5, any), BHSD, got (2, 2, 6, 4)",
    ),
    "heads-do-not-divide": (
        ConfigError,
        {"k": np.ones((2, 3, 5, 4)), "v": np.ones((2, 3, 5, 4))},
        "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3; "
        "is the layout BHSD?",
    ),
    "no-kv-heads": (
        ConfigError,
        {"k": np.ones((2, 0, 5, 4)), "v": np.ones((2, 0, 5, 4))},
        "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 0",
    ),
    "bshd": (
        ConfigError,
        {"k": np.ones((2, 5, 2, 4)), "v": np.ones((2, 5, 2, 4)), "kv_positions": np.arange(2)},
        "got 4 and 5; is the layout BHSD?",
    ),
    "head-dim-0": (
        ShapeError,
        {"q": np.ones((2, 4, 3, 0)), "k": np.ones((2, 2, 5, 0))},
        "q must have a head_dim of at least 1, got shape (2, 4, 3, 0)",
    ),
    "q-positions-floats": (
        ShapeError,
        {"q_positions": np.arange(3.0)},
        "q_positions must hold integers, got dtype float64",
    ),
    "q-positions-length": (
        ShapeError,
        {"q_positions": np.arange(4)},
        "q_positions must have shape (2, 3), (batch, length), got (4,)",
    ),
    "kv-positions-batch": (
        ShapeError,
        {"kv_positions": np.zeros((3, 5), dtype=int)},
        "kv_positions must have shape (2, 5), (batch, length), got (3, 5)",
    ),
    "kv-positions-axes": (
        ShapeError,
        {"kv_positions": np.zeros((1, 1, 5), dtype=int)},
        "kv_positions must have shape (2, 5), (batch, length), got (1, 1, 5)",
    ),
    "kv-positions-below": (
        ShapeError,
        {"kv_positions": np.arange(5) - 2},
        "kv_positions must lie between -1 (an empty slot) and 2**31 - 1, got -2 to",
    ),
    "sinks-per-kv-head": (
        ShapeError,
        {"sinks": np.zeros(2)},
        "sinks must have shape (4), (num_attention_heads,), got (2,)",
    ),
    "mask-shape": (
        ShapeError,
        {"mask": Explicit(np.ones((2, 5, 3), dtype=bool))},
        "allowed must broadcast to (batch, heads, q_len, kv_len) with batch, q_len, kv_len = "
        "(2, 3, 5), got shape (2, 5, 3)",
    ),
} | {
    f"{name}-{value}": (ConfigError, {name: value}, f"{message}, got {value}")
    for name, message in (
        ("softmax_scale", "softmax_scale must be a positive factor on q·k"),
        ("softcap", "softcap must be positive"),
    )
    for value in (0.0, -1.0, math.nan)
}


@pytest.mark.parametrize("case", BROKEN)
def test_attend_names_the_argument_the_rule_and_the_value(case: str) -> None:
    error, changes, message = BROKEN[case]
    with pytest.raises(error, match=re.escape(message)):
        attend(**arguments(**changes))
