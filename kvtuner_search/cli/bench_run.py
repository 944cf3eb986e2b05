"""``kvtuner-search bench run``: measure a server, or start one and measure it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kvtuner_search.cli.bench import EXIT_CODES
from kvtuner_search.cli.interrupts import kill_as_interrupt
from kvtuner_search.cli.options import (
    api_key_option,
    json_option,
    quiet_option,
    server_arguments,
    server_python_option,
    start_timeout_option,
    timeout_option,
)
from kvtuner_search.cli.run_options import CONTEXT


@click.command(
    "run",
    context_settings={**CONTEXT, "auto_envvar_prefix": "KVTUNER_BENCH"},
    epilog=EXIT_CODES,
)
@click.option("--url", help="Running server, http://host:port, instead of starting one.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    show_default="a 16-bit cache, or what the server at --url has",
    help="Profile that says how the cache is stored.",
)
@click.option(
    "--model-path",
    "model",
    metavar="FOLDER|HUB-ID",
    show_default="what the server at --url names",
    help="Model; 'reference' is the embedded 13.9 M-parameter test instrument.",
)
@click.option("--preset", default="quick", help="Cells to measure: quick, legacy or full.")
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(["ttft", "throughput", "long", "batch", "memory"]),
    help="Only these tables of the preset; repeatable.",
)
@click.option(
    "--slo",
    metavar="NAME=LIMIT,...",
    help="Service-level objectives, e.g. ttft_p99=200,success=0.999,memory=0.9: times in ms, success and memory as fractions"
    " (docs/bench-records.md).",
)
@click.option(
    "--hardware",
    metavar="NAME[,bandwidth=B/S,flops=OP/S]",
    show_default="this machine's",
    help="Hardware that the server runs on, for the floors.",
)
@server_python_option
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="kvtuner-bench/NAME-PRESET",
    help="Folder for raw requests, log and record.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the folder.")
@click.option("--overwrite", is_flag=True, help="Delete the run in the folder and start again.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the record to this file.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an HTML report to this file.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Seed of the prompts.")
@api_key_option
@timeout_option
@click.option(
    "--stall",
    type=click.FloatRange(1),
    metavar="SECONDS",
    default=120.0,
    help="Time without a byte after which a request fails.",
)
@start_timeout_option
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    show_default="by concurrency and cores",
    help="Processes of the load generator.",
)
@click.option("--cross-check", is_flag=True, help="Also send one throughput cell through SGLang's own bench_serving.")
@json_option
@quiet_option
@server_arguments
def command(**options: Any) -> int:
    """Measure a server by the tokens that it returns.

    Starts a server with --model-path, --profile and the options after --, or measures a running one at --url. docs/bench.md says how
    and why.
    """
    from kvtuner_search.bench import files, hardware, slo
    from kvtuner_search.bench.options import BenchOptions
    from kvtuner_search.bench.run import BenchRun, folder_of
    from kvtuner_search.bench.steps import choose
    from kvtuner_search.errors import ExitCode, UsageError
    from kvtuner_search.files import check_writable, write_atomic
    from kvtuner_search.progress import Reporter
    from kvtuner_search.servers.host import public_command

    output, report, as_json = options.pop("output"), options.pop("report"), options.pop("as_json")
    reporter = Reporter(options.pop("quiet"))
    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other: one keeps the run, the other deletes it")
    if options["url"] is not None and options["server_arguments"]:
        raise UsageError(
            "options after -- are for a server that bench starts, and --url names a running one: leave one out"
        )
    options["steps"] = choose(options["preset"], options.pop("sections"))
    given, objectives = options.pop("hardware"), options.pop("slo")
    options["hardware"] = None if given is None else hardware.parse(given)
    options["objectives"] = [] if objectives is None else slo.parse(objectives)
    options["folder"] = options["folder"] or folder_of(options["profile"], options["model"], options["preset"])
    check_writable(output, report)
    with kill_as_interrupt():
        record = BenchRun(BenchOptions(command=public_command(sys.argv[1:]), **options), reporter).measure()
    text = files.dumps(record)
    if output is not None:
        write_atomic(output, text)
        reporter.say(f"wrote {output}")
    if report is not None:
        from kvtuner_search.report.bench_html import report as page

        write_atomic(report, page([record]))
        reporter.say(f"wrote {report}")
    if as_json:
        click.echo(text, nl=False)
    else:
        from kvtuner_search.profile.terminal import console
        from kvtuner_search.report.bench_terminal import print_record

        print_record(console(), record)
    return ExitCode.OK if record.passed else ExitCode.GATE_FAILED
