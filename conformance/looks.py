"""A verdict from few Monte Carlo runs, and from many before it finds anything wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from conformance.error_model import MANY_RUNS, ErrorScale, Outputs, fewest_runs
from conformance.judge import Judgement


def look(
    expected: Outputs,
    predict: Callable[[int], Mapping[str, ErrorScale]],
    judge: Callable[[Mapping[str, ErrorScale]], Judgement],
) -> tuple[Judgement, Mapping[str, ErrorScale]]:
    """Judge with few runs, and again with many if that finds something and its scale is drawn.

    A scale drawn from few runs may know a row's error too little to condemn anything; one from a
    covariance rests on no run.

    Args:
        expected: golden's outputs.
        predict: the error scale of each output from a number of runs.
        judge: the verdict by a scale.

    Returns:
        The verdict, and the scale it was found with.
    """
    first = fewest_runs(expected)
    scales = predict(first)
    judgement = judge(scales)
    drawn = any(scale.covariance is None for scale in scales.values())
    if not judgement.conforms and drawn and first < MANY_RUNS:
        scales = predict(MANY_RUNS)
        judgement = judge(scales)
    return judgement, scales
