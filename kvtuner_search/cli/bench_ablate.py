"""``kvtuner-search bench ablate``: one table that compares ways of storing the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kvtuner_search.bench.ablate.variants import FAMILIES
from kvtuner_search.cli.interrupts import kill_as_interrupt
from kvtuner_search.cli.options import json_option, quiet_option, server_arguments, start_timeout_option, timeout_option
from kvtuner_search.cli.run_options import CONTEXT, data_options, label, loading, model_options


@click.command(
    "ablate",
    context_settings=CONTEXT,
    epilog="Exit codes: 0 measured, 1 a served row has no speed (the table says why), 2 usage, 3 unreadable or invalid input,"
    " 4 a profile of another model, 130 interrupted (finished rows are kept: --resume).",
)
@model_options
@data_options(samples=20, length=512)
@click.option(
    "--only",
    "families",
    multiple=True,
    type=click.Choice(FAMILIES),
    help="Only these families of rows, in addition to the 16-bit cache; repeatable.",
)
@click.option(
    "--profile",
    "profiles",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A row of your own; repeatable.",
)
@click.option(
    "--centring-data",
    "centring",
    multiple=True,
    metavar="SOURCE",
    help="Data for the centring vectors, without the evaluated sequences; repeatable.",
    show_default="recall, arithmetic, list, text",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    show_default="LENGTH",
    help="Tokens in the cache, for rows whose bits depend on it.",
)
@click.option(
    "--server-python",
    metavar="PATH",
    help="Also serve every row that can be served, with SGLang in this Python's environment.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    help="Prompt tokens of each request to a server.",
)
@click.option("--output-tokens", type=click.IntRange(2), default=64, help="Tokens of each answer (throughput).")
@click.option("--concurrency", type=click.IntRange(1), default=8, help="Requests in flight (throughput).")
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=16,
    help="Minimum number of requests in each of the two cells.",
)
@timeout_option
@start_timeout_option
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="kvtuner-ablation/MODEL",
    help="Folder that keeps each finished row.",
)
@click.option("--resume", is_flag=True, help="Continue with the rows in the folder.")
@click.option("--overwrite", is_flag=True, help="Delete the rows in the folder and start again.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the JSON to this file.",
)
@json_option
@quiet_option
@server_arguments
def command(**options: Any) -> int:
    """Compare ways of storing the KV cache: bits, symmetric grids, group sizes, centring, per-channel keys, residual windows, published presets.

    Quality is measured offline, against the 16-bit cache on the same samples. With --server-python each row that packed rows can hold is served, and
    its time to first token, throughput and token capacity are measured too. docs/ablation.md says what each row is.
    """
    from kvtuner_search.bench.ablate.run import AblationOptions, AblationServerOptions, ablate
    from kvtuner_search.bench.ablate.table import print_ablation
    from kvtuner_search.data import DEFAULT_SOURCES
    from kvtuner_search.errors import ExitCode, UsageError
    from kvtuner_search.files import check_writable, write_atomic
    from kvtuner_search.profile.canonical import canonical_json
    from kvtuner_search.progress import Reporter
    from kvtuner_search.servers.host import public_command

    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other: one keeps the rows, the other deletes them")
    python, arguments = options.pop("server_python"), options.pop("server_arguments")
    shape = {name: options.pop(name) for name in ("concurrency", "requests", "timeout", "start_timeout")}
    shape |= {"prompt": options.pop("prompt_tokens"), "output": options.pop("output_tokens")}
    if arguments and python is None:
        raise UsageError("SGLang's options are given without a server: name its Python with --server-python")
    server = None if python is None else AblationServerOptions(python, arguments, **shape)
    as_json, output, reporter = options.pop("as_json"), options.pop("output"), Reporter(options.pop("quiet"))
    check_writable(output)
    model = loading(options)
    options["sources"] = options["sources"] or DEFAULT_SOURCES
    options["centring"] = options["centring"] or DEFAULT_SOURCES
    options["families"] = options["families"] or FAMILIES
    options["folder"] = options["folder"] or Path("kvtuner-ablation") / (Path(model.source).name or "model")
    chosen = AblationOptions(model=model, server=server, command=public_command(sys.argv[1:]), **options)
    with kill_as_interrupt():
        result = ablate(chosen, reporter)
    text = canonical_json(result.model_dump(mode="json"))
    if output is not None:
        write_atomic(output, text)
        reporter.say(f"wrote {output}")
    if as_json:
        click.echo(text, nl=False)
    else:
        print_ablation(result, label(result.model))
    failed = any(row.speed is not None and not row.speed.cells for row in result.rows)
    return ExitCode.GATE_FAILED if failed else ExitCode.OK
