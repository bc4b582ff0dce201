"""The record of a case whose process died while judging it."""

from __future__ import annotations

from dataclasses import replace

from conformance.case_record import case_record, claimed_profile
from conformance.cases import Case
from conformance.false_alarms import FalseAlarms
from conformance.parallel.session import record as parallel_record
from conformance.parallel.verdict import ParallelVerdict
from conformance.parallel.workloads import ParallelWorkload
from conformance.subjects import Subject
from reports.records import CaseRecord

DIED = "the process died that judged this case, so no figure of it is known"
"""The reason that such a record gives, and no other."""


def lost_record(
    case: Case | ParallelWorkload, subject: Subject, alarms: FalseAlarms, *, exact_rules: bool
) -> CaseRecord:
    """Return the record of a case that ended its process: by a signal, `os._exit` or no memory.

    Args:
        case: what was being judged on.
        subject: what was being judged.
        alarms: the run's chance of a false alarm.
        exact_rules: whether the subject was held to them.
    """
    if isinstance(case, ParallelWorkload):
        found = parallel_record(case, ParallelVerdict("CRASHED", DIED, (), ()), 0.0, alarms)
        return replace(found, seconds={})
    profile = claimed_profile(case, subject)
    return case_record(case, subject, profile, alarms, "CRASHED", DIED, {}, exact_rules=exact_rules)
