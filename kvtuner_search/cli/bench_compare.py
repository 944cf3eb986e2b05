"""``kvtuner-search bench compare``: two records, cell by cell."""

from __future__ import annotations

from pathlib import Path

import click

from kvtuner_search.cli.bench_report import claims_option, read_claims
from kvtuner_search.cli.options import json_option


@click.command(
    "compare",
    epilog="Exit codes: 0 compared, whatever the ratios, 2 usage, 3 unreadable or invalid record, 4 not comparable: another model or"
    " preset, no cell in common, or a record that is not a result.",
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@claims_option
@json_option
def command(a: Path, b: Path, claims: Path | None, as_json: bool) -> None:
    """Compare record B with record A: the ratio B / A of each figure of each cell, with its confidence interval.

    Intervals come from the raw requests if requests.jsonl lies beside both records, else from the summaries, which is rough. Differences
    in environment are listed; if the layouts differ, so is single node against distributed. docs/bench-records.md says how.
    """
    from kvtuner_search.bench import files
    from kvtuner_search.bench.compare import compare, to_json
    from kvtuner_search.profile.canonical import canonical_json

    adapter = read_claims(claims)
    found = compare(files.read(a), files.read(b), (a, b))
    if as_json:
        click.echo(canonical_json(to_json(found)), nl=False)
        return
    from kvtuner_search.profile.terminal import console
    from kvtuner_search.report.bench_terminal import print_comparison

    print_comparison(console(), found, adapter)
