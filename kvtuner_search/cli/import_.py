"""``kvtuner-search import``: a profile from another tool's settings."""

from __future__ import annotations

import re
from pathlib import Path

import click

from kvtuner_search import __version__
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.build import build
from kvtuner_search.profile.canonical import dumps, read_limited
from kvtuner_search.profile.convert import FORMATS
from kvtuner_search.profile.convert.base import MAX_SOURCE, LossyError, Source, parse
from kvtuner_search.profile.convert.kvtuner import SCHEMES
from kvtuner_search.profile.fields import MAX_NOTES
from kvtuner_search.profile.model_support import read_supported
from kvtuner_search.profile.schema import NAME_PATTERN, Provenance
from kvtuner_search.profile.text import bounded, printable


@click.command(
    "import",
    epilog="Exit codes: 0 written, 1 something would be lost and --allow-lossy is not given, 2 usage, 3 unreadable or invalid input.",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source_format",
    type=click.Choice(tuple(FORMATS)),
    required=True,
    help="Format of FILE.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="The model's folder, or its config.json.",
)
@click.option("--scheme", type=click.Choice(SCHEMES), help="How a kvtuner preset applies its bits.")
@click.option("--model-id", help="Id of the model.", show_default="its folder's name")
@click.option("--revision", help="Revision of the model.")
@click.option("--name", help="Name of the profile.", show_default="from FILE")
@click.option("--allow-lossy", is_flag=True, help="Write it even if a profile cannot express all of FILE.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="File to write.",
    show_default="standard output",
)
def command(
    file: Path,
    source_format: str,
    model: Path,
    scheme: str | None,
    model_id: str | None,
    revision: str | None,
    name: str | None,
    allow_lossy: bool,
    output: Path | None,
) -> None:
    """Make a profile from FILE. Settings that a profile cannot express are listed, and refused without --allow-lossy."""
    if scheme is not None and source_format != "kvtuner":
        raise click.UsageError(f"--scheme is for --from kvtuner: {source_format} itself says how bits are applied")
    if name is not None and not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise click.UsageError(
            f"--name {name!r} is not a profile name: use letters, digits, dots, dashes and underscores"
        )
    info = read_supported(model, model_id, revision)
    content = parse(read_limited(file, f"a {source_format} file", MAX_SOURCE), str(file))
    result = FORMATS[source_format].read(Source(printable(file.name), content, info, scheme))
    report_losses(result.lost, result.notes, allow_lossy, "a profile")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:128]
    how = f", scheme {scheme}" if scheme else ""
    provenance = Provenance(
        origin="imported",
        source=f"{source_format} file {printable(file.name)[:256]}{how}",
        tool=f"kvtuner-search {__version__}",
        notes=bounded(["Not validated here.", *(f"Lost in the import: {line}" for line in result.lost)], MAX_NOTES),
    )
    profile = build(name if name is not None else stem or "imported", result.layers, info, provenance)
    if output is None:
        click.echo(dumps(profile), nl=False)
    else:
        write_atomic(output, dumps(profile))


def report_losses(lost: list[str], notes: list[str], allowed: bool, target: str) -> None:
    """List losses and notes on stderr.

    Raises:
        LossyError: if something is lost and that is not allowed.
    """
    for line in lost:
        click.echo(f"lost: {printable(line)}", err=True)
    for line in notes:
        click.echo(f"note: {printable(line)}", err=True)
    if lost and not allowed:
        raise LossyError(f"{target} cannot express {len(lost)} of these settings: accept that with --allow-lossy")
