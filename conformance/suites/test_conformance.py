"""Does the subject compute what golden defines, on every selected case?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.cases import Case
from conformance.false_alarms import FalseAlarms
from conformance.parallel.session import judge_on_real_ranks
from conformance.parallel.workloads import ParallelWorkload
from conformance.plugin import attach, held_exactly
from conformance.runner import judge_case
from conformance.scale_cache import ScaleCache
from conformance.subjects import Subject
from conformance.undetected import undetected


def test_subject_conforms(
    case: Case | ParallelWorkload,
    subject: Subject,
    alarms: FalseAlarms,
    scale_cache: ScaleCache | None,
    request: pytest.FixtureRequest,
) -> None:
    """Judge one case; the record goes to the results whatever the verdict."""
    if isinstance(case, ParallelWorkload):
        record = judge_on_real_ranks(case, alarms=alarms)
    else:
        exact = held_exactly(request.config, case)
        record = judge_case(case, subject, alarms=alarms, exact_rules=exact, cache=scale_cache)
        if request.config.getoption("defects") and record.verdict != "UNSUPPORTED":
            record = replace(record, undetected=undetected(case, alpha=alarms.per_case))
    attach(request, record)
    if record.verdict == "UNSUPPORTED":
        pytest.skip(f"UNSUPPORTED: {record.reason}")
    if record.failed:
        pytest.fail(
            f"{record.verdict}: {record.reason}\nreproduce: {record.reproduce}", pytrace=False
        )
