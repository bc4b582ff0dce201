"""How often a run of the suites may fail a correct subject by chance, and a case's part of it."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.errors import UsageError

DEFAULT_RATE = 1e-3
DEFAULT_CASES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseAlarms:
    """One chance of a false alarm for a whole run, shared equally by its cases.

    By Bonferroni's inequality the cases' parts add up to at least the chance of any alarm, however
    the cases depend on each other. Judging one of them again takes the same part, so it finds the
    same limits: the command to reproduce a case names the number of cases it was one of.

    Attributes:
        rate: chance that a correct subject fails any case of the run.
        cases: number of cases in the run.
    """

    rate: float = DEFAULT_RATE
    cases: int = DEFAULT_CASES

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.cases < 1:
            raise UsageError(
                "false alarm rate must lie between 0 and 1 and cases in the run be positive, got "
                f"{self.rate} and {self.cases}"
            )

    @property
    def per_case(self) -> float:
        """Chance that a correct subject fails one case."""
        return self.rate / self.cases

    def options(self) -> tuple[str, ...]:
        """Return the options with which a single case is judged by the same limits."""
        rate = () if self.rate == DEFAULT_RATE else ("--false-alarm-rate", f"{self.rate:g}")
        return ("--cases-in-run", str(self.cases), *rate)

    def __str__(self) -> str:
        return f"{self.rate:g} per run, {self.per_case:.1e} for each of {self.cases} cases"


STANDARD = FalseAlarms()
"""The default rate over the default number of cases."""
