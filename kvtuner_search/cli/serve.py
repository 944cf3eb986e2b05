"""``kvtuner-search serve``: an engine's server that stores its KV cache as a profile says."""

from __future__ import annotations

import click

from kvtuner_search.cli.options import json_option, size_callback
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.serving.engine import engine

ENGINE = engine()


class _Serve(click.Command):
    """Lists the options that are not click's: the adapter's flags, and the engine's that are of most use."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        rows = []
        for flag in ENGINE.FLAGS:
            if flag.name not in (ENGINE.PROFILE, ENGINE.AS_STORED):  # click lists these
                choices = "" if flag.choices is None else "|".join(map(str, flag.choices))
                value = f"[{choices}]" if choices else f"[{flag.metavar}]" if flag.bare is not None else flag.metavar
                rows.append((f"{flag.name} {value}".rstrip(), flag.help))
        if rows:
            with formatter.section("Instead of a profile, the same for all layers"):
                formatter.write_dl(rows)
        with formatter.section(f"Any option of {ENGINE.TITLE}, passed on unchanged; for instance"):
            formatter.write_dl(list(ENGINE.EXAMPLES))


@click.command(
    "serve",
    cls=_Serve,
    context_settings={"ignore_unknown_options": True},
    options_metavar=f"--profile FILE {ENGINE.EXAMPLES[0][0]} [OPTIONS] [{ENGINE.TITLE.upper()} OPTIONS]",
    help=f"Serve a model with {ENGINE.TITLE} and store its KV cache packed as a profile says.\n\n"
    "Checks the profile against the model and prints bits per layer, bytes per token and predicted capacity before"
    f" {ENGINE.TITLE} starts. {ENGINE.TITLE}'s own help: {' '.join(ENGINE.command('python', ['--help']))}.",
    epilog="Exit codes: before the server starts 2 usage, 3 unreadable or invalid input, 4 a profile of another model, 5 no usable"
    f" {ENGINE.TITLE}, 130 interrupted; then {ENGINE.TITLE}'s own, and 128 + N if signal N ended it.",
)
@click.option("--profile", ENGINE.PROFILE, metavar="FILE", help="How each layer is stored.")
@click.option(
    ENGINE.AS_STORED, "as_stored", is_flag=True,
    help="Read a prompt's own keys and values as stored too, as decode does: for measuring; slower.",
)  # fmt: skip
@click.option(
    "--gpu-memory", metavar="SIZE", callback=size_callback,
    help="Memory of one GPU, e.g. 80GiB, to predict the capacity.", show_default="free now, by nvidia-smi",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help=f"Print the plan and stop; {ENGINE.TITLE} need not be installed.")
@json_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="")
def command(
    profile: str | None,
    as_stored: bool,
    gpu_memory: int | None,
    dry_run: bool,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Plan the server, then become it."""
    plan, server_arguments = ENGINE.prepare(arguments, profile, as_stored, gpu_memory)
    if not dry_run:
        ENGINE.check_installation(plan)
    if as_json:
        click.echo(canonical_json(ENGINE.plan_json(plan)), nl=False)
    else:
        click.echo(ENGINE.plan_text(plan), nl=False, err=not dry_run)
    if not dry_run:
        ENGINE.start(plan, server_arguments)
