"""``kvtuner-search bench``: a run, and what is done with its record. Without a subcommand it is ``bench run``."""

from __future__ import annotations

from typing import Final

import click

from kvtuner_search.cli.lazy import LazyGroup
from kvtuner_search.cli.run_options import CONTEXT

RUN: Final = "run"
SUBCOMMANDS: Final[dict[str, tuple[str, str]]] = {
    RUN: ("kvtuner_search.cli.bench_run", "Measure a server; needs no name: bench [OPTIONS] [-- SGLANG OPTIONS]."),
    "check": (
        "kvtuner_search.cli.bench_check",
        "Check a record, or the adapter's report, for impossible figures.",
    ),
    "compare": ("kvtuner_search.cli.bench_compare", "Compare two records, cell by cell, with intervals."),
    "report": ("kvtuner_search.cli.bench_report", "Write one HTML report of several records."),
    "ablate": (
        "kvtuner_search.cli.bench_ablate",
        "Measure the adapter's ablations: quality offline, speed on a server.",
    ),
}

EXIT_CODES: Final = (
    "Exit codes of a run: 0 a result within its objectives, 1 a check failed, a figure is impossible, an answer was not as requested,"
    " or an objective is missed, 2 usage, 3 unreadable or invalid input, 4 a profile of another model, 5 a server could"
    " not be started or queried (what was measured is kept: --resume), 130 interrupted."
)


class BenchGroup(LazyGroup):
    """Arguments that do not begin with a subcommand's name belong to ``run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert ``run`` if no subcommand is named."""
        if not args or (args[0] not in self.modules and args[0] not in ctx.help_option_names):
            args = [RUN, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of ``run``, then the subcommands."""
        run = self.get_command(ctx, RUN)
        assert run is not None
        with click.Context(run, info_name=RUN, parent=ctx, **run.context_settings) as inner:
            click.Command.format_options(run, inner, formatter)
        self.format_commands(ctx, formatter)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both ways to call it."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] [-- SGLANG OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")


command = BenchGroup(
    "bench",
    modules=SUBCOMMANDS,
    context_settings={**CONTEXT, "auto_envvar_prefix": "KVTUNER_BENCH"},
    help="Measure a server: time to first token (TTFT) by prompt length, throughput by concurrency, long sequences, batches, memory"
    " stress, token capacity. Only tokens that the server returned count, and a figure that the hardware cannot reach is not a result."
    " docs/bench.md says how and why.",
    epilog=EXIT_CODES,
)
