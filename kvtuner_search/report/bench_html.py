"""Benchmark records as one self-contained page: inline style and SVG, no script, nothing fetched, all text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from kvtuner_search.bench.claims import AdapterReport
from kvtuner_search.bench.compare import layout_text
from kvtuner_search.bench.judge import split_causes
from kvtuner_search.bench.record import Record, Violation
from kvtuner_search.profile.text import signed
from kvtuner_search.report import page
from kvtuner_search.report.bench_claims import CLAIMED, IMPOSSIBLE, ClaimedTables, tables
from kvtuner_search.report.bench_figures import CLAIMED_SHAPE, STYLE, key, run_class, run_shape, zone_key
from kvtuner_search.report.bench_panels import drawings
from kvtuner_search.report.bench_tables import (
    GATE_HEADS,
    Grid,
    ReportedRun,
    engine_title,
    figure,
    gate_rows,
    grids,
    machine,
    runs,
)
from kvtuner_search.report.svg import escaped
from kvtuner_search.secrets import mask, mask_arguments

VIOLATION_HEADS: Final = ("rule", "where", "figure", "why it is impossible")


def report(records: Sequence[Record], adapter: AdapterReport | None = None) -> str:
    """The page of one or more records, beside the adapter's report if that is given.

    Args:
        records: at least one; of one model, or the page compares what cannot be compared.
        adapter: the report to put beside them.
    """
    all_runs, claims = runs(records), tables(adapter) if adapter else None
    title = f"Benchmark of {', '.join(dict.fromkeys(record.model.name for record in records))}"
    sections: list[tuple[str, str, Iterable[str]]] = [("runs", "Runs", _runs(all_runs))]
    for grid in grids(all_runs, claims):
        sections.append((grid.id, grid.heading, _section(grid, all_runs, claims)))
    if any(run.record.gates for run in all_runs):
        sections.append(("gates", "Objectives", _gates(all_runs)))
    if claims and (claims.violations or claims.remarks):
        sections.append(("impossible", "Impossible claims of the adapter's report", _impossible_claims(claims)))
    if any(run.record.quality for run in all_runs):
        sections.append(("quality", "Quality against the 16-bit cache", _quality(all_runs)))
    sections.append(("details", "How it was measured", _details(all_runs)))
    return page.page(title, _header(title, all_runs, claims), sections, STYLE)


def _header(title: str, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> list[str]:
    parts = [f"<h1>{escaped(title)}</h1>"]
    hardware = dict.fromkeys(machine(run.record) for run in all_runs)
    parts.append(f"<p>{escaped(' · '.join(hardware))}</p>")
    dates = sorted({run.record.created for run in all_runs})
    shown = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    parts.append(
        f"<p class=dim>{escaped(shown)}, preset {escaped(', '.join(sorted({r.record.preset for r in all_runs})))}</p>"
    )
    if any(run.record.model.dummy_weights for run in all_runs):
        parts.append(
            '<p class="warn">Random weights (<code>--load-format dummy</code>): times are meaningful, answers and quality are not.</p>'
        )
    bad = [run for run in all_runs if run.record.violations or not run.record.correct]
    for run in bad:
        parts.append(
            f'<p class="warn"><span class=bad>No result:</span> {escaped(run.name)}: {escaped(_why(run.record))}</p>'
        )
    if claims:
        others = [run for run in all_runs if run.record.model.name != claims.report.model]
        other = " It is of another model than ours, so rows do not compare." if others else ""
        text = f"Beside it the adapter's report, {claims.title}: claims, not measurements of this project.{other}"
        parts.append(f"<p>{escaped(text)} {_verdict_of(claims)}</p>")
    parts.append(_legend(all_runs, claims))
    return parts


def _verdict_of(claims: ClaimedTables) -> str:
    if not claims.violations:
        return ""
    return f'<a href="#impossible">{len(claims.violations)} of its figures are impossible.</a>'


def _why(record: Record) -> str:
    failed = [check.name for check in record.correctness if not check.passed]
    if failed:
        return f"the correctness check failed ({', '.join(failed)}), so no speed was kept"
    first = record.violations[0]
    more = f", and {len(record.violations) - 1} more" if len(record.violations) > 1 else ""
    return f"{first.rule} at {first.where}: {first.figure}{more}"


def _legend(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> str:
    entries = [(key(run_class(i), run_shape(i)), run.name) for i, run in enumerate(all_runs)]
    if any(cell.floor for run in all_runs for cell in run.record.cells):
        entries.append((zone_key("floor"), "impossible on this hardware"))
    if claims:
        entries.append((key(CLAIMED, CLAIMED_SHAPE), "the adapter's claim, ringed where it is impossible"))
        if any(cell.floor for cell in claims.cells):
            entries.append((zone_key("claimedfloor"), "impossible on the adapter's hardware"))
    return page.legend("", entries)


def _runs(all_runs: Sequence[ReportedRun]) -> Iterator[str]:
    for run in all_runs:
        record = run.record
        yield f"<h3>{escaped(run.name)} {_badge(record)}</h3>"
        whole = sum(cell.succeeded for cell in record.cells)
        asked = sum(cell.shape.requests for cell in record.cells)
        peak = max((c.speed.output_tokens_per_second for c in record.cells if c.speed), default=None)
        first = [c.speed.ttft.mean for c in record.cells if c.section == "ttft" and c.speed and c.speed.ttft]
        yield page.figures(
            [
                (
                    f"{record.cache.effective_bits:.3f}",
                    f"effective bits, {record.cache.bytes_per_token:,} bytes per token",
                ),
                (f"{record.served.token_capacity:,}", "tokens that the cache holds"),
                (figure(peak), "output tokens/s at most"),
                (f"{figure(min(first, default=None))} ms", "mean TTFT of the fastest prompt length"),
                (f"{whole:,} of {asked:,}", "requests with a whole answer"),
            ]
        )
        yield page.table(("check", "holds", "what was seen"), [(c.name, "yes" if c.passed else "NO", c.detail) for c in record.correctness])  # fmt: skip
        failures = [(cell.title, kind, f"{count:,}") for cell in record.cells for kind, count in cell.failures.items()]
        if failures:
            yield page.table(("cell", "failure", "requests"), failures, right=(2,))
        if record.violations:
            yield "<p class=bad>Why this is not a result:</p>"
            yield page.table(VIOLATION_HEADS, [_violation(v) for v in record.violations])


def _badge(record: Record) -> str:
    if not record.correct or record.violations:
        return '<span class="bad badge">✗ no result</span>'
    if not all(gate.passed for gate in record.gates):
        return '<span class="bad badge">✗ misses an objective</span>'
    return '<span class="good badge">✓ passed</span>'


def _violation(violation: Violation) -> tuple[str, str, str, str]:
    return violation.rule, violation.where, violation.figure, violation.reason


def _section(grid: Grid, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Iterator[str]:
    panels = drawings(grid.id, all_runs, claims)
    if panels:
        yield '<div class="panels">' + "".join(page.figure(panel, "") for panel in panels) + "</div>"
    table = f'<div class="cells">{page.table(grid.heads, grid.rows, right=grid.right, kinds=_kinds(grid))}</div>'
    yield page.fold("All figures of the grid", table) if grid.id == "long" else table
    if grid.note:
        yield f"<p class=dim>{escaped(grid.note)}</p>"


def _kinds(grid: Grid) -> dict[int, str]:
    """Claimed rows, and rows with a figure that cannot be, stand out."""
    found = {}
    for index, row in enumerate(grid.rows):
        kinds = ["claim"] if CLAIMED in row else []
        kinds += ["bad"] if any(IMPOSSIBLE in cell for cell in row) else []
        if kinds:
            found[index] = " ".join(kinds)
    return found


def _gates(all_runs: Sequence[ReportedRun]) -> Iterator[str]:
    rows = [(run.name, *row) for run in all_runs for row in gate_rows(run.record.gates)]
    yield page.table(("run", *GATE_HEADS), rows, right=(2, 3))
    yield "<p class=dim>Each is judged on its worst cell.</p>"


def _impossible_claims(claims: ClaimedTables) -> Iterator[str]:
    """What is wrong with each figure; what usually causes it is said once."""
    causes: dict[str, None] = {}
    rows = []
    for violation in claims.violations:
        why, usual = split_causes(violation.reason)
        causes |= dict.fromkeys(usual.split("; ") if usual else ())
        rows.append((violation.rule, violation.where, violation.figure, why))
    if rows:
        yield page.table(VIOLATION_HEADS, rows)
    for heading, lines in (("Usual causes", list(causes)), ("Not judged", claims.remarks)):
        if lines:
            yield f"<h3>{heading}</h3><ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>"


def _quality(all_runs: Sequence[ReportedRun]) -> Iterator[str]:
    rows = [
        (
            run.name,
            f"{m.metric}, {m.data}, {m.split} split",
            f"{m.baseline:.6g}",
            f"{m.value:.6g}",
            signed(m.delta),
            f"[{signed(m.ci_low)}, {signed(m.ci_high)}] at {m.confidence:.0%}",
            f"{m.samples:,}",
        )
        for run in all_runs
        for m in run.record.quality
    ]
    yield page.table(
        ("run", "measure", "16 bits", "this cache", "change", "interval", "samples"), rows, right=range(2, 7)
    )


def _details(all_runs: Sequence[ReportedRun]) -> Iterator[str]:
    for run in all_runs:
        record = run.record
        yield f"<h3>{escaped(run.name)}</h3>"
        yield f"<p><code>{escaped(mask(record.command))}</code></p>"
        yield page.table(("", ""), fact_rows(record))
        if record.cross_check:
            rows = [(name, figure(value)) for name, value in sorted(record.cross_check.items())]
            yield page.table(
                (f"the same load through {engine_title(record)}'s own client", "ours over theirs"), rows, right=(1,)
            )
        if record.scrapes:
            rows_ = [
                (s.name, f"{s.samples:,}", figure(s.minimum), figure(s.maximum), figure(s.last)) for s in record.scrapes
            ]
            heads = ("series", "readings", "least", "greatest", "last")
            yield page.fold("The server's own metrics", page.table(heads, rows_, right=(1, 2, 3, 4)))


def fact_rows(record: Record) -> list[tuple[str, str]]:
    """Environment, server and cache as (what, text)."""
    environment, served, cache = record.environment, record.served, record.cache
    hardware, cells = environment.hardware, record.cells
    rows = [("hardware", machine(record))]
    if hardware:
        memory = f", {hardware.memory / 2**30:.4g} GiB" if hardware.memory else ""
        rates = f"{hardware.bandwidth / 1e12:.4g} TB/s, {hardware.flops / 1e12:.4g} TFLOP/s dense{memory} each"
        rows.append(("for the floors", f"{rates}; {hardware.source}"))
    origin = "started by this run" if served.started else "pointed at"
    prefix = f"prefix cache {'on' if served.prefix_cache else 'off'}"
    cached, prompts = sum(cell.cached_tokens for cell in cells), sum(cell.prompt_tokens for cell in cells)
    weights = f"{served.quantization or 'not quantized'}{', random' if record.model.dummy_weights else ''}"
    rows += [
        ("client", environment.client),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(environment.versions.items()))),
        ("layout", layout_text(record)),
        (
            "server",
            f"{served.attention_backend} attention, {served.dtype}, page size {served.page_size}, {prefix}, {origin}",
        ),
        ("arguments", " ".join(mask_arguments(served.arguments))),
        ("weights", weights),
        ("speculation", f"{served.speculative}, {served.draft_tokens} tokens a step" if served.speculative else ""),
        ("profile", f"{cache.profile} {cache.digest or ''}".strip()),
        ("cached prompt tokens", f"{cached:,} of {prompts:,}"),
    ]
    return [row for row in rows if row[1]]
