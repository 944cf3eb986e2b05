"""The adapter's report as rows beside ours: its claims, the floors of the hardware that it names, and which claims cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvtuner_search.bench.claims import AdapterReport, judge, setup_of
from kvtuner_search.bench.floors import Setup, floor_of
from kvtuner_search.bench.record import Floor, Section, Shape, Violation
from kvtuner_search.errors import DataError

CLAIMED: Final = "claimed"
NONE: Final = "–"
IMPOSSIBLE: Final = "impossible"
_COLUMNS: Final = (("single_tp2", "TP=2"), ("tp2_pp2", "TP=2 x PP=2"))


@dataclass(frozen=True)
class ClaimedCell:
    """One row of one of the adapter's tables."""

    section: Section
    key: tuple[int, ...]  # as bench_tables.key_of
    figures: Mapping[str, float | None]  # ms, fractions and rates, by what the tables call them
    floor: Floor | None  # of the adapter's own hardware; None where that is unknown
    impossible: frozenset[str]  # the figures that cannot be


@dataclass(frozen=True)
class ClaimedTables:
    """All of the adapter's tables, and what is wrong with them."""

    report: AdapterReport
    title: str  # model and hardware
    cells: Sequence[ClaimedCell]
    violations: Sequence[Violation]
    remarks: Sequence[str]  # figures that show less than they seem to

    def claimed(self, text: str, where: str, kind: str) -> str:
        """The text of a figure, marked if a violation of this kind says that it is impossible."""
        wrong = text != NONE and any(v.where == where and kind in v.figure for v in self.violations)
        return f"{text}, {IMPOSSIBLE}" if wrong else text


def tables(report: AdapterReport) -> ClaimedTables:
    """The report's rows, judged against the hardware that it names; without floors where that is unknown."""
    machine = report.hardware
    title = f"{report.model} on {machine.gpus} x {machine.gpu}, TP={report.parallel.tp} x PP={report.parallel.pp}"
    try:
        setup = setup_of(report)
    except DataError as error:
        return ClaimedTables(report, title, list(_cells(report, None, {})), [], [f"no floors: {error}"])
    verdict = judge(report, setup)
    found: dict[str, list[str]] = {}
    for violation in verdict.violations:
        found.setdefault(violation.where, []).append(violation.figure)
    cells = list(_cells(report, setup, found))
    return ClaimedTables(report, title, cells, verdict.violations, verdict.remarks)


def _cells(report: AdapterReport, setup: Setup | None, bad: Mapping[str, Sequence[str]]) -> Iterator[ClaimedCell]:
    """``bad``: where, as claims.judge words it -> figures that cannot be."""

    def floor(prompt: int = 1, answer: int = 1, at_once: int = 1) -> Floor | None:
        shape = Shape(requests=at_once, concurrency=at_once, input_tokens=prompt, output_tokens=answer)
        return floor_of(setup, shape) if setup else None

    def impossible(where: str, **units: str) -> frozenset[str]:
        """Names of the figures whose unit or kind a violation there bears."""
        return frozenset(name for name, unit in units.items() if any(unit in figure for figure in bad.get(where, ())))

    figures: dict[str, float | None]
    for t in report.ttft_ms:
        figures = {"mean": t.mean, "minimum": t.min, "maximum": t.max}
        wrong = impossible(f"ttft of {t.prompt_tokens} tokens", mean="mean", minimum="min", maximum="max")
        yield ClaimedCell("ttft", (t.prompt_tokens,), figures, floor(t.prompt_tokens), wrong)
    for r in report.throughput:
        figures = {"rate": r.req_per_s, "latency": r.mean_latency_ms, "success": r.success}
        wrong = impossible(f"throughput, {r.concurrency} at a time", rate="requests/s", latency="latency")
        yield ClaimedCell("throughput", (r.concurrency,), figures, floor(at_once=r.concurrency), wrong)
    for g in report.long_sequence:
        figures = {"latency": g.latency_ms, "tokens": g.tok_per_s}
        wrong = impossible(f"long sequence, {g.input} in, {g.output} out", tokens="tokens/s", latency="latency")
        yield ClaimedCell("long", (g.input, g.output), figures, floor(g.input, g.output), wrong)
    for b in report.batch:
        figures = {"rate": b.req_per_s, "latency": b.mean_latency_ms, "total": b.total_ms, "succeeded": b.succeeded}
        wrong = impossible(f"batch of {b.batch}", rate="requests/s", latency="latency")
        yield ClaimedCell("batch", (b.batch,), figures, floor(at_once=b.batch), wrong)


def layout_columns(claims: ClaimedTables) -> list[list[str]]:
    """Columns of the adapter's "single node against distributed", as bench_tables.layouts shows them."""
    rows = {row.metric: row for row in claims.report.single_node_vs_distributed}
    if not rows:
        return []

    def said(metric: str, column: str) -> str:
        value = getattr(rows[metric], column) if metric in rows else NONE
        return value.replace("-", " to ") if isinstance(value, str) else f"{value:g}"

    found = []
    for column, name in _COLUMNS:
        where = f"single node against distributed, {name}"
        rate = claims.claimed(said("peak_req_per_s", column), where, "requests/s")
        ttft = claims.claimed(said("mean_ttft_ms", column), where, "ttft")
        found.append([name, rate, NONE, ttft, said("gpu_memory_gb", column), NONE])
    return found
