"""``kvtuner-search bench report``: records as tables, or as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvtuner_search.bench.claims import AdapterReport

claims_option = click.option(
    "--claims",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A test report as JSON, to show beside ours: its claims, the floors of its hardware, and which claims are impossible.",
)


def read_claims(path: Path | None) -> AdapterReport | None:
    """The report after ``--claims``.

    Raises:
        DataError: if it cannot be read, or is not such a report.
    """
    if path is None:
        return None
    from kvtuner_search.bench.claims import parse
    from kvtuner_search.profile.canonical import parse_json, read_limited

    source = str(path)
    return parse(parse_json(read_limited(path, "a test report"), source, "test report"), source)


@click.command(
    "report",
    epilog="Exit codes: 0 written or shown, whatever the records say, 2 usage, 3 unreadable or invalid input.",
)
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one self-contained page instead of tables.",
)
@claims_option
def command(records: tuple[Path, ...], html: Path | None, claims: Path | None) -> None:
    """Show RECORDS of `bench` side by side, each table with its floors: in the terminal, or as one HTML page.

    A record that is not a result is shown as such. docs/bench-records.md describes the page.
    """
    from kvtuner_search.bench import files

    loaded = [files.read(path) for path in records]
    adapter = read_claims(claims)
    if html is None:
        from kvtuner_search.profile.terminal import console
        from kvtuner_search.report.bench_terminal import print_records

        print_records(console(), loaded, adapter)
        return
    from kvtuner_search.files import write_atomic
    from kvtuner_search.report.bench_html import report

    write_atomic(html, report(loaded, adapter))
    click.echo(f"wrote {html}", err=True)
