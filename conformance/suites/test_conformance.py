"""Does the subject compute what golden defines, on every selected case?"""

from __future__ import annotations

import pytest

from conformance.cases import Case
from conformance.plugin import attach
from conformance.runner import judge_case
from conformance.subjects import Subject


def test_subject_conforms(case: Case, subject: Subject, request: pytest.FixtureRequest) -> None:
    """Judge one case; the record goes to the results whatever the verdict."""
    record = judge_case(case, subject)
    attach(request, record)
    if record.verdict == "UNSUPPORTED":
        pytest.skip(f"UNSUPPORTED: {record.reason}")
    if record.failed:
        pytest.fail(
            f"{record.verdict}: {record.reason}\nreproduce: {record.reproduce}", pytrace=False
        )
