"""Known bugs of masks: windows, chunks, causality and the ends of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

import golden
from conformance.cases import Case
from conformance.defects.problem import Problem, Values
from conformance.defects.record import Defect, changed
from golden import Mask

_TILE = 64


def _masked(build: Callable[[Problem], Mask]) -> Callable[[Problem], Values]:
    """Return a correct kernel with another rule about positions."""

    def change(problem: Problem) -> Problem:
        visible = golden.visible_keys(build(problem), problem.q_positions, problem.kv_positions)
        return replace(problem, visible=np.broadcast_to(visible, problem.visible.shape))

    return changed(change)


def _window_off_by(keys: int) -> Callable[[Problem], Values]:
    def build(problem: Problem) -> Mask:
        window = problem.config.sliding_window or 1
        return golden.Causal() & golden.SlidingWindow(window + keys)

    return _masked(build)


def _without_window(problem: Problem) -> Mask:
    return golden.layer_mask(replace(problem.config, sliding_window=None))


def _chunk_one_late(problem: Problem) -> Problem:
    size = problem.config.attention_chunk_size or 1
    shifted = replace(
        problem,
        q_positions=np.where(problem.q_positions >= 0, problem.q_positions + 1, -1),
        kv_positions=np.where(problem.kv_positions >= 0, problem.kv_positions + 1, -1),
    )
    visible = golden.visible_keys(
        golden.Causal() & golden.Chunked(size), shifted.q_positions, shifted.kv_positions
    )
    return replace(problem, visible=visible)


def _anchored(problem: Problem, offset: int) -> Problem:
    """Let query `i` see keys up to `i + offset`, by index; window and chunk stay as they are."""
    config = problem.config
    queries, keys = np.arange(problem.q.shape[2]), np.arange(problem.kv_len)
    mask: Mask = golden.Explicit(keys[None, :] <= queries[:, None] + offset)
    if config.sliding_window is not None:
        mask = mask & golden.SlidingWindow(config.sliding_window)
    if config.attention_chunk_size is not None:
        mask = mask & golden.Chunked(config.attention_chunk_size)
    visible = golden.visible_keys(mask, problem.q_positions, problem.kv_positions)
    return replace(problem, visible=visible)


def _top_left(problem: Problem) -> Problem:
    return _anchored(problem, 0)


def _bottom_right(problem: Problem) -> Problem:
    return _anchored(problem, problem.kv_len - problem.q.shape[2])


def _appended(problem: Problem, k: Values, v: Values) -> Problem:
    """Let every query see further keys at the end."""
    seen = np.broadcast_to(
        (problem.q_positions >= 0)[:, None, :, None], (*problem.visible.shape[:3], k.shape[2])
    )
    return replace(
        problem,
        k=np.concatenate([problem.k, k], axis=2),
        v=np.concatenate([problem.v, v], axis=2),
        visible=np.concatenate([problem.visible, seen], axis=3),
    )


def _zero_keys_to_tile(problem: Problem) -> Problem:
    missing = -problem.kv_len % _TILE
    shape = (*problem.k.shape[:2], missing, problem.k.shape[3])
    zeros = np.zeros(shape, dtype=problem.k.dtype)
    return _appended(problem, zeros, zeros)


def _stale_keys_to_power_of_two(problem: Problem) -> Problem:
    missing = (1 << (problem.kv_len - 1).bit_length()) - problem.kv_len
    stale = slice(0, missing)
    return _appended(problem, problem.k[:, :, stale], problem.v[:, :, stale])


def _last_key_lost(problem: Problem) -> Problem:
    visible = np.array(problem.visible)
    row, query = problem.last_query
    visible[row, 0, query, problem.seen_keys[-1]] = False
    return replace(problem, visible=visible)


def _newest_lost(problem: Problem) -> Problem:
    own = problem.q_positions[:, None, :, None] == problem.kv_positions[:, None, None, :]
    return replace(problem, visible=problem.visible & ~own)


def _windowed(case: Case) -> bool:
    return case.config.sliding_window is not None


MASK_DEFECTS = (
    Defect(
        id="window-plus-1",
        title="A window of W admits W + 1 keys.",
        source="huggingface/transformers#29623",
        run=_window_off_by(1),
        applies=_windowed,
    ),
    Defect(
        id="window-minus-1",
        title="A window of W admits W - 1 keys.",
        source="ModelTC/LightLLM#1311",
        run=_window_off_by(-1),
        applies=lambda case: _windowed(case) and (case.config.sliding_window or 0) > 1,
    ),
    Defect(
        id="decode-ignores-window",
        title="Token generation sees every cached key, window or not.",
        source="vllm-project/vllm#23969",
        run=_masked(_without_window),
        applies=lambda case: _windowed(case) and case.workload.phase == "tkg",
    ),
    Defect(
        id="chunk-boundary-late",
        title="Chunks begin one position early.",
        source="huggingface/transformers#37351",
        run=changed(_chunk_one_late),
        applies=lambda case: case.config.attention_chunk_size is not None,
    ),
    Defect(
        id="causal-top-left",
        title="Causality goes by index from the first key, though keys came before the queries.",
        source="thu-ml/SageAttention#372",
        run=changed(_top_left),
        applies=lambda case: case.workload.prior > 0,
    ),
    Defect(
        id="causal-bottom-right",
        title="Causality is anchored at the end of the padded keys, not at each row's own end.",
        source="pytorch/executorch#22443",
        run=changed(_bottom_right),
        applies=lambda case: case.workload.steps > 1,
    ),
    Defect(
        id="padding-in-denominator",
        title="Zero keys that fill the last tile enter the denominator.",
        source="flashinfer-ai/flashinfer#3717",
        run=changed(_zero_keys_to_tile),
    ),
    Defect(
        id="tail-unmasked",
        title="Keys read beyond a length that is no power of two are not masked.",
        source="FlagOpen/FlagAttention@18a4f44",
        run=changed(_stale_keys_to_power_of_two),
    ),
    Defect(
        id="last-key-lost",
        title="The last row loses its last key.",
        source="NVIDIA/TransformerEngine#1930",
        run=changed(_last_key_lost),
    ),
    Defect(
        id="newest-token-missing",
        title="Token generation does not see the token it is fed.",
        source="oxiglade/mlx-rs#338",
        run=changed(_newest_lost),
        applies=lambda case: case.workload.phase == "tkg",
    ),
)
"""Bugs in which a query sees the wrong keys."""
