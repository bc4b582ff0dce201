from __future__ import annotations

import itertools
import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from layers import Problem, U, assert_within, gamma, identical, normal, problem
from streamed_cases import Case, streamed_cases
from threadpoolctl import threadpool_info

import golden.blockwise_plan
import golden.blockwise_tile
from golden import (
    Attended,
    Causal,
    Chunked,
    ConfigError,
    Explicit,
    Mask,
    ShapeError,
    SlidingWindow,
)
from golden.blockwise import attend_blockwise, streamed_problem
from golden.blockwise_pool import one_blas_thread
from golden.blockwise_sums import RowSums
from golden.tiles import Cells, Coverage

thoroughly = settings(
    deadline=None,
    max_examples=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def same_bits(left: Attended, right: Attended) -> bool:
    return identical(left.output, right.output) and identical(left.logsumexp, right.logsumexp)


# Streamed and dense


@thoroughly
@given(case=streamed_cases())
def test_b1_streamed_is_dense_for_any_mask_positions_features_and_tiles(case: Case) -> None:
    case.check(case.streamed())


def causal(mask: Mask | None = None, **changes: Any) -> Case:
    """Return a causal case of several tiles, with scores that move no shift."""
    p = problem(3, batch=1, q_len=40, kv_len=40, head_dim=8)
    arguments: dict[str, Any] = {
        "q_positions": np.arange(40),
        "kv_positions": np.arange(40),
        "mask": Causal() if mask is None else mask,
    }
    return Case(p, arguments | changes, {"q_tile": 8, "kv_tile": 8})


def steep() -> Case:
    """Return a case whose largest score grows by hundreds from tile to tile."""
    p = problem(3, batch=1, q_len=40, kv_len=40, head_dim=8)
    rising = p.k + np.arange(40)[:, None] * 30.0
    case = causal()
    return Case(Problem(np.abs(p.q), rising, p.v), case.arguments, case.tiles)


def deep() -> Case:
    """Return a case whose scores all lie far below 0."""
    case = steep()
    return Case(Problem(-case.p.q, case.p.k + 200.0, case.p.v), case.arguments, case.tiles)


BLOCKED = np.kron(np.random.default_rng(5).random((5, 5)) < 0.5, np.ones((8, 8))).astype(np.bool_)

CASES: dict[str, Case] = {
    "causal": causal(),
    "window": causal(Causal() & SlidingWindow(9)),
    "window-of-a-tile": causal(Causal() & SlidingWindow(8)),
    "window-one-more": causal(Causal() & SlidingWindow(16)),
    "chunk": causal(Causal() & Chunked(7)),
    "chunk-of-a-tile": causal(Chunked(8)),
    "array": causal(Explicit(BLOCKED)),
    "array-by-head": causal(Explicit(np.stack([BLOCKED, BLOCKED.T, ~BLOCKED, BLOCKED])[None])),
    "either": causal(Chunked(16) | SlidingWindow(3) & Causal()),
    "empty-slots": causal(kv_positions=np.where(np.arange(40) % 5 == 0, -1, np.arange(40))),
    "padded": causal(q_positions=np.arange(40) - 1, kv_positions=np.arange(40) - 1),
    "sinks": causal(sinks=normal(1, 4)),
    "capped": causal(softcap=0.5),
    "steep": steep(),
    "deep": deep(),
}


TILES = [(8, 8), (2, 8), (3, 5), (1, 1), (40, 40)]


@pytest.mark.parametrize(("q_tile", "kv_tile"), TILES)
@pytest.mark.parametrize("name", CASES)
def test_b1_streamed_is_dense_over_many_tiles(name: str, q_tile: int, kv_tile: int) -> None:
    CASES[name].check(CASES[name].streamed(q_tile=q_tile, kv_tile=kv_tile))


def late_diagonal(self: Causal, queries: Cells, keys: Cells) -> Coverage:
    right = RIGHT[Causal](self, queries, keys)
    last = keys.highest[:, None, None, :] <= queries.lowest[:, None, :, None] + 1
    return Coverage(right.some, last)


def early_diagonal(self: Causal, queries: Cells, keys: Cells) -> Coverage:
    right = RIGHT[Causal](self, queries, keys)
    return Coverage(keys.lowest[:, None, None, :] < queries.lowest[:, None, :, None], right.every)


def wide_window(self: SlidingWindow, queries: Cells, keys: Cells) -> Coverage:
    right = RIGHT[SlidingWindow](self, queries, keys)
    return Coverage(
        right.some, RIGHT[SlidingWindow](SlidingWindow(self.window + 1), queries, keys).every
    )


def narrow_window(self: SlidingWindow, queries: Cells, keys: Cells) -> Coverage:
    fewer = SlidingWindow(max(1, self.window - 1))
    return Coverage(
        RIGHT[SlidingWindow](fewer, queries, keys).some,
        RIGHT[SlidingWindow](self, queries, keys).every,
    )


def chunk_of_first_keys(self: Chunked, queries: Cells, keys: Cells) -> Coverage:
    one = (
        keys.lowest[:, None, None, :] // self.size == queries.lowest[:, None, :, None] // self.size
    )
    return Coverage(one, RIGHT[Chunked](self, queries, keys).every)


def chunk_of_last_keys(self: Chunked, queries: Cells, keys: Cells) -> Coverage:
    one = (
        keys.lowest[:, None, None, :] // self.size == queries.lowest[:, None, :, None] // self.size
    )
    return Coverage(RIGHT[Chunked](self, queries, keys).some, one)


def any_is_every(self: Explicit, queries: Cells, keys: Cells) -> Coverage:
    right = RIGHT[Explicit](self, queries, keys)
    return Coverage(right.some, right.some)


def every_slot_is_occupied(queries: Cells, keys: Cells) -> Coverage:
    ones = np.ones((1, 1, len(queries.edges) - 1, len(keys.edges) - 1), dtype=np.bool_)
    return Coverage(ones, ones)


def forgotten_rescaling(self: RowSums, top: Any) -> None:
    self.shift[:] = np.maximum(self.shift, np.where(top > -np.inf, top, 0.0))


RIGHT: dict[type[Mask], Any] = {
    kind: kind.coverage for kind in (Causal, SlidingWindow, Chunked, Explicit)
}

PLANTED: dict[str, tuple[Any, str, Any]] = {
    "causal-tile-full-one-key-too-far": (Causal, "coverage", late_diagonal),
    "causal-diagonal-tile-skipped": (Causal, "coverage", early_diagonal),
    "window-tile-full-one-key-too-far": (SlidingWindow, "coverage", wide_window),
    "window-tile-skipped-one-key-too-early": (SlidingWindow, "coverage", narrow_window),
    "chunk-tile-skipped": (Chunked, "coverage", chunk_of_first_keys),
    "chunk-tile-full": (Chunked, "coverage", chunk_of_last_keys),
    "array-tile-full": (Explicit, "coverage", any_is_every),
    "empty-slots-in-full-tiles": (
        golden.blockwise_plan,
        "occupied_coverage",
        every_slot_is_occupied,
    ),
    "sums-not-rescaled": (RowSums, "raise_to", forgotten_rescaling),
    "shift-never-moves": (RowSums, "raise_to", lambda self, top: None),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_comparison_with_dense_sees_a_planted_defect(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, wrong = PLANTED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    failed = []
    for (case_name, case), (q_tile, kv_tile) in itertools.product(CASES.items(), TILES):
        try:
            case.check(case.streamed(q_tile=q_tile, kv_tile=kv_tile))
        except AssertionError:
            failed.append(case_name)
    assert failed, f"no case of {', '.join(CASES)} notices {name}"


# Tiles that are skipped


def scores_computed(mask: Mask, length: int, **tiles: Any) -> int:
    """Return how many scores the plan computes for one head of `length` queries and keys."""
    x = np.zeros((1, 1, length, 1))
    plan = streamed_problem(
        x,
        x,
        x,
        q_positions=np.arange(length),
        kv_positions=np.arange(length),
        mask=mask,
        softmax_scale=None,
        sinks=None,
        softcap=None,
        q_tile=tiles.get("q_tile"),
        kv_tile=tiles.get("kv_tile", 512),
    )
    return sum(
        (run.last_query - run.first_query) * (run.stop - run.start)
        for _, work in plan.works()
        for _, _, runs in work.tiles
        for run in runs
    )


@pytest.mark.parametrize(
    ("mask", "keys_seen"),
    [
        (Causal() & SlidingWindow(1024), 1024),
        (Causal() & SlidingWindow(100), 100),
        (Causal() & Chunked(256), 128),
        (Chunked(512), 512),
        (Causal() & (Chunked(256) | SlidingWindow(64)), 256),
    ],
    ids=str,
)
def test_windows_and_chunks_cost_in_proportion_to_their_size(mask: Mask, keys_seen: int) -> None:
    cell = golden.blockwise_plan.KEY_CELL
    for length in (4096, 8192):
        assert scores_computed(mask, length) <= length * (keys_seen + 2 * cell)


def test_causal_computes_little_beyond_the_lower_half() -> None:
    cell = golden.blockwise_plan.KEY_CELL
    assert scores_computed(Causal(), 4096) == 4096 * (4096 + cell) // 2


def test_full_tiles_do_not_ask_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    visible = Causal.visible

    def counted(self: Causal, q_positions: Any, kv_positions: Any) -> Any:
        asked.append(q_positions.shape[1] * kv_positions.shape[1])
        return visible(self, q_positions, kv_positions)

    monkeypatch.setattr(Causal, "visible", counted)
    x = np.zeros((1, 1, 1024, 1))
    attend_blockwise(
        x, x, x, q_positions=np.arange(1024), kv_positions=np.arange(1024), mask=Causal(), threads=1
    )
    assert 0 < sum(asked) <= 1024 * 256


# Bits that must not move


def many() -> Case:
    return Case(causal().p, causal().arguments | {"sinks": normal(1, 4)}, {"q_tile": 8})


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    assert same_bits(many().streamed(threads=threads), many().streamed(threads=1))


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", ["causal", "array-by-head", "sinks", "deep"])
def test_processes_change_no_bit(name: str, processes: Executor) -> None:
    case = CASES[name]
    assert same_bits(case.streamed(executor=processes), case.streamed(threads=1))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16, np.int8])
def test_narrow_inputs_are_widened_without_change(dtype: Any) -> None:
    case = causal()
    p = Problem(*((8 * x).astype(dtype) for x in (case.p.q, case.p.k, case.p.v)))
    wide = Problem(*(x.astype(np.float64) for x in (p.q, p.k, p.v)))
    got = Case(p, case.arguments, case.tiles).streamed()
    assert same_bits(got, Case(wide, case.arguments, case.tiles).streamed())


@pytest.mark.parametrize("name", ["causal", "sinks", "capped", "padded", "window"])
def test_s2_looking_for_the_largest_score_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CASES[name].streamed()
    monkeypatch.setattr(golden.blockwise_tile, "_within_span", lambda *_: False)
    assert same_bits(CASES[name].streamed(), plain)


POISONS = [math.nan, math.inf, -math.inf, 1e300]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["k", "v", "q"])
@pytest.mark.parametrize("name", ["causal", "array", "array-by-head", "sinks", "capped", "steep"])
def test_a6_what_is_masked_changes_no_bit(name: str, where: str, poison: float) -> None:
    case = CASES[name]
    a = dict(case.arguments)
    hidden = np.arange(40) % 7 == 3
    side = "q_positions" if where == "q" else "kv_positions"
    a[side] = np.where(hidden, -1, a[side])
    arrays = {"q": case.p.q.copy(), "k": case.p.k.copy(), "v": case.p.v.copy()}
    clean = Case(Problem(**arrays), a, case.tiles).streamed()
    arrays[where] = np.where(hidden[:, None], poison, arrays[where])
    dirty = Case(Problem(**arrays), a, case.tiles).streamed()
    assert same_bits(dirty, clean)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["k", "v", "q", "sinks"])
@pytest.mark.parametrize("name", ["causal", "array", "array-by-head", "sinks", "capped", "window"])
def test_a6_what_a_row_reads_reaches_it_as_in_attend(name: str, where: str, poison: float) -> None:
    case = CASES[name]
    a = dict(case.arguments)
    arrays = {"q": case.p.q.copy(), "k": case.p.k.copy(), "v": case.p.v.copy()}
    if where == "sinks":
        a["sinks"] = np.array([0.0, poison, 1.0, 2.0])
    else:
        arrays[where][:, 0, 17, 3] = poison
    dirty = Case(Problem(**arrays), a, case.tiles)
    with np.errstate(all="ignore"):
        got, want = dirty.streamed(), dirty.dense()
        bounds = [(b.output, b.logsumexp) for b in (case.bound(), dirty.bound())]
    # A row that does not read the poison errs as before. One that does may err with its size; where
    # that bound overflows one score decides alone: its weight of 0 or 1 is exact, and the
    # log-sum-exp is one dot product, off by `gamma(d + 16)` of its only large term on either side.
    alone = 2 * gamma(case.p.q.shape[3] + 16)
    for ours, theirs, bound, more in zip(got, want, *bounds, strict=True):
        more = np.where(np.isfinite(more), more, alone * np.abs(theirs))
        limit = np.broadcast_to(np.fmax(bound, more), ours.shape)
        assert (np.isnan(ours) == np.isnan(theirs)).all()
        infinite = np.isinf(theirs)
        assert (ours[infinite] == theirs[infinite]).all()
        finite = np.isfinite(theirs)
        assert_within(ours[finite], theirs[finite], limit[finite])


def test_a5_rows_that_see_nothing_give_zeros_and_the_sink() -> None:
    case = causal(Causal() & Explicit(np.zeros(40, dtype=np.bool_)), sinks=normal(1, 4))
    got = case.streamed()
    assert not got.output.any()
    sinks = case.arguments["sinks"][:, None]
    assert_within(got.logsumexp, np.broadcast_to(sinks, got.logsumexp.shape), 4 * U)
    bare = causal(Causal() & Explicit(np.zeros(40, dtype=np.bool_))).streamed()
    assert not bare.output.any()
    assert np.isneginf(bare.logsumexp).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys_are_no_error(q_len: int, kv_len: int) -> None:
    p = problem(0, q_len=q_len, kv_len=kv_len)
    arguments = {"q_positions": np.arange(q_len), "kv_positions": np.arange(kv_len)}
    case = Case(p, {"mask": Causal(), **arguments})
    assert same_bits(case.streamed(), case.dense())


# Workers


def test_an_error_on_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(golden.blockwise_tile, "capped_scores", broken)
    for threads in (1, 2):
        with pytest.raises(MemoryError, match="no room"):
            causal().streamed(threads=threads)


def test_blas_gets_its_threads_back() -> None:
    def counts() -> list[int]:
        return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]

    before = counts()
    with one_blas_thread():
        with one_blas_thread():
            assert set(counts()) <= {1}
        assert set(counts()) <= {1}
    assert counts() == before
    causal().streamed(threads=2)
    assert counts() == before


# Arguments


BROKEN: dict[str, tuple[type[ValueError], dict[str, Any], str]] = {
    "q-tile": (ConfigError, {"q_tile": 0}, "q_tile must be at least 1, got 0"),
    "kv-tile": (ConfigError, {"kv_tile": -1}, "kv_tile must be at least 1, got -1"),
    "threads": (ConfigError, {"threads": 0}, "threads must be at least 1, got 0"),
    "scale": (ConfigError, {"softmax_scale": 0.0}, "softmax_scale must be a positive factor"),
    "softcap": (ConfigError, {"softcap": -1.0}, "softcap must be positive, got -1.0"),
    "sinks": (ShapeError, {"sinks": np.zeros(3)}, "sinks must have shape (4)"),
    "positions": (ShapeError, {"q_positions": np.arange(3)}, "q_positions must have shape (1, 40)"),
    "mask-too-long": (
        ShapeError,
        {"mask": Explicit(np.ones((41, 40), dtype=np.bool_))},
        "allowed must broadcast to (batch, heads, q_len, kv_len)",
    ),
    "mask-heads": (
        ShapeError,
        {"mask": Explicit(np.ones((1, 3, 40, 40), dtype=np.bool_))},
        "mask must speak of 1 or 4 heads (num_attention_heads), got 3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_attend_blockwise_names_the_argument_the_rule_and_the_value(name: str) -> None:
    error, changes, message = BROKEN[name]
    with pytest.raises(error, match=re.escape(message)):
        causal().streamed(**changes)


def test_a_mask_that_knows_nothing_of_tiles_is_right() -> None:
    class Even(Mask):
        def visible(self, q_positions: Any, kv_positions: Any) -> Any:
            return (q_positions[:, None, :, None] + kv_positions[:, None, None, :]) % 2 == 0

    case = causal(Causal() & Even())
    case.check(case.streamed())


@pytest.mark.filterwarnings("ignore")  # those of distributed itself
def test_a_dask_cluster_of_two_processes_changes_no_bit() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        cluster.get_client() as client,
    ):
        got = many().streamed(executor=client.get_executor(), threads=2)
    assert same_bits(got, many().streamed(threads=1))
