"""``kvtuner-search bench check``: does a record have impossible figures?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from kvtuner_search.cli.options import json_option
from kvtuner_search.errors import ExitCode, KVTunerError, UsageError
from kvtuner_search.profile.canonical import canonical_json, parse_json, read_limited
from kvtuner_search.profile.terminal import console
from kvtuner_search.profile.text import printable

_GRAVEST_FIRST = (ExitCode.DATA, ExitCode.GATE_FAILED, ExitCode.OK)


@dataclass
class _Result:
    """What was found in one file."""

    path: str
    kind: str | None = None  # record or report
    judged: str = ""  # what it was judged against
    error: str | None = None
    violations: list[dict[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def code(self) -> ExitCode:
        if self.error is not None:
            return ExitCode.DATA
        return ExitCode.GATE_FAILED if self.violations else ExitCode.OK


@click.command(
    "check",
    epilog="Exit codes: 0 no figure is impossible, 1 some are, or nothing could be judged, 2 usage, 3 unreadable or invalid. With"
    " several files the most severe wins: 3, then 1.",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--hardware", metavar="NAME[,KEY=VALUE...]",
    help="Judge against this hardware instead of the file's, e.g. 'NVIDIA H200' or 'X,bandwidth=4.8e12,flops=989e12'.",
)  # fmt: skip
@click.option(
    "--model", type=click.Path(path_type=Path),
    help="Folder or config.json of a report's model; records contain its shape.",
)  # fmt: skip
@json_option
def command(files: tuple[Path, ...], hardware: str | None, model: Path | None, as_json: bool) -> int:
    """Judge each of FILES, records of `bench` or the adapter's test report, against the floors of its hardware.

    A time below the least that the hardware needs, or a rate above the most that it can do, is not a result. Figures that contradict each other
    are named too. docs/bench-floors.md derives the floors.
    """
    results = [_check(path, hardware, model) for path in files]
    code = next(code for code in _GRAVEST_FIRST if any(result.code == code for result in results))
    for result in results:
        if result.error is not None:
            click.echo(f"kvtuner-search: {result.error}", err=True)
    if as_json:
        content = [vars(result) | {"exit_code": int(result.code)} for result in results]
        click.echo(canonical_json({"exit_code": int(code), "files": content}), nl=False)
    else:
        for result in results:
            if result.error is None:
                _print(result)
    return code


def _check(path: Path, hardware: str | None, model: Path | None) -> _Result:
    from kvtuner_search.bench import claims, files

    result = _Result(str(path).encode(errors="replace").decode())
    try:
        data = read_limited(path, "a benchmark record", files.MAX_BYTES)
        content = parse_json(data, str(path), "benchmark record")
        if claims.recognise(content):
            _report(result, content, hardware, model)
        else:
            _record(result, files.loads(data, str(path)), hardware)
    except UsageError:
        raise  # of an option, not of this file
    except KVTunerError as error:
        result.error = printable(error)
    return result


def _record(result: _Result, record: Any, given: str | None) -> None:
    from kvtuner_search.bench import judge
    from kvtuner_search.bench.hardware import parse
    from kvtuner_search.bench.record import Violation

    result.kind = "record"
    ranks = record.served.tensor_parallel * record.served.pipeline_parallel
    machine = record.environment.hardware if given is None else parse(given, ranks)
    found = judge.judge(record, machine)
    found += [violation for violation in record.violations if violation not in found]
    found += [
        Violation(rule="correctness", where=check.name, figure="failed", reason=check.detail)
        for check in record.correctness
        if not check.passed
    ]
    if machine is None:
        text = "the record names no hardware, so no floor can be computed: give it with --hardware"
        found.append(Violation(rule="unjudged", where="environment", figure="unknown hardware", reason=text))
    else:
        result.judged = (
            f"{len(record.cells)} cells of {record.model.name} on {machine.count} x {machine.name} ({machine.source})"
        )
    result.violations = [violation.model_dump() for violation in found]


def _report(result: _Result, content: object, given: str | None, model: Path | None) -> None:
    from kvtuner_search.bench import claims
    from kvtuner_search.bench.hardware import parse
    from kvtuner_search.profile.model_config import load_config

    result.kind = "report"
    report = claims.parse(content, result.path)
    config = None if model is None else load_config(model / "config.json" if model.is_dir() else model)
    setup = claims.setup_of(report, None if given is None else parse(given), config)
    verdict = claims.judge(report, setup)
    layout = f"TP={setup.tensor_parallel} x PP={setup.pipeline_parallel}"
    machine = setup.hardware
    result.judged = f"{setup.model.name} with {layout} on {machine.count} x {machine.name} ({machine.source})"
    result.violations = [violation.model_dump() for violation in verdict.violations]
    result.remarks = verdict.remarks


def _print(result: _Result) -> None:
    """The impossible figures, each with its reason; the usual causes are printed once."""
    from kvtuner_search.bench.judge import split_causes

    out = console()
    count = len(result.violations)
    said = f"{count} figure{' is' if count == 1 else 's are'} impossible" if count else "no figure is impossible"
    out.print(f"{printable(result.path)}: {said}", style="bold red" if count else "bold green")
    if result.judged:
        out.print(f"  judged: {printable(result.judged)}")
    if count:
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_edge=False)
        table.add_column("where", overflow="fold", max_width=34)
        table.add_column("figure", overflow="fold", max_width=30)
        table.add_column("why it is impossible", overflow="fold")
        causes: dict[str, None] = {}  # in order of appearance
        for row in result.violations:
            why, usual = split_causes(row["reason"])
            causes |= dict.fromkeys(usual.split("; ") if usual else ())
            table.add_row(*(printable(cell) for cell in (row["where"], row["figure"], why)))
        out.print(table)
        if causes:
            out.print("\nusual causes", style="bold")
            for cause in causes:
                out.print(f"  - {printable(cause)}")
    if result.remarks:
        out.print("\nnot judged", style="bold")
        for remark in result.remarks:
            out.print(f"  - {printable(remark)}")
