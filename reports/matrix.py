"""Counts per feature or model, phase and dtype: the tables at the top of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from reports.formatting import count, ratio
from reports.links import fragment
from reports.records import VERDICTS, CaseRecord

FEATURE_SUITES = ("features", "serving", "core", "gradients")
"""Suites counted in the feature matrix."""

MODEL_SUITES = ("presets", "model")
"""Suites counted in the model matrix."""

PARALLEL_SUITES = ("parallel",)
"""Suites counted in the matrix of meshes."""

NONE = "(none)"
"""Row of cases that name no feature, model or layer, and the filter value that finds them."""

_Row = tuple[tuple[str, str], ...]
"""A row as the filters that select it, `(("model", "gpt-oss"), ("layer", "sliding"))`."""

_PHASES = ("context encoding", "token generation", "serving")
_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3",
    "float8_e4m3fn",
    "float8_e5m2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What happened to the cases of one row and column.

    Attributes:
        verdicts: number of cases by verdict.
        worst: largest value-to-limit ratio, None when no case was measured.
        link: fragment of the filter that shows exactly these cases.
    """

    verdicts: Counter[str]
    worst: float | None
    link: str

    @property
    def passed(self) -> int:
        """Cases that conform."""
        return self.verdicts["CONFORMS"]

    @property
    def unsupported(self) -> int:
        """Cases that the subject does not claim to support."""
        return self.verdicts["UNSUPPORTED"]

    @property
    def total(self) -> int:
        """Cases that were judged, which leaves out the unsupported ones."""
        return self.verdicts.total() - self.unsupported

    @property
    def state(self) -> str:
        """`blank`, `unsupported`, `failed` or `passed`."""
        if not self.verdicts.total():
            return "blank"
        if not self.total:
            return "unsupported"
        return "passed" if self.passed == self.total else "failed"

    @property
    def note(self) -> str:
        """What stands beside the counts: the worst ratio, or what failed when no ratio shows it."""
        if self.state == "failed" and (self.worst is None or self.worst <= 1):
            failed = sorted(set(self.verdicts) - {"CONFORMS", "UNSUPPORTED"}, key=VERDICTS.index)
            return failed[0].lower().replace("_", " ")
        return "" if self.worst is None else ratio(self.worst)

    @property
    def words(self) -> str:
        """The cell as a sentence, for people who hear it or hover over it."""
        parts = [f"{number} {verdict}" for verdict, number in sorted(self.verdicts.items())]
        if self.worst is not None:
            parts.append(f"worst value {ratio(self.worst)} its limit")
        return f"{count(self.verdicts.total(), 'case')}: {', '.join(parts)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A table of cells.

    Attributes:
        columns: group and label of every column, phase and dtype as a rule.
        rows: label and cells of every row; one cell over all columns, then one per column.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Every group and the number of columns under it."""
        groups = groupby(self.columns, key=lambda column: column[0])
        return [(name, len(list(group))) for name, group in groups]


def _position(known: Sequence[str], name: str) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known), name)


def _label(row: _Row) -> str:
    named = [value for _, value in row if value != NONE]
    if not row:
        return "all cases"
    return " \N{MIDDLE DOT} ".join(named) if named else NONE


def _cell(cases: Iterable[CaseRecord], **parameters: str) -> Cell:
    members = tuple(cases)
    measured = [case.worst_ratio for case in members if case.statistics]
    return Cell(
        verdicts=Counter(case.verdict for case in members),
        worst=max(measured, default=None),
        link=fragment(**parameters),
    )


def _matrix(
    cases: Sequence[CaseRecord],
    rows_of: Callable[[CaseRecord], Iterable[_Row]],
    suites: Sequence[str],
    subject: str,
) -> Matrix:
    """Build a matrix whose first row counts every case once.

    Args:
        cases: records of one report, of any suite.
        rows_of: the rows a case counts in.
        suites: suites to count.
        subject: count only this subject's cases; empty gives every subject a column.
    """
    chosen = [case for case in cases if case.suite in suites and subject in ("", case.subject)]
    several = not subject and len({case.subject for case in chosen}) > 1

    def column_of(case: CaseRecord) -> tuple[str, str]:
        return ("subject", case.subject) if several else (case.phase, case.dtype)

    columns = list(dict.fromkeys(map(column_of, chosen)))
    if not several:
        columns.sort(
            key=lambda column: (_position(_PHASES, column[0]), _position(_DTYPES, column[1]))
        )
    members: dict[_Row, list[CaseRecord]] = {(): chosen} if chosen else {}
    for case in chosen:
        for row in set(rows_of(case)):
            members.setdefault(row, []).append(case)

    def cells(row: _Row) -> tuple[Cell, ...]:
        filters = {**dict(row), "suite": " ".join(suites), "subject": subject}
        places: dict[tuple[str, str], list[CaseRecord]] = {column: [] for column in columns}
        for case in members[row]:
            places[column_of(case)].append(case)
        return (
            _cell(members[row], **filters),
            *(
                _cell(places[group, name], **{**filters, "subject": name})
                if several
                else _cell(places[group, name], **filters, phase=group, dtype=name)
                for group, name in columns
            ),
        )

    return Matrix(
        columns=tuple(columns),
        rows=tuple((_label(row), cells(row)) for row in sorted(members)),
    )


def _feature_rows(case: CaseRecord) -> list[_Row]:
    return [(("feature", feature),) for feature in case.features or (NONE,)]


def feature_matrix(cases: Sequence[CaseRecord], *, subject: str = "") -> Matrix:
    """Count the cases of the feature suites; a case counts in the row of every feature it lists.

    Args:
        cases: records of one report.
        subject: count this subject's cases, a column per phase and dtype; empty counts all, and if
            that is more than one subject's, a column per subject.
    """
    return _matrix(cases, _feature_rows, FEATURE_SUITES, subject)


def mesh_matrix(cases: Sequence[CaseRecord], *, subject: str = "") -> Matrix:
    """Count the cases of many ranks, a row per mesh and per what they exercise besides.

    Args:
        cases: records of one report.
        subject: as in `feature_matrix`.
    """
    return _matrix(cases, _feature_rows, PARALLEL_SUITES, subject)


def model_matrix(cases: Sequence[CaseRecord], *, subject: str = "") -> Matrix:
    """Count the cases of the model suites, a row per model and layer kind.

    Args:
        cases: records of one report.
        subject: as in `feature_matrix`.
    """
    return _matrix(
        cases,
        lambda case: [(("model", case.model or NONE), ("layer", case.layer or NONE))],
        MODEL_SUITES,
        subject,
    )
