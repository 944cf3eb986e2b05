"""``kvtuner-search calibrate``: from a model and text to profiles and a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtuner_search import threads
from kvtuner_search.calibration import samplers
from kvtuner_search.cli.interrupts import end_with, kill_as_interrupt
from kvtuner_search.cli.options import quiet_option
from kvtuner_search.cli.run_options import CONTEXT, data_options, loading, model_options, space_options
from kvtuner_search.errors import UsageError

if TYPE_CHECKING:
    from kvtuner_search.calibration.record import CalibrationRecord


@click.command(
    "calibrate",
    context_settings=CONTEXT,
    epilog="Exit codes: 0 done, 2 usage, 3 unreadable or invalid input, 130 interrupted (continue with --resume).",
)
@model_options
@data_options(samples=5, length=448, per="of each source in each split", seeds="data, splits and search")
@space_options
@click.option(
    "--target-bits",
    type=click.FloatRange(1, 16),
    multiple=True,
    help="Budget in effective bits, counting everything stored; repeatable, one profile each.",
    show_default="4.0",
)
@click.option(
    "--max-loss",
    type=float,
    help="Instead of a budget: the cheapest setting whose KL divergence (nats a token) is at most this, on every source (see --robust).",
)
@click.option("--trials", type=click.IntRange(1), default=32, help="Distinct settings to score.")
@click.option(
    "--sampler",
    type=click.Choice(list(samplers.SAMPLERS)),
    default=samplers.DEFAULT,
    help=f"What proposes settings. {samplers.described()}.",
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=samplers.PATIENCE,
    help="End the search after this many trials in a row that gain less than the samples tell apart; 0: never.",
)
@click.option(
    "--robust/--no-robust",
    default=True,
    help="Choose another setting than the optimum that needs no trial only if it is better for certain, and worse on no source; --max-loss bounds each source.",
)
@click.option(
    "--pp",
    "stages",
    type=click.IntRange(1),
    default=1,
    help="Pipeline stages of the server. Budgets count each stage as the largest, which limits the tokens that fit.",
)
@click.option(
    "--grouping",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    help="Layers of similar sensitivity share a variable; auto: if the silhouette is good.",
)
@click.option(
    "--random-baseline/--no-random-baseline",
    default=True,
    help="Also run a random search with as many proposals, for comparison.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("kvtuner-output"),
    help="Folder for profiles, report and study.",
)
@click.option("--name", help="Start of the profiles' names.", show_default="the model's")
@click.option("--resume", is_flag=True, help="Continue the study in the output folder, or in --storage.")
@click.option("--overwrite", is_flag=True, help="Delete the study in the output folder and start again.")
@click.option(
    "--storage",
    metavar="URL",
    help="Optuna storage to share with other machines.",
    show_default="a journal file in the output folder",
)
@click.option("--study-name", default="kvtuner", help="Study within the storage.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    help="Processes that share the trials on this machine.",
)
@click.option("--join", is_flag=True, hidden=True, help="Work on the study's trials and write nothing.")
@click.option("--parent", type=int, hidden=True, help="Pipe of the process that started this one to join.")
@quiet_option
def command(**options: Any) -> None:
    """Search per-layer key and value bit-widths, and write a profile for each budget, with a report.

    The quantized cache is scored by teacher forcing, with attention reading every key and value as stored. The setting is chosen on one
    held-out split and measured once on another.
    """
    # Both before torch is imported; that may take longer than somebody waits who resumes a run that was killed.
    if (pipe := options.pop("parent")) is not None:
        end_with(pipe)
    threads.limit_threads()
    from kvtuner_search.calibration.options import CalibrationOptions
    from kvtuner_search.calibration.session import CalibrationSession, calibrate

    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other: one keeps the study, the other deletes it")
    if options["max_loss"] is not None and options["target_bits"]:
        raise UsageError("--max-loss and --target-bits exclude each other: give a bound on the loss, or budgets")
    session = CalibrationSession(
        output=options.pop("output"),
        name=options.pop("name"),
        resume=options.pop("resume"),
        overwrite=options.pop("overwrite"),
        storage=options.pop("storage") or None,
        study_name=options.pop("study_name"),
        workers=options.pop("workers"),
        join=options.pop("join"),
        quiet=options.pop("quiet"),
        arguments=tuple(sys.argv[1:]),
    )
    options["target_bits"] = options["target_bits"] or (() if options["max_loss"] is not None else (4.0,))
    with kill_as_interrupt():
        calibrate(CalibrationOptions(model=loading(options), **options), session, _publish)


def _publish(record: CalibrationRecord, folder: Path) -> list[Path]:
    """Write the report and print its summary; returns the files written."""
    from kvtuner_search.files import write_atomic
    from kvtuner_search.report.calibration_html import render
    from kvtuner_search.report.terminal import print_summary

    report = folder / "report.html"
    write_atomic(report, render(record))
    print_summary(record)
    return [report]
