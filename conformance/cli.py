"""The `attn-conformance` command: a front on the pytest suites, and on the report.

Exit codes: 0 the subject conforms, 1 it deviates, 2 the command was used wrongly, or not every case
could be judged.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click
from rich.table import Table

from conformance.cache_folder import FOLDER_VARIABLE, MEGABYTES
from conformance.errors import UsageError
from conformance.false_alarms import DEFAULT_RATE
from conformance.precision import PROFILES
from conformance.presets import PRESETS
from conformance.selection import PARALLEL, SUITES, select_cases
from conformance.subjects import BUILT_IN, load_subject
from conformance.terminal import console
from conformance.tiers import TIERS
from reports.records import RecordError, Results, read_results

_console = console()
_TIER = click.option("--tier", type=click.Choice(TIERS), default="smoke", show_default=True)
_SUBJECT = click.option(
    "--subject",
    default="impl",
    show_default=True,
    metavar="NAME",
    help=f"What to judge: {', '.join(BUILT_IN)} or module:callable.",
)
_SUBJECTS = click.option(
    "--subject",
    "subjects",
    multiple=True,
    default=["impl"],
    show_default=True,
    metavar="NAME",
    help=f"What to judge: {', '.join(BUILT_IN)} or module:callable; repeatable.",
)
_PROFILE = click.option(
    "--profile",
    type=click.Choice(list(PROFILES)),
    default=None,
    help="Precision profile to judge under, instead of the one the subject claims.",
)
_SUITE = click.option(
    "--suite",
    "suites",
    type=click.Choice((*SUITES, PARALLEL)),
    multiple=True,
    help="Suite to take; repeatable. Default: all that fit the subject but parallel, which is impl "
    "on real ranks.",
)
_PRESET = click.option(
    "--preset", "presets", multiple=True, metavar="NAME", help="Published model; repeatable."
)
_PAGE = click.option(
    "--page",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Markdown page whose measured part to renew, such as docs/rules.md.",
)
_CACHE_DIR = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=FOLDER_VARIABLE,
    help="Keep golden's outputs and error scales there for later runs.",
)
_RESULTS = click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("results.jsonl"),
    show_default=True,
    help="Where the records go, one JSON line each.",
)
_REPORT = click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Where the HTML report goes.",
)
_JOBS = click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="all cores",
    help="Processes to judge in.",
)
_MODEL = click.option("--model", metavar="NAME", help="Real model with its weights: smollm2.")


class _Failure(click.ClickException):
    """One sentence on standard error, and exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attn-conformance")
def main() -> None:
    """Judge an attention implementation against the float64 golden model."""


@main.command()
@_SUBJECTS
@_PROFILE
@_TIER
@_SUITE
@_PRESET
@_MODEL
@click.option("--case", "ids", multiple=True, metavar="ID", help="Just this case; repeatable.")
@click.option(
    "--false-alarm-rate",
    "rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=DEFAULT_RATE,
    show_default=True,
    help="Chance that a correct subject fails any case of the run.",
)
@click.option(
    "--cases-in-run",
    "in_run",
    type=click.IntRange(min=1),
    default=None,
    help="Cases that share that chance, to judge some again. Default: those selected.",
)
@click.option(
    "--exact-rules",
    "exact",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Call the subject again with changes that must change no bit; auto: beyond smoke.",
)
@click.option(
    "--defects",
    is_flag=True,
    help="Also record which known defects each core case would not reject; costs a judgement each.",
)
@_RESULTS
@_REPORT
@_CACHE_DIR
@click.option(
    "--cache-mb",
    type=click.IntRange(min=1),
    default=MEGABYTES,
    show_default=True,
    help="Megabytes that directory may take.",
)
@_JOBS
def run(
    subjects: tuple[str, ...],
    profile: str | None,
    tier: str,
    suites: tuple[str, ...],
    presets: tuple[str, ...],
    model: str | None,
    ids: tuple[str, ...],
    rate: float,
    in_run: int | None,
    exact: str,
    defects: bool,
    results: Path,
    report: Path,
    cache_dir: Path | None,
    cache_mb: int,
    jobs: int,
) -> None:
    """Judge one subject or several and write results and report."""
    from conformance.lost_cases import DIED
    from conformance.session import run_session, summary_table

    try:
        chosen = [load_subject(name, profile=profile) for name in dict.fromkeys(subjects)]
        total = sum(
            len(select_cases(one, tier=tier, suites=suites, presets=presets, model=model, ids=ids))
            for one in chosen
        )
    except UsageError as error:
        raise _Failure(str(error)) from error
    for path in (results, report):
        if not path.absolute().parent.is_dir():
            raise _Failure(f"{path} cannot be written: {path.absolute().parent} is no directory")
    options = ["--tier", tier]
    options += ["--profile", profile] if profile else []
    options += ["--model", model] if model else []
    options += ["--exact-rules", exact]
    options += ["--defects"] if defects else []
    options += ["--cache-dir", str(cache_dir), "--cache-mb", str(cache_mb)] if cache_dir else []
    options += ["--false-alarm-rate", str(rate), "--cases-in-run", str(in_run or total)]
    named = (("--subject", subjects), ("--suite", suites), ("--preset", presets), ("--case", ids))
    for name, values in named:
        for value in values:
            options += [name, value]
    options += ["--results", str(results), "--report", str(report)]
    os.environ["ATTN_CONFORMANCE_COMMAND"] = shlex.join(["attn-conformance", *sys.argv[1:]])
    if not run_session(options, total=total, jobs=min(jobs, total), console=_console):
        raise _Failure("the session ended before every case was judged; its output is above")
    found = read_results(results)
    _console.print(summary_table(found))
    _print_failures(found)
    if len(found.cases) < total:
        raise _Failure(
            f"{total - len(found.cases)} of {total} cases left no record: the judge failed, or "
            "too many processes died; run with --jobs 1 to see which"
        )
    _console.print(f"results: {results}\nreport:  {report}", highlight=False)
    if lost := sum(case.reason == DIED for case in found.cases):
        raise _Failure(f"{lost} of {total} cases ended the process that judged them")
    if all(case.verdict == "UNSUPPORTED" for case in found.cases):
        raise _Failure(
            f"{' and '.join(subjects)} claims none of these cases, so nothing was judged"
        )
    sys.exit(1 if any(case.failed for case in found.cases) else 0)


@main.command()
@click.option("--case", "ids", multiple=True, metavar="ID", help="Just this case; repeatable.")
@_RESULTS
@_REPORT
@_JOBS
@click.pass_context
def parallel(
    context: click.Context, ids: tuple[str, ...], results: Path, report: Path, jobs: int
) -> None:
    """Judge impl on real ranks, every rank by itself: `run --suite parallel`."""
    from conformance.selection import parallel_case

    try:
        for text in ids:
            parallel_case(text)
    except UsageError as error:
        raise _Failure(str(error)) from error
    suites = () if ids else (PARALLEL,)
    context.invoke(run, suites=suites, ids=ids, results=results, report=report, jobs=jobs)


def _print_failures(results: Results, limit: int = 10) -> None:
    failed = sorted((c for c in results.cases if c.failed), key=lambda c: -c.worst_ratio)
    for case in failed[:limit]:
        _console.print(f"\n[bold red]{case.verdict}[/] {case.case_id}", highlight=False)
        _console.print(case.reason, markup=False, highlight=False, soft_wrap=True)
        # a command that a reader may copy must not be broken into lines
        _console.print(case.reproduce, markup=False, highlight=False, style="dim", soft_wrap=True)
    if len(failed) > limit:
        _console.print(f"\nand {len(failed) - limit} more, all in the report")


@main.command("list")
@click.argument("what", type=click.Choice(["cases", "presets", "subjects", "profiles", "defects"]))
@_SUBJECT
@_TIER
@_SUITE
@_PRESET
@_MODEL
@click.option(
    "--case", "text", metavar="ID", help="With defects: those that this core case misses."
)
def list_(
    what: str,
    subject: str,
    tier: str,
    suites: tuple[str, ...],
    presets: tuple[str, ...],
    model: str | None,
    text: str | None,
) -> None:
    """List cases, presets, subjects, profiles, or known defects and what a case makes of them."""
    if what == "defects":
        _list_defects(text)
        return
    if what == "cases":
        try:
            loaded = load_subject(subject)
            cases = select_cases(loaded, tier=tier, suites=suites, presets=presets, model=model)
        except UsageError as error:
            raise _Failure(str(error)) from error
        for case in cases:
            click.echo(case.id)
        return
    table = Table(box=None)
    if what == "presets":
        table.add_column("preset", no_wrap=True)  # a name that is cut short cannot be typed again
        for column in ("model", "layers", "heads", "KV heads", "head_dim", "kinds"):
            table.add_column(column)
        for preset in PRESETS.values():
            first = next(iter(preset.layers.values()))
            numbers = (
                preset.num_hidden_layers,
                first.num_attention_heads,
                first.num_key_value_heads,
                first.head_dim,
            )
            kinds = ", ".join(preset.layers)
            table.add_row(preset.name, preset.title, *map(str, numbers), kinds)
    elif what == "subjects":
        table.add_column("subject")
        table.add_column("callable")
        for name, path in BUILT_IN.items():
            table.add_row(name, path)
    else:
        table.add_column("profile")
        table.add_column("rounds like this")
        for name, build in PROFILES.items():
            table.add_row(name, build("bfloat16").reason)
    _console.print(table)


def _list_defects(text: str | None) -> None:
    from conformance.case_ids import parse
    from conformance.defects import DEFECTS
    from conformance.undetected import judged_defects

    table = Table(box=None)
    table.add_column("defect", no_wrap=True)
    table.add_column("what it does wrong")
    if text is None:
        table.add_column("source")
        for defect in DEFECTS:
            table.add_row(defect.id, defect.title, defect.source)
    else:
        table.add_column("this case")
        try:
            for defect, passes in judged_defects(parse(text)):
                table.add_row(
                    defect.id, defect.title, f"vacuous: {passes}" if passes else "rejects"
                )
        except UsageError as error:
            raise _Failure(str(error)) from error
    _console.print(table)


@main.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
)
def report(results: Path, output: Path) -> None:
    """Make the HTML report of a results file."""
    from reports.html import write_report

    try:
        write_report(read_results(results), output)
    except (RecordError, OSError) as error:
        raise _Failure(str(error)) from error
    click.echo(f"report: {output}")


@main.command()
@click.option("--case", "text", required=True, metavar="ID", help="Case to write.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("case.safetensors"),
    show_default=True,
)
def export(text: str, output: Path) -> None:
    """Write a case's inputs, for a subject that runs elsewhere."""
    from conformance.case_ids import parse
    from conformance.exchange import export_case

    try:
        export_case(parse(text), output)
    except UsageError as error:
        raise _Failure(str(error)) from error
    click.echo(f"inputs: {output}")


@main.command()
@click.argument("outputs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--case", "text", metavar="ID", help="Case they belong to, if the file does not say.")
@click.option("--profile", type=click.Choice(list(PROFILES)), default="eager", show_default=True)
def verify(outputs: Path, text: str | None, profile: str) -> None:
    """Judge outputs that a subject wrote to a file elsewhere."""
    from conformance.exchange import subject_from_file
    from conformance.runner import judge_case

    try:
        case, subject = subject_from_file(outputs, case=text, profile=profile)
        record = judge_case(case, subject)
    except UsageError as error:
        raise _Failure(str(error)) from error
    click.echo(f"{record.verdict} {record.case_id}")
    if record.reason:
        click.echo(record.reason)
    for figure in record.statistics:
        click.echo(f"  {figure.output}: {figure.name} {figure.value:.4g}, limit {figure.limit:.4g}")
    sys.exit(1 if record.failed else 0)


@main.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Markdown page whose table to renew, such as docs/certification.md.",
)
def certify(output: Path | None) -> None:
    """Measure golden's own error against 50-digit arithmetic."""
    try:
        from conformance.certify import run as certify_golden
    except ModuleNotFoundError as error:
        raise _Failure("certify needs mpmath: pip install 'attn-conformance[certify]'") from error

    certificates = certify_golden(output, _console)
    sys.exit(0 if all(certificate.holds for certificate in certificates) else 1)


@main.command()
@click.argument("what", type=click.Choice(["golden", "impl", "judge", "rules"]))
@click.option(
    "--json",
    "output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the figures.",
)
@click.option("--quick", is_flag=True, help="Few and short cases, to see that it works.")
@_PAGE
@click.option(
    "--longest",
    type=click.IntRange(min=1),
    help="bench impl: leave out prefills of more tokens.",
)
def bench(
    what: str, output: Path | None, quick: bool, page: Path | None, longest: int | None
) -> None:
    """Measure golden, impl, the judge or acceptance rules against peers in the same run."""
    if what == "rules":
        from conformance.benchmarks import rules

        rules.run(output, quick, page=page)
        return
    if what == "judge":
        from conformance.benchmarks import judge_speed

        judge_speed.run(output, quick, page=page)
        return
    if what == "impl":
        from conformance.benchmarks import impl_speed

        impl_speed.run(output, quick, page=page, longest=longest)
        return
    if page is not None:
        raise _Failure("bench golden has no --page; docs/golden-speed.md is written by hand")
    from conformance.benchmarks import golden_speed

    golden_speed.run(output, quick)


@main.command()
@click.option("--runs", type=click.IntRange(min=1), default=3000, show_default=True)
@click.option(
    "--records",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to keep runs in and to go on from.",
)
@_PAGE
def calibrate(runs: int, records: Path | None, page: Path | None) -> None:
    """Judge thousands of runs of correct kernels, and count false alarms."""
    from conformance import calibration

    calibration.run(page, runs, records=records)


@main.command()
@click.argument("what", type=click.Choice(["info", "clear"]))
@_CACHE_DIR
def cache(what: str, cache_dir: Path | None) -> None:
    """Say what the cache of error scales holds, or remove it."""
    from conformance.scale_cache import ScaleCache

    if cache_dir is None:
        raise _Failure(f"cache needs --cache-dir or the variable {FOLDER_VARIABLE}")
    kept = ScaleCache(cache_dir)
    if what == "clear":
        click.echo(f"removed {kept.clear()} files from {cache_dir}")
        return
    files = kept.files()
    size = sum(about.st_size for _, about in files) / 2**20
    click.echo(f"{cache_dir}: {len(files)} files, {size:.1f} MB")


@main.command()
def environment() -> None:
    """Say what this machine can run impl on, and what is missing for the rest."""
    from conformance.stablehlo import missing
    from impl.devices import environment_report

    click.echo(environment_report())
    absent = missing()
    click.echo(f"stablehlo: {'needs ' + ' and '.join(absent) if absent else 'available'}")


if __name__ == "__main__":
    main()
