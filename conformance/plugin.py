"""Pytest plugin: options to choose the subject, records of every verdict, the report at the end.

The suites are ordinary pytest tests (`pytest --pyargs conformance.suites`). Each test attaches its
record to its report, so records reach the one process that writes them also under pytest-xdist.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from conformance.cache_folder import FOLDER_VARIABLE, MEGABYTES
from conformance.false_alarms import DEFAULT_RATE, FalseAlarms
from reports.records import (
    CaseRecord,
    append_result,
    case_from_dict,
    case_to_dict,
    write_results,
)

if TYPE_CHECKING:
    from conformance.cases import Case
    from conformance.parallel.workloads import ParallelWorkload
    from conformance.scale_cache import ScaleCache
    from conformance.subjects import Subject

_RECORD = "conformance_record"
_HELD = ("features", "serving", "core", "gradients")
"""Suites whose cases are held to the exact rules unless an option says otherwise."""
_RESOLVED = pytest.StashKey["Plan"]()
_PACKAGES = (
    *("numpy", "scipy", "torch", "torch-neuronx", "torch-mlir", "jaxlib", "ml_dtypes", "pytest"),
    "attn-conformance",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suites."""
    group = parser.getgroup("attn-conformance", "attention conformance")
    group.addoption(
        "--subject",
        action="append",
        default=[],
        metavar="NAME",
        help="what to judge: impl, torch-sdpa, ... or module:callable; repeatable (default: impl)",
    )
    group.addoption(
        "--profile", default=None, metavar="NAME", help="precision profile instead of the claimed"
    )
    group.addoption(
        "--tier", default="smoke", metavar="TIER", help="smoke, standard or full (default: smoke)"
    )
    group.addoption(
        "--case", action="append", default=[], metavar="ID", help="judge just this case; repeatable"
    )
    group.addoption(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help="judge just the layers of this published model; repeatable",
    )
    group.addoption(
        "--model", default=None, metavar="NAME", help="judge the layers of a real model: smollm2"
    )
    group.addoption(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="features, serving, core, presets, or parallel: impl on real ranks; repeatable "
        "(default: all the subject takes but parallel)",
    )
    group.addoption(
        "--false-alarm-rate",
        type=float,
        default=DEFAULT_RATE,
        metavar="RATE",
        help="chance that a correct subject fails any case of the run (default: %(default)g)",
    )
    group.addoption(
        "--cases-in-run",
        type=int,
        default=None,
        metavar="N",
        help="cases that share that chance, to judge some again (default: those selected)",
    )
    group.addoption(
        "--exact-rules",
        choices=("auto", "on", "off"),
        default="auto",
        help="call the subject again with changes that must change no bit (default: auto, for "
        "features, serving, core and gradients beyond the smoke tier)",
    )
    group.addoption(
        "--defects",
        action="store_true",
        help="also run the known defects on each forward core case on one rank and record those it "
        "would not reject",
    )
    group.addoption(
        "--cache-dir",
        default=None,
        metavar="DIR",
        help="keep golden's outputs and error scales there for later runs (default: "
        f"${FOLDER_VARIABLE}, or nowhere)",
    )
    group.addoption(
        "--cache-mb",
        type=int,
        default=MEGABYTES,
        metavar="N",
        help="megabytes that directory may take (default: %(default)d)",
    )
    group.addoption("--results", default=None, metavar="PATH", help="write records as JSON Lines")
    group.addoption("--report", default=None, metavar="PATH", help="write the HTML report")


def pytest_configure(config: pytest.Config) -> None:
    """Collect records in the process that reports, and refuse bad options before anything runs."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config), "attn-conformance-recorder")
    if any("conformance.suites" in argument.replace(os.sep, ".") for argument in config.args):
        resolve(config)


class Plan(NamedTuple):
    """What a session is to judge.

    Attributes:
        pairs: what to judge, on what; one subject after the other, cases on one rank or on many.
        alarms: the run's chance of a false alarm, shared by all of them.
        cache: where golden's outputs and error scales are kept, if anywhere.
    """

    pairs: list[tuple[Subject, Case | ParallelWorkload]]
    alarms: FalseAlarms
    cache: ScaleCache | None

    @property
    def ids(self) -> list[str]:
        """What tells the tests of `pairs` apart: the case, and the subject where there are more."""
        alone = len({subject.name for subject, _ in self.pairs}) == 1
        return [case.id if alone else f"{case.id}@{subject.name}" for subject, case in self.pairs]


def resolve(config: pytest.Config) -> Plan:
    """Return what the options ask for, worked out once a session.

    Raises:
        pytest.UsageError: an option names something unknown; one sentence, no traceback.
    """
    from conformance.errors import UsageError
    from conformance.scale_cache import cache_in
    from conformance.selection import select_cases
    from conformance.subjects import load_subject

    if _RESOLVED not in config.stash:
        try:
            cache = cache_in(config.getoption("cache_dir"), config.getoption("cache_mb"))
            pairs = [
                (subject, case)
                for subject in (
                    load_subject(name, profile=config.getoption("profile"))
                    for name in subject_names(config)
                )
                for case in select_cases(
                    subject,
                    tier=config.getoption("tier"),
                    suites=config.getoption("suite"),
                    presets=config.getoption("preset"),
                    model=config.getoption("model"),
                    ids=config.getoption("case"),
                )
            ]
            alarms = FalseAlarms(
                rate=config.getoption("false_alarm_rate"),
                cases=config.getoption("cases_in_run") or max(len(pairs), 1),
            )
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        config.stash[_RESOLVED] = Plan(pairs, alarms, cache)
    return config.stash[_RESOLVED]


def subject_names(config: pytest.Config) -> list[str]:
    """Return the subjects asked for, each once; `impl` if none is."""
    return list(dict.fromkeys(config.getoption("subject"))) or ["impl"]


def held_exactly(config: pytest.Config, case: Case | ParallelWorkload) -> bool:
    """Return whether a case is also held to the exact rules; an option may say so or not."""
    option = config.getoption("exact_rules")
    if option == "auto":
        return config.getoption("tier") != "smoke" and getattr(case, "suite", "") in _HELD
    return bool(option == "on")


def attach(request: pytest.FixtureRequest, record: CaseRecord) -> None:
    """Attach a record to the running test."""
    request.node.user_properties.append((_RECORD, json.dumps(case_to_dict(record))))


class _Recorder:
    """Gathers the records of a session, and writes them as they come and in order at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._records: list[CaseRecord] = []
        self._selected: int | None = None
        self._started = time.time()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the cases that `-k` and the like leave, in a session of one process."""
        self._count(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count them where processes of pytest-xdist collect, all of them alike."""
        self._count(ids)

    def _count(self, ids: Iterable[str]) -> None:
        self._selected = sum("::test_subject_conforms[" in name for name in ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the record off a finished test."""
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == _RECORD:
                self._keep(case_from_dict(json.loads(str(value))))

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        """Record a case whose process died; pytest-xdist says which test that was."""
        plan = self._config.stash.get(_RESOLVED, None)
        if plan is None:
            return
        from conformance.lost_cases import lost_record

        for name, (subject, case) in zip(plan.ids, plan.pairs, strict=True):
            if crashitem.endswith(f"::test_subject_conforms[{name}]"):
                exact = held_exactly(self._config, case)
                lost = lost_record(case, subject, plan.alarms, exact_rules=exact)
                judged = {(one.case_id, one.subject) for one in self._records}
                if (lost.case_id, lost.subject) not in judged:  # else it died afterwards
                    self._keep(lost)

    def _keep(self, record: CaseRecord) -> None:
        """Keep a record, in the results file as well: a session that is killed leaves its own."""
        self._records.append(record)
        results = self._config.getoption("results")
        if not results or (Path(results).exists() and not Path(results).is_file()):
            return  # a pipe or a device takes them once, at the end
        if len(self._records) == 1:
            write_results(Path(results), self._environment(), ())
        append_result(Path(results), record)

    def _environment(self) -> dict[str, Any]:
        plan = self._config.stash.get(_RESOLVED, None)
        sharing = len(self._records) if plan is None else len(plan.pairs)
        environment = describe_environment(self._config, self._started, sharing)
        return environment | {"planned_cases": self._selected or len(self._records)}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the results and the report."""
        results = self._config.getoption("results")
        report = self._config.getoption("report")
        if not (results or report):
            return
        from reports.html import write_report
        from reports.records import Results

        environment = self._environment()
        names = subject_names(self._config)
        records = sorted(self._records, key=lambda r: (names.index(r.subject), r.suite, r.case_id))
        if results:
            write_results(Path(results), environment, records)
        if report:
            write_report(Results(environment=environment, cases=tuple(records)), Path(report))


def describe_environment(config: pytest.Config, started: float, planned: int) -> dict[str, Any]:
    """Return what a reader needs to know about the machine and the run.

    Args:
        config: the session's options.
        started: when it began, seconds since the epoch.
        planned: number of cases that share the chance of a false alarm.
    """
    from impl.devices import environment_report

    report = environment_report()
    rate = config.getoption("false_alarm_rate")
    alarms = FalseAlarms(rate=rate, cases=config.getoption("cases_in_run") or max(planned, 1))
    return {
        "command": os.environ.get("ATTN_CONFORMANCE_COMMAND", shlex.join(_command_line())),
        "subject": ", ".join(subject_names(config)),
        "tier": config.getoption("tier"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count() or 0,
        "devices": ", ".join(report.devices),
        "neuron": report.neuron,
        "packages": dict(_versions()),
        "false_alarm_rate": str(alarms),
    }


def _command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
