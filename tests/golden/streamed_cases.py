"""Cases that compare streamed attention with its definition, over masks, positions and features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from layers import Bounds, Problem, assert_within, attend_bound, normal, problem, seen

from golden import Attended, Causal, Chunked, Everything, Explicit, Mask, SlidingWindow, attend
from golden.blockwise import attend_blockwise
from golden.segments import SameSegment


@dataclass(frozen=True)
class Case:
    """Arguments of `attend`, and the tiles of `attend_blockwise`."""

    p: Problem
    arguments: dict[str, Any]
    tiles: dict[str, Any] = field(default_factory=dict)

    def dense(self) -> Attended:
        """Return what the definition says."""
        return attend(self.p.q, self.p.k, self.p.v, **self.arguments)

    def streamed(self, **changes: Any) -> Attended:
        """Return what the streamed form says."""
        return attend_blockwise(
            self.p.q, self.p.k, self.p.v, **(self.arguments | self.tiles | changes)
        )

    def check(self, got: Attended) -> None:
        """Assert that a result lies within bound B1 of the definition."""
        want, bound = self.dense(), self.bound()
        assert_within(got.output, want.output, bound.output)
        assert_within(got.logsumexp, want.logsumexp, bound.logsumexp)

    def bound(self) -> Bounds:
        """Return bound B1."""
        a = self.arguments
        return attend_bound(
            self.p.q,
            self.p.k,
            self.p.v,
            seen(a["mask"], a["q_positions"], a["kv_positions"], self.p.shape),
            scale=self.p.scale,
            softcap=a.get("softcap"),
            sinks=a.get("sinks"),
        )


@st.composite
def masks(draw: st.DrawFn, p: Problem, depth: int = 2) -> Mask:
    """Draw a mask of any kind, or two joined by `&` or `|`."""
    batch, heads, q_len, kv_len = p.shape
    kind = draw(
        st.sampled_from(["causal", "window", "chunk", "segments", "all", "array", "and", "or"])
    )
    if kind in ("and", "or") and depth:
        left, right = draw(masks(p, depth - 1)), draw(masks(p, depth - 1))
        return left & right if kind == "and" else left | right
    if kind == "window":
        return SlidingWindow(draw(st.integers(1, 12)))
    if kind == "chunk":
        return Chunked(draw(st.integers(1, 12)))
    if kind == "segments":
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        return SameSegment(*(np.sort(rng.integers(-1, 4, (batch, n))) for n in (q_len, kv_len)))
    if kind == "array":
        shape = draw(
            st.sampled_from(
                [
                    (kv_len,),
                    (q_len, kv_len),
                    (batch, q_len, kv_len),
                    (batch, heads, q_len, kv_len),
                    (1, heads, 1, kv_len),
                    (batch, 1, q_len, 1),
                ]
            )
        )
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        coarse = rng.random(shape) < draw(st.sampled_from([0.2, 0.7, 1.0]))
        return Explicit(np.sort(coarse, axis=-1) if draw(st.booleans()) else coarse)
    return Everything() if kind == "all" else Causal()


@st.composite
def positions(draw: st.DrawFn, batch: int, length: int, start: int) -> Any:
    """Draw positions in order or not, some slots empty, from 0 or from `start` on."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.tile(np.arange(length), (batch, 1)) + draw(st.sampled_from([0, start]))
    if draw(st.booleans()):
        rows = rng.permuted(rows, axis=1)
    if draw(st.booleans()):
        rows = np.where(rng.random(rows.shape) < 0.3, -1, rows)
    return rows


@st.composite
def streamed_cases(draw: st.DrawFn) -> Case:
    """Draw small cases of every feature, with tiles from a single score to everything."""
    q_len, kv_len = draw(st.integers(1, 24)), draw(st.integers(0, 24))
    group = draw(st.sampled_from([1, 2, 3]))
    size = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    p = problem(
        draw(st.integers(0, 2**32)),
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=group,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(st.integers(1, 5)),
        size=size,
    )
    arguments: dict[str, Any] = {
        "q_positions": draw(positions(p.shape[0], q_len, max(0, kv_len - q_len))),
        "kv_positions": draw(positions(p.shape[0], kv_len, 0)),
        "mask": draw(masks(p)),
        "softcap": draw(st.sampled_from([None, None, 0.5, 100.0])),
        "sinks": draw(st.sampled_from([None, 1.0, 300.0])),
    }
    if arguments["sinks"] is not None:
        arguments["sinks"] = normal(7, p.shape[1], size=arguments["sinks"])
    tiles = {
        "q_tile": draw(st.sampled_from([None, 1, 3, 4, 8])),
        "kv_tile": draw(st.sampled_from([1, 3, 8, 512])),
        "threads": draw(st.sampled_from([1, 1, 2])),
    }
    return Case(p, arguments, tiles)
