"""``kvtuner-search export``: a profile as another tool's settings."""

from __future__ import annotations

from pathlib import Path

import click

from kvtuner_search.cli.import_ import report_losses
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.convert import FORMATS
from kvtuner_search.profile.convert.base import kinds_notes
from kvtuner_search.profile.source import load_from


@click.command(
    "export",
    epilog="Exit codes: 0 written, 1 something would be lost and --allow-lossy is not given, 2 usage, 3 unreadable or invalid profile.",
)
@click.argument("profile")
@click.option("--to", "target", type=click.Choice(tuple(FORMATS)), required=True, help="Format to write.")
@click.option("--allow-lossy", is_flag=True, help="Write it even if the format cannot express all of PROFILE.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="File to write.",
    show_default="standard output",
)
def command(profile: str, target: str, allow_lossy: bool, output: Path | None) -> None:
    """Write PROFILE in another format. Settings that it cannot express are listed, and refused without --allow-lossy."""
    loaded = load_from(profile)
    result = FORMATS[target].write(loaded)
    report_losses(result.lost, [*result.notes, *kinds_notes(loaded)], allow_lossy, target)
    if output is None:
        click.echo(result.text, nl=False)
    else:
        write_atomic(output, result.text)
