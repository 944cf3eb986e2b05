"""Benchmark records and comparisons for the terminal. Text from files is never read as markup."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtuner_search.bench.claims import AdapterReport
from kvtuner_search.bench.compare import ComparedFigure, RecordComparison, layout_text
from kvtuner_search.bench.intervals import CONFIDENCE, MIN_BLOCKS
from kvtuner_search.bench.judge import split_causes
from kvtuner_search.bench.record import SECTIONS, Record
from kvtuner_search.profile.text import printable
from kvtuner_search.report.bench_claims import IMPOSSIBLE, NONE, tables
from kvtuner_search.report.bench_tables import (
    GATE_HEADS,
    HEADINGS,
    Grid,
    ReportedRun,
    engine_title,
    figure,
    gate_rows,
    grids,
    layouts,
    machine,
    runs,
)

_RUN: Final = "run"
_VERDICT_STYLE: Final = {"better": "green", "worse": "red", "undecided": "yellow", "unjudged": "dim"}


def print_record(out: Console, record: Record, adapter: AdapterReport | None = None) -> None:
    """One record: what it is of, its tables with floors, why it is no result if it is none, its objectives, its verdict."""
    print_records(out, [record], adapter)


def print_records(out: Console, records: Sequence[Record], adapter: AdapterReport | None = None) -> None:
    """Several records side by side, and the adapter's tables beside them if given; at least one."""
    named = runs(records)
    many = len(named) > 1
    all_runs = [ReportedRun(f"#{index + 1}", run.record) for index, run in enumerate(named)] if many else named
    for run, short in zip(named, all_runs, strict=True):
        record, cache, served = run.record, run.record.cache, run.record.served
        mark = f"{short.name}  " if many else ""
        out.print(Text.assemble(mark, (printable(record.model.name), "bold"), f"  {printable(run.name)}"))
        out.print(
            f"{printable(machine(record))}, {layout_text(record)}, {engine_title(record)} {printable(served.version)}"
        )
        out.print(
            f"{cache.effective_bits:.3f} effective bits, {served.token_capacity:,} tokens fit, preset {record.preset}"
        )
        if record.model.dummy_weights:
            out.print("random weights: times are meaningful, answers are not", style="yellow")
        out.print()
    claims = tables(adapter) if adapter else None
    for grid in grids(all_runs, claims):
        out.print(Text(grid.heading, "bold"))
        if many or claims or _RUN not in grid.heads:
            _print(out, grid.heads, grid.rows, grid.right)
        else:
            _print(out, *_without(list(grid.heads).index(_RUN), grid))
        if grid.note:
            out.print(printable(grid.note), style="dim")
        out.print()
    if claims:
        text = f"{len(claims.violations)} of the adapter's figures are impossible: `kvtuner-search bench check` of its file says why"
        out.print(f"{text}\n", style="bold red" if claims.violations else "dim")
    for run in all_runs:
        _judged(out, run.record, run.name if many else "")


def _without(column: int, grid: Grid) -> tuple[list[str], list[list[str]], set[int]]:
    """Heads, rows and columns of figures of a table without a column: a single run needs no name in every row."""
    heads, *rows = [[cell for i, cell in enumerate(row) if i != column] for row in (grid.heads, *grid.rows)]
    return heads, rows, {i - (i > column) for i in grid.right if i != column}


def _judged(out: Console, record: Record, name: str) -> None:
    """Checks that failed, requests that failed, violations, objectives, and the verdict."""
    prefix = f"{printable(name)}: " if name else ""
    failed = [(check.name, check.detail) for check in record.correctness if not check.passed]
    if failed:
        out.print(Text(f"{prefix}correctness checks that failed, so no speed was kept", "bold red"))
        _print(out, ("check", "what was seen"), failed, ())
    lost = [(cell.title, kind, f"{count:,}") for cell in record.cells for kind, count in cell.failures.items()]
    if lost:
        out.print(Text(f"{prefix}requests that failed, which are not samples", "bold"))
        _print(out, ("cell", "failure", "requests"), lost, (2,))
    if record.violations:
        out.print(Text(f"{prefix}why this is not a result", "bold red"))
        rows = [(v.rule, v.where, v.figure, split_causes(v.reason)[0]) for v in record.violations]
        _print(out, ("rule", "where", "figure", "why"), rows, ())
        causes = dict.fromkeys(c for v in record.violations for c in split_causes(v.reason)[1].split("; ") if c)
        for cause in causes:
            out.print(f"  usual cause: {printable(cause)}")
    if record.gates:
        out.print(Text(f"{prefix}objectives", "bold"))
        _print(out, GATE_HEADS, gate_rows(record.gates), (1, 2))
    verdict, style = _verdict(record)
    out.print(Text.assemble(f"{prefix}verdict: ", (verdict, style)))


def _verdict(record: Record) -> tuple[str, str]:
    if not record.correct or record.violations:
        return "no result", "bold red"
    missed = [gate.name for gate in record.gates if not gate.passed]
    return (f"misses {', '.join(missed)}", "bold red") if missed else ("pass", "bold green")


def print_comparison(out: Console, found: RecordComparison, adapter: AdapterReport | None = None) -> None:
    """Two records: what differs, the ratio of each figure, and single node against distributed where layouts differ."""
    names = [f"{printable(r.cache.profile)}, {layout_text(r)}, {printable(r.created)}" for r in (found.a, found.b)]
    out.print(Text.assemble((printable(found.a.model.name), "bold"), f"  preset {printable(found.a.preset)}"))
    out.print(f"  A  {names[0]}\n  B  {names[1]}\n")
    if found.differences:
        rows = [("warning" if d.warn else "", d.what, d.a, d.b) for d in found.differences]
        _print(out, ("", "differs", "A", "B"), rows, ())
        out.print()
    for section in SECTIONS:
        rows_ = [row for row in found.rows if row.section == section]
        if rows_:
            out.print(Text(HEADINGS[section], "bold"))
            _ratios(out, rows_)
            out.print()
    tokens = [f"{record.served.token_capacity:,}" for record in (found.a, found.b)]
    out.print(f"tokens that fit: A {tokens[0]}, B {tokens[1]}: {found.capacity:.3f} times\n")
    if found.layouts_differ:
        grid = layouts(runs([found.a, found.b]), tables(adapter) if adapter else None)
        if grid is not None:
            out.print(Text(grid.heading, "bold"))
            _print(out, grid.heads, grid.rows, grid.right)
            out.print()
    if found.unpaired:
        out.print(f"not compared, because only one has speed for them: {'; '.join(map(printable, found.unpaired))}\n")
    out.print(_basis(found.rows), style="dim")


def _basis(rows: Sequence[ComparedFigure]) -> str:
    """The source of the intervals and what they do not cover."""
    used = {row.ratio.basis for row in rows}
    parts = [
        f"Ratios are B over A, intervals at {CONFIDENCE:.0%} by bootstrap over blocks of requests that were in flight together."
    ]
    if "summaries" in used:
        parts.append("(s): from the summaries, because the raw requests of both are not beside the records: rough.")
    if "none" in used:
        parts.append(f"No interval: fewer than {MIN_BLOCKS} blocks.")
    parts.append("They cover the scatter within these two runs, not the variation from one server start to the next.")
    return " ".join(parts)


def _ratios(out: Console, rows: Sequence[ComparedFigure]) -> None:
    table = _table(("cell", "figure", "A", "B", "B / A", "interval", "requests", "B is"), (2, 3, 4, 5, 6))
    for row in rows:
        interval = NONE
        if row.ratio.interval:
            mark = " (s)" if row.ratio.basis == "summaries" else ""
            interval = f"[{row.ratio.interval.low:.3f}, {row.ratio.interval.high:.3f}]{mark}"
        samples = "/".join(f"{count:,}" for count in dict.fromkeys(row.ratio.samples))
        cells = (row.cell.partition(" ")[2], f"{row.metric}, {row.unit}", figure(row.a), figure(row.b))
        verdict = Text(row.verdict, _VERDICT_STYLE[row.verdict])
        table.add_row(*cells, f"{row.ratio.value:.3f}", interval, samples, verdict)
    out.print(table)


def _print(out: Console, heads: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int]) -> None:
    rows = [[printable(cell) for cell in row] for row in rows]
    table = _table(heads, right, [max((len(row[i]) for row in rows), default=0) for i in range(len(heads))])
    for row in rows:
        style = "red" if any(IMPOSSIBLE in cell for cell in row) else ""
        table.add_row(*map(Text, row), style=style)
    out.print(table)


def _table(heads: Sequence[str], right: Collection[int], widths: Sequence[int] | None = None) -> Table:
    """``widths``: of the longest cell of each column. Figures are never broken; their heads wrap to the width that they need."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_edge=False)
    for index, head in enumerate(heads):
        if index in right:
            width = max(widths[index] if widths else 0, *(len(word) for word in head.split()), 1)
            table.add_column(Text(textwrap.fill(head, width)), justify="right", no_wrap=True)
        else:
            table.add_column(Text(head), overflow="fold", no_wrap=head == _RUN)
    return table
