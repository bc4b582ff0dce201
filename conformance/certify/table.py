"""Prints certificates and writes them into docs/certification.md between two markers."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from conformance.certify.measure import Certificate
from conformance.certify.tracked import ELEMENTARY_ULPS
from conformance.errors import UsageError

BEGIN = "<!-- certificate: begin, written by attn-conformance certify -->"
"""Line after which the tables stand."""

END = "<!-- certificate: end -->"
"""Line before which they end."""

_SHOWN = {"feature": 0, "output": 2, "bound": 3, "gradients": 5, "bound ": 6}
"""Columns of the printed table, and where each stands in a row."""

_HEADER = (
    "feature",
    "output: median",
    "worst",
    "bound there",
    "gradients: median",
    "worst",
    "bound there",
    "output",
    "logsumexp or cache",
    "gradients",
)


def rows(certificates: tuple[Certificate, ...]) -> list[tuple[str, ...]]:
    """Return one row of text per feature: errors and bounds in ulps, then shares of the bounds."""
    features: dict[str, dict[str, Certificate]] = {}
    for one in certificates:
        key = "state" if one.result in ("logsumexp", "cache") else one.result
        features.setdefault(one.feature, {})[key] = one
    return [
        (
            feature,
            *_ulps(results["output"]),
            *_ulps(results["gradients"]),
            *(f"{results[key].worst_share:.2g}" for key in ("output", "state", "gradients")),
        )
        for feature, results in features.items()
    ]


def _ulps(one: Certificate) -> tuple[str, str, str]:
    return f"{one.median_ulps:.2f}", f"{one.worst_ulps:.3g}", f"{one.bound_ulps:.2g}"


def show(
    certificates: tuple[Certificate, ...], functions: dict[str, float], console: Console
) -> None:
    """Print both tables and one line of verdict."""
    table = Table(
        title="golden's own error: worst ulps, and bounds there",
        header_style="bold",
    )
    for column in _SHOWN:
        table.add_column(column, justify="left" if column == "feature" else "right")
    table.add_column("share of bound", justify="right")
    for row in rows(certificates):
        table.add_row(*(row[at] for at in _SHOWN.values()), max(row[7:], key=float))
    console.print(table)
    console.print(
        "elementary functions, worst ulps: "
        + ", ".join(f"{name} {ulps:.2f}" for name, ulps in functions.items())
        + f"; assumed at most {ELEMENTARY_ULPS:g}"
    )
    refuted = [f"{one.feature}, {one.result}" for one in certificates if not one.holds]
    total = sum(one.values for one in certificates)
    if refuted:
        console.print(f"[bold red]refuted[/]: {len(refuted)} beyond their bound: {refuted}")
    else:
        console.print(f"[bold green]certified[/]: all {total} values lie within their bounds")


def markdown(certificates: tuple[Certificate, ...], functions: dict[str, float]) -> str:
    """Return both tables as Markdown."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cells) + " |"

    total = sum(one.values for one in certificates)
    share = max(one.worst_share for one in certificates)
    return "\n".join(
        [
            f"{total} values, {len(rows(certificates))} features; the largest share of a bound is "
            f"{share:.2g}.",
            "",
            "| | ulps | | | | | | share of bound | | |",
            line(("---",) * len(_HEADER)),
            line(tuple(f"**{name}**" for name in _HEADER)),
            *(line(row) for row in rows(certificates)),
            "",
            "| elementary function | worst ulps |",
            "| --- | --- |",
            *(line((f"`{name}`", f"{ulps:.2f}")) for name, ulps in functions.items()),
        ]
    )


def write(path: Path, text: str) -> None:
    """Replace what stands between the markers of a page.

    Raises:
        UsageError: the file does not exist or has no markers.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"path must be a page with a certificate's markers: {error}") from error
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UsageError(f"{path} must hold the lines {BEGIN!r} and {END!r} once each, in order")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
