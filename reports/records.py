"""The record of one judged case: what conformance writes as a JSON line and reports reads.

A results file is JSON Lines: one `environment` line, then one `case` line per judged case, in the
order in which they were judged. Numbers that JSON cannot hold (NaN, infinity) are written as the
strings "nan", "inf" and "-inf", so every line is strict JSON. Fields that are numbers by this
schema come back as numbers; inside `config`, `workload` and the environment such a string stays a
string, and tuples come back as lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

VERDICTS = ("CONFORMS", "DEVIATES", "MALFORMED", "CRASHED", "TIMED_OUT", "UNSUPPORTED")
"""Every verdict a case can end with; all but the first and the last are failures."""


class RecordError(ValueError):
    """A results file does not hold what this version of the schema says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worst:
    """The element of one output that lies furthest from golden, in units of its error scale.

    Attributes:
        output: name of the output, such as `output` or `k_cache`.
        index: position in that output's array.
        observed: the subject's value.
        expected: golden's value.
        error: `observed - expected`.
        sigma: predicted standard deviation of the error there.
        z: `error / sigma`.
    """

    output: str
    index: tuple[int, ...]
    observed: float
    expected: float
    error: float
    sigma: float
    z: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistic:
    """One measured figure and the limit it is held to.

    Attributes:
        output: name of the output it was taken over.
        name: `magnitude`, `spread`, `row spread`, ...
        value: measured.
        limit: permitted.
        derivation: where the limit comes from, one sentence.
        where: index of the element, row or tile it was largest at; empty when it has no place.
    """

    output: str
    name: str
    value: float
    limit: float
    derivation: str
    where: tuple[int, ...] = ()

    @property
    def ratio(self) -> float:
        """Value as a multiple of its limit; above 1 is a failure, and NaN counts as infinite."""
        if self.limit == 0:
            return 0.0 if self.value == 0 else math.inf
        quotient = self.value / self.limit
        return math.inf if math.isnan(quotient) else quotient


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRecord:
    """One rank's verdict on a case that many ranks computed.

    Attributes:
        rank: its number.
        verdict: one of `VERDICTS`.
        reason: one sentence with call and stage, empty when it conforms.
        first: whether it is among those that went wrong first; others may have what it sent them.
    """

    rank: int
    verdict: str
    reason: str = ""
    first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRecord:
    """One subject's verdict on one case.

    Attributes:
        case_id: stable id from which alone the case can be rebuilt.
        suite: suite it belongs to: `features`, `serving`, `core`, `presets`, `model` or `parallel`.
        features: what the case exercises, such as `sinks` or `sliding window`.
        model: published model the layer comes from, empty for a synthetic layer.
        layer: kind of layer within the model, such as `sliding`; empty for a synthetic layer.
        phase: `context encoding`, `token generation` or `serving`.
        dtype: dtype of the subject's tensors.
        regime: how the inputs were drawn.
        seed: seed of the inputs.
        config: every field of the layer's configuration.
        workload: lengths, positions and batch of the case.
        subject: name of the thing under test.
        profile: name of the precision profile it was judged under.
        profile_stages: stage name to the format it is stored in.
        verdict: one of `VERDICTS`.
        reason: one sentence saying why, empty when it conforms.
        statistics: every figure with its limit.
        worst: furthest element, None when nothing could be compared.
        reproduce: command that judges this case again.
        seconds: time by step (`golden`, `error model`, `subject`, `judge`).
        traceback: the subject's traceback when it crashed.
        power: smallest error of each parameter that the case would find, `parameter [unit]`.
        vacuous: outputs of which the case could not tell zeros from the truth.
        undetected: known defects that the case would not reject, by id, with why; empty unless
            the run asked.
        ranks: every rank's verdict, in their order; empty where one rank computed the case.
    """

    case_id: str
    suite: str
    features: tuple[str, ...]
    model: str
    layer: str
    phase: str
    dtype: str
    regime: str
    seed: int
    config: Mapping[str, Any]
    workload: Mapping[str, Any]
    subject: str
    profile: str
    profile_stages: Mapping[str, str]
    verdict: str
    reason: str
    statistics: tuple[Statistic, ...] = ()
    worst: Worst | None = None
    reproduce: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    traceback: str = ""
    power: Mapping[str, float] = field(default_factory=dict)
    vacuous: tuple[str, ...] = ()
    undetected: Mapping[str, str] = field(default_factory=dict)
    ranks: tuple[RankRecord, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise RecordError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")

    @property
    def failed(self) -> bool:
        """Whether the verdict counts against the subject."""
        return self.verdict not in ("CONFORMS", "UNSUPPORTED")

    @property
    def worst_ratio(self) -> float:
        """Largest value-to-limit ratio of any statistic; 0 when there is none."""
        return max((statistic.ratio for statistic in self.statistics), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """A results file in memory.

    Attributes:
        environment: versions, platform, command line and tier of the run.
        cases: the records, in the order in which they were judged.
    """

    environment: Mapping[str, Any]
    cases: tuple[CaseRecord, ...]

    @property
    def missing(self) -> int:
        """Cases that the run was to judge, as `planned_cases` of its environment says, less these.

        0 where the environment does not say.
        """
        planned = self.environment.get("planned_cases")
        return max(planned - len(self.cases), 0) if type(planned) is int else 0


_TEXT_FIELDS = (
    *("case_id", "suite", "model", "layer", "phase", "dtype", "regime", "subject", "profile"),
    *("verdict", "reason", "reproduce", "traceback"),
)
_MAPPING_FIELDS = ("config", "workload", "profile_stages", "seconds")
_RESERVED_KEYS = ("kind", "schema")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def case_to_dict(record: CaseRecord) -> dict[str, Any]:
    """Return the record as plain strict-JSON values."""
    encoded: dict[str, Any] = _encode(asdict(record))
    return encoded


def _check_kinds(fields: Mapping[str, Any]) -> None:
    """Raise TypeError for a text or mapping field that holds something else."""
    for names, kind in ((_TEXT_FIELDS, str), (_MAPPING_FIELDS, Mapping), (("seed",), int)):
        for name in names:
            if not isinstance(fields[name], kind):
                raise TypeError(f"{name} must be {kind.__name__}, got {fields[name]!r}")


def case_from_dict(data: Mapping[str, Any]) -> CaseRecord:
    """Rebuild a record from `case_to_dict`'s result.

    Raises:
        RecordError: a field is missing, unknown or of the wrong kind.
    """
    fields = dict(data)
    try:
        _check_kinds(fields)
        fields["seconds"] = {name: float(value) for name, value in fields["seconds"].items()}
        fields["features"] = tuple(fields["features"])
        fields["statistics"] = tuple(
            Statistic(
                **{
                    **item,
                    "value": float(item["value"]),
                    "limit": float(item["limit"]),
                    "where": tuple(item["where"]),
                }
            )
            for item in fields["statistics"]
        )
        power = fields.get("power", {})
        fields["power"] = {name: float(value) for name, value in power.items()}
        fields["vacuous"] = tuple(fields.get("vacuous", ()))
        fields["ranks"] = tuple(RankRecord(**item) for item in fields.get("ranks", ()))
        worst = fields["worst"]
        if worst is not None:
            numbers = ("observed", "expected", "error", "sigma", "z")
            values = {name: float(worst[name]) for name in numbers}
            fields["worst"] = Worst(**{**worst, "index": tuple(worst["index"]), **values})
        return CaseRecord(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"case record does not follow schema {SCHEMA_VERSION}: {error}"
        ) from error


def write_results(path: Path, environment: Mapping[str, Any], cases: Iterable[CaseRecord]) -> None:
    """Write a results file, replacing what was there.

    Raises:
        RecordError: `environment` uses a key that the file format needs for itself.
    """
    for key in _RESERVED_KEYS:
        if key in environment:
            raise RecordError(f"environment must not hold the key {key!r}; the format uses it")
    with path.open("w", encoding="utf-8") as file:
        head = {"kind": "environment", "schema": SCHEMA_VERSION, **environment}
        file.write(json.dumps(_encode(head), allow_nan=False) + "\n")
        for case in cases:
            file.write(_case_line(case))


def append_result(path: Path, case: CaseRecord) -> None:
    """Add a case to a results file that `write_results` began."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_case_line(case))


def _case_line(case: CaseRecord) -> str:
    return json.dumps({"kind": "case", **case_to_dict(case)}, allow_nan=False) + "\n"


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise RecordError(
                    f"{path}, line {number} is not JSON ({error}); is the file cut off?"
                ) from error
            if not isinstance(line, dict) or line.get("kind") not in ("environment", "case"):
                raise RecordError(
                    f"{path}, line {number} must be an object of kind 'environment' or 'case'"
                )
            yield number, line


def read_results(path: Path) -> Results:
    """Read a results file.

    Args:
        path: JSON Lines file written by `write_results`.

    Raises:
        RecordError: the file is no results file, is cut off, or follows another schema version.
    """
    environment: dict[str, Any] | None = None
    cases: list[CaseRecord] = []
    for number, line in _lines(path):
        kind = line.pop("kind")
        if kind == "environment":
            version = line.pop("schema", None)
            if version != SCHEMA_VERSION:
                raise RecordError(
                    f"{path} follows schema {version}, this version reads {SCHEMA_VERSION}"
                )
            environment = line
        elif environment is None:
            raise RecordError(f"{path}, line {number} comes before the environment line")
        else:
            cases.append(case_from_dict(line))
    if environment is None:
        raise RecordError(f"{path} is empty; a results file starts with an environment line")
    return Results(environment=environment, cases=tuple(cases))
