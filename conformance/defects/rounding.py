"""Known bugs of precision and of merging: roundings nobody claimed, and parts merged wrongly."""

from __future__ import annotations

import math

import numpy as np

from conformance.cases import Case
from conformance.defects.kernel import Kernel, Partial, exp, finite
from conformance.defects.problem import Problem, Values, rounded
from conformance.defects.record import Defect


class _NarrowAccumulator(Kernel):
    def accumulated(self, problem: Problem, mixed: Values) -> Values:
        return rounded(mixed, problem.dtype)


class _NarrowScores(Kernel):
    def scores(self, problem: Problem, keys: slice) -> Values:
        return rounded(super().scores(problem, keys), problem.dtype)


class _Float8Weights(Kernel):
    def cast_weights(self, problem: Problem, weights: Values) -> Values:
        return rounded(weights, "float8_e4m3fn")


class _Truncated(Kernel):
    def stored(self, problem: Problem, output: Values) -> Values:
        kept = _FRACTION_BITS.get(problem.dtype)
        if kept is None:
            return output
        bits = output.astype(np.float32).view(np.uint32)
        kept_bits: Values = bits >> np.uint32(23 - kept) << np.uint32(23 - kept)
        return kept_bits.view(np.float32)


_FRACTION_BITS = {"bfloat16": 7, "float16": 10}


class _Split(Kernel):
    """Attends to the two halves of the keys on their own."""

    def attended(self, problem: Problem) -> Partial:
        half = problem.kv_len // 2
        parts = [self.partial(problem, 0, half), self.partial(problem, half, problem.kv_len)]
        return self.merged(problem, parts)

    def merged(self, problem: Problem, parts: list[Partial]) -> Partial:
        """Merge the parts, relative to the largest score of both."""
        top = np.maximum(*(part.top for part in parts))
        shrinks = [exp(part.top - finite(top)) for part in parts]
        pairs = list(zip(parts, shrinks, strict=True))
        mixed = sum(part.mixed * shrink for part, shrink in pairs)
        total = sum(part.total * shrink for part, shrink in pairs)
        return Partial(np.asarray(mixed), np.asarray(total), top)


class _NarrowPartials(_Split):
    def merged(self, problem: Problem, parts: list[Partial]) -> Partial:
        stored = []
        for part in parts:
            total = np.where(part.total == 0, part.total.dtype.type(1), part.total)
            output = rounded(part.mixed / total, problem.dtype)
            stored.append(part._replace(mixed=output * part.total))
        return super().merged(problem, stored)


class _Base2Merged(_Split):
    def merged(self, problem: Problem, parts: list[Partial]) -> Partial:
        """Weigh each part by exp(lse / ln 2), its base-2 log-sum-exp taken for a natural one."""
        logs = [np.where(part.total > 0, _lse(part), -np.inf) for part in parts]
        top = np.maximum(*logs)
        shares = [np.exp((log - finite(top)) / math.log(2.0)) for log in logs]
        outputs = [part.mixed / np.where(part.total == 0, 1, part.total) for part in parts]
        pairs = list(zip(outputs, shares, strict=True))
        mixed = sum(output * share for output, share in pairs)
        return Partial(np.asarray(mixed, problem.q.dtype), np.asarray(sum(shares)), top)


def _lse(part: Partial) -> Values:
    lse: Values = np.log(np.where(part.total == 0, 1, part.total)) + finite(part.top)
    return lse


class _RescaleForgotten(_Split):
    def merged(self, problem: Problem, parts: list[Partial]) -> Partial:
        """Add the parts up though each is relative to its own largest score."""
        mixed = sum(part.mixed for part in parts)
        total = sum(part.total for part in parts)
        top = np.maximum(*(part.top for part in parts))
        return Partial(np.asarray(mixed), np.asarray(total), top)


def _narrow(case: Case) -> bool:
    return case.dtype != "float32"


ROUNDING_DEFECTS = (
    Defect(
        id="accumulator-narrow",
        title="The running output is stored in the tensors' dtype after each tile.",
        source="ggml-org/llama.cpp#6374",
        run=_NarrowAccumulator(),
        applies=_narrow,
        rounding=True,
    ),
    Defect(
        id="scores-narrow",
        title="Scores are stored in the tensors' dtype where float32 is claimed.",
        source="class of pytorch/pytorch#163588",
        run=_NarrowScores(),
        applies=_narrow,
        rounding=True,
    ),
    Defect(
        id="weights-float8",
        title="Weights are stored in float8 e4m3 for their product with the values.",
        source="class of Dao-AILab/flash-attention#2717",
        run=_Float8Weights(),
        rounding=True,
    ),
    Defect(
        id="truncated",
        title="The output is cast by dropping bits instead of rounding.",
        source="no public thread: a cast by a shift of bits",
        run=_Truncated(),
        applies=_narrow,
        rounding=True,
    ),
    Defect(
        id="partials-narrow",
        title="Outputs of two parts of the keys are stored in the tensors' dtype, then merged.",
        source="zhuzilin/ring-flash-attention#42",
        run=_NarrowPartials(),
        applies=_narrow,
        rounding=True,
    ),
    Defect(
        id="lse-base-2",
        title="Parts are merged by base-2 log-sum-exps taken for natural ones.",
        source="vllm-project/vllm#28840",
        run=_Base2Merged(),
    ),
    Defect(
        id="rescale-forgotten",
        title="Parts are added up though each is relative to its own largest score.",
        source="class of Dao-AILab/flash-attention@26d7d92f",
        run=_RescaleForgotten(),
    ),
)
"""Bugs of precision and of merging."""
