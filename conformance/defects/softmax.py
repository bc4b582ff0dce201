"""Known bugs of the softmax: its scale, its soft cap and its sink."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from conformance.cases import Case
from conformance.defects.kernel import Kernel, Partial
from conformance.defects.problem import Problem, Values
from conformance.defects.record import Defect, changed


def _scale_times(factor: float) -> Callable[[Problem], Values]:
    return changed(lambda p: replace(p, softmax_scale=p.softmax_scale * factor))


def _padded_dim(head_dim: int) -> int:
    return -(-head_dim // 128) * 128


def _scale_of_padded_dim(problem: Problem) -> Problem:
    dim = problem.config.head_dim
    return replace(problem, softmax_scale=problem.softmax_scale * math.sqrt(dim / _padded_dim(dim)))


def _sink_plus(shift: float) -> Callable[[Problem], Values]:
    def change(problem: Problem) -> Problem:
        assert problem.sinks is not None
        return replace(problem, sinks=problem.sinks + problem.sinks.dtype.type(shift))

    return changed(change)


def _sink_by_row(problem: Problem) -> Problem:
    assert problem.sinks is not None
    heads = problem.sinks.shape[1]
    by_row = problem.sinks[0, np.arange(problem.q.shape[2]) % heads, 0, 0]
    return replace(problem, sinks=by_row[None, None, :, None])


def _sink_of_first_group(problem: Problem) -> Problem:
    assert problem.sinks is not None
    sinks = problem.sinks.copy()
    sinks[:, problem.config.group_size :] = -np.inf
    return replace(problem, sinks=sinks)


class _CapAfterMask(Kernel):
    def scores(self, problem: Problem, keys: slice) -> Values:
        masked = super().scores(replace(problem, softcap=None), keys)
        return self.capped(problem, masked)


class _CapTimesScore(Kernel):
    def capped(self, problem: Problem, scores: Values) -> Values:
        wrong: Values = scores * np.tanh(scores / scores.dtype.type(problem.softcap))
        return wrong


class _NeighbourInSum(Kernel):
    def finished(self, problem: Problem, whole: Partial) -> Values:
        total = whole.total + np.roll(whole.total, 1, axis=2)
        return super().finished(problem, whole._replace(total=total))


def _sunk(case: Case) -> bool:
    return case.config.learned_sinks_size is not None


def _capped(case: Case) -> bool:
    return case.config.softcap is not None


SOFTMAX_DEFECTS = (
    Defect(
        id="scale-lacks-log2e",
        title="An exp2 softmax is given the scale of an exp one.",
        source="flashinfer-ai/flashinfer#787",
        run=_scale_times(math.log(2.0)),
    ),
    Defect(
        id="scale-of-padded-dim",
        title="The softmax scale is taken from the head width padded to 128.",
        source="vllm-project/vllm-ascend#1958",
        run=changed(_scale_of_padded_dim),
        applies=lambda case: _padded_dim(case.config.head_dim) != case.config.head_dim,
    ),
    Defect(
        id="scale-1-percent",
        title="The softmax scale is 1 % too large.",
        source="class of huggingface/transformers#44397",
        run=_scale_times(1.01),
    ),
    Defect(
        id="scale-0.1-percent",
        title="The softmax scale is 0.1 % too large.",
        source="class of huggingface/transformers#44397",
        run=_scale_times(1.001),
    ),
    Defect(
        id="scale-0.03-percent",
        title="The softmax scale is 0.03 % too large.",
        source="class of huggingface/transformers#44397",
        run=_scale_times(1.0003),
    ),
    Defect(
        id="softcap-dropped",
        title="The soft cap is left out.",
        source="vllm-project/vllm-metal#665",
        run=changed(lambda p: replace(p, softcap=None)),
        applies=_capped,
    ),
    Defect(
        id="softcap-after-mask",
        title="The soft cap acts on masked scores, which end at -cap.",
        source="onnx/onnx#7865",
        run=_CapAfterMask(),
        applies=_capped,
    ),
    Defect(
        id="softcap-times-score",
        title="The score itself, not the cap, multiplies tanh(score / cap).",
        source="unslothai/unsloth-zoo#593",
        run=_CapTimesScore(),
        applies=_capped,
    ),
    Defect(
        id="sink-dropped",
        title="The learned sink is left out.",
        source="modular/modular#6591",
        run=changed(lambda p: replace(p, sinks=None)),
        applies=_sunk,
    ),
    Defect(
        id="sink-by-row",
        title="The sink is looked up by row instead of head.",
        source="modular/modular#6591",
        run=changed(_sink_by_row),
        applies=lambda case: _sunk(case) and case.config.num_attention_heads > 1,
    ),
    Defect(
        id="sink-first-group-only",
        title="Only the first group of heads has its sink.",
        source="NVIDIA/TensorRT-LLM#15739",
        run=changed(_sink_of_first_group),
        applies=lambda case: _sunk(case) and case.config.num_key_value_heads > 1,
    ),
    Defect(
        id="sink-twice",
        title="Two ranks both count the sink.",
        source="InternLM/lmdeploy#3951",
        run=_sink_plus(math.log(2.0)),
        applies=_sunk,
    ),
    Defect(
        id="sink-plus-0.01",
        title="The sink is 0.01 too large.",
        source="class of flashinfer-ai/flashinfer#1758",
        run=_sink_plus(0.01),
        applies=_sunk,
    ),
    Defect(
        id="sink-plus-0.004",
        title="The sink is 0.004 too large.",
        source="class of flashinfer-ai/flashinfer#1758",
        run=_sink_plus(0.004),
        applies=_sunk,
    ),
    Defect(
        id="neighbour-in-row-sum",
        title="A row's sum of weights takes in its neighbour's.",
        source="flashinfer-ai/flashinfer#3838",
        run=_NeighbourInSum(),
    ),
)
"""Bugs of the scores' scale, cap, sink and sum."""
