"""Known bugs of layout: which KV head, which cache slot, which page, and where the output goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.defects.kernel import Kernel
from conformance.defects.problem import Problem, Values, rounded
from conformance.defects.record import Defect, changed

_PAGE = 16


def _kv_heads(pick: Callable[[NDArray[np.intp], int], NDArray[np.intp]]) -> Callable[..., Problem]:
    """Let query head `h` read the KV head that `pick(h, kv_heads)` names."""

    def change(problem: Problem) -> Problem:
        heads, kv_heads = problem.q.shape[1], problem.config.num_key_value_heads
        chosen = pick(np.arange(heads), kv_heads) * problem.config.group_size
        return replace(problem, k=problem.k[:, chosen], v=problem.v[:, chosen])

    return change


def _one_group_late(heads: NDArray[np.intp], kv_heads: int) -> NDArray[np.intp]:
    late: NDArray[np.intp] = heads * kv_heads // len(heads) + (heads == len(heads) - 1)
    return late % kv_heads


def _slot(problem: Problem) -> int:
    """Pick a key that the last query sees, not its first one seen."""
    seen = problem.seen_keys
    return int(problem.rng().choice(seen[1:] if len(seen) > 1 else seen))


def _k_slot_stale(problem: Problem) -> Problem:
    k, slot = problem.k.copy(), _slot(problem)
    k[0, :, slot] = problem.k[0, :, slot - 1]
    return replace(problem, k=k)


def _v_row_zero(problem: Problem) -> Problem:
    v = problem.v.copy()
    head = int(problem.rng().integers(problem.v.shape[1]))
    v[0, head, _slot(problem)] = 0.0
    return replace(problem, v=v)


def _page_twice(problem: Problem) -> Problem:
    page = int(problem.seen_keys[-1]) // _PAGE
    k, v = problem.k.copy(), problem.v.copy()
    last = min((page + 1) * _PAGE, problem.kv_len)
    now, before = slice(page * _PAGE, last), slice((page - 1) * _PAGE, last - _PAGE)
    k[0, :, now], v[0, :, now] = problem.k[0, :, before], problem.v[0, :, before]
    return replace(problem, k=k, v=v)


def _float8_cache(problem: Problem) -> Problem:
    return replace(
        problem,
        k=rounded(problem.k, "float8_e4m3fn"),
        v=rounded(problem.v, "float8_e4m3fn"),
    )


class _OneElement(Kernel):
    def stored(self, problem: Problem, output: Values) -> Values:
        output = output.copy()
        rng = problem.rng()
        row, query = problem.last_query
        place = row, int(rng.integers(output.shape[1])), query, int(rng.integers(output.shape[3]))
        output[place] *= output.dtype.type(1.05)
        return super().stored(problem, output)


class _SwappedHeads(Kernel):
    def stored(self, problem: Problem, output: Values) -> Values:
        output = output.copy()
        output[:, :2] = output[:, 1::-1]
        return super().stored(problem, output)


class _HeadsAndDimTransposed(Kernel):
    def stored(self, problem: Problem, output: Values) -> Values:
        batch, heads, q_len, dim = output.shape
        rows = output.transpose(0, 2, 3, 1).reshape(batch, q_len, heads, dim)
        return super().stored(problem, rows.transpose(0, 2, 1, 3))


class _LastHeadEmpty(Kernel):
    def stored(self, problem: Problem, output: Values) -> Values:
        output = output.copy()
        output[:, -1] = 0.0
        return super().stored(problem, output)


class _Zeros(Kernel):
    def __call__(self, problem: Problem) -> Values:
        return np.zeros(problem.q.shape)


def _grouped(case: Case) -> bool:
    config = case.config
    return config.group_size > 1 and config.num_key_value_heads > 1


def _many_heads(case: Case) -> bool:
    return case.config.num_attention_heads > 1


def _two_pages(case: Case) -> bool:
    return min(case.workload.lengths) + case.workload.prior > _PAGE


MEMORY_DEFECTS = (
    Defect(
        id="kv-heads-tiled",
        title="KV heads are tiled (0 1 0 1) instead of repeated (0 0 1 1).",
        source="onnx/onnx#7274",
        run=changed(_kv_heads(lambda heads, kv_heads: heads % kv_heads)),
        applies=_grouped,
    ),
    Defect(
        id="last-head-wrong-group",
        title="The last query head reads another group's KV head.",
        source="PSAL-POSTECH/ONNXim#34",
        run=changed(_kv_heads(_one_group_late)),
        applies=lambda case: case.config.num_key_value_heads > 1,
    ),
    Defect(
        id="k-slot-stale",
        title="One slot of the key cache holds the token before.",
        source="awslabs/keys_values#140",
        run=changed(_k_slot_stale),
    ),
    Defect(
        id="v-row-zero",
        title="One value row of one head is zero.",
        source="tenstorrent/tt-metal#54413",
        run=changed(_v_row_zero),
    ),
    Defect(
        id="page-read-twice",
        title="The last page is read from the page before it.",
        source="flashinfer-ai/flashinfer#3022",
        run=changed(_page_twice),
        applies=_two_pages,
    ),
    Defect(
        id="cache-float8",
        title="Keys and values pass through float8 e4m3.",
        source="vllm-project/vllm#53590",
        run=changed(_float8_cache),
    ),
    Defect(
        id="element-5-percent",
        title="One element of the last row is 5 % too large.",
        source="class of Dao-AILab/flash-attention#2229",
        run=_OneElement(),
    ),
    Defect(
        id="heads-swapped",
        title="The first two heads of the output change places.",
        source="deepspeedai/DeepSpeed#3844",
        run=_SwappedHeads(),
        applies=_many_heads,
    ),
    Defect(
        id="heads-transposed",
        title="Heads and channels of the output are transposed.",
        source="apple/axlearn#842",
        run=_HeadsAndDimTransposed(),
        applies=_many_heads,
    ),
    Defect(
        id="last-head-empty",
        title="The last head is left at zero.",
        source="deepspeedai/DeepSpeed#8316",
        run=_LastHeadEmpty(),
        applies=_many_heads,
    ),
    Defect(
        id="zeros",
        title="The output is zero.",
        source="ScalingIntelligence/KernelBench#165",
        run=_Zeros(),
    ),
)
"""Bugs of addresses: heads, slots, pages and what is written."""
