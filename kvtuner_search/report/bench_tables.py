"""The tables of benchmark reports as text, for the terminal and for HTML: each cell of a grid as it was measured, run by run, then as the adapter's report claims it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NamedTuple

from kvtuner_search.bench import slo
from kvtuner_search.bench.compare import layout, layout_text
from kvtuner_search.bench.judge import CLOCK_MARGIN
from kvtuner_search.bench.record import Cell, Gate, Record, Section, Summary
from kvtuner_search.profile.text import signed
from kvtuner_search.report.bench_claims import CLAIMED, IMPOSSIBLE, NONE, ClaimedCell, ClaimedTables, layout_columns
from kvtuner_search.serving.engine import engine, engine_among


class Grid(NamedTuple):
    """One table."""

    id: str
    heading: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[int]  # columns of figures
    note: str = ""


class ReportedRun(NamedTuple):
    """A record and what tables call it."""

    name: str
    record: Record


def runs(records: Sequence[Record]) -> list[ReportedRun]:
    """A short name for each record that no other has: its cache, then its layout, then its time."""
    parts: list[Callable[[Record], str]] = [
        lambda record: record.cache.profile,
        layout_text,
        lambda record: record.created,
    ]
    names = [parts[0](record) for record in records]
    for part in parts[1:]:
        if len(set(names)) == len(names):
            break
        if len({part(record) for record in records}) > 1:
            names = [f"{name}, {part(record)}" for name, record in zip(names, records, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({index + 1})" for index, name in enumerate(names)]
    return [ReportedRun(name, record) for name, record in zip(names, records, strict=True)]


def machine(record: Record) -> str:
    """What the record was measured on."""
    hardware = record.environment.hardware
    return f"{hardware.count} x {hardware.name}" if hardware else "unknown hardware, so no floors"


def engine_title(record: Record) -> str:
    """The engine that the record is of, as texts call it."""
    return engine(engine_among(record.environment.versions)).TITLE


def figure(value: float | None, digits: int = 4) -> str:
    """A figure with ``digits`` significant digits and thousands separators; a dash for none."""
    if value is None:
        return NONE
    if value and abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def beyond(value: float, floor: float | None, above: bool) -> bool:
    """Whether a figure is impossible; with the margin for clocks that judge.py allows."""
    if floor is None:
        return False
    return value * (1 - CLOCK_MARGIN) > floor if above else value < floor * (1 - CLOCK_MARGIN)


def share(value: float, floor: float | None, above: bool, claimed: bool = False) -> str:
    """A figure over its floor or ceiling, and whether it is beyond, which is impossible.

    ``claimed``: a rate that is impossible because the latency of the same requests is.
    """
    if floor is None:
        return NONE
    if beyond(value, floor, above):
        if not value:
            return f"0, {IMPOSSIBLE}"
        times = figure(value / floor if above else floor / value, 3)
        return f"{times} x, {IMPOSSIBLE}" if above else f"1/{times}, {IMPOSSIBLE}"
    if claimed:
        return f"{IMPOSSIBLE}, as its latency"
    return f"{figure(100 * value / floor, 2)}%" if above else f"{figure(value / floor, 3)} x"


Key = tuple[int, ...]
_KEYS: Final[dict[Section, tuple[tuple[str, ...], Callable[[Cell], Key]]]] = {
    "ttft": (("prompt tokens",), lambda cell: (cell.shape.input_tokens,)),
    "throughput": (("concurrency",), lambda cell: (cell.shape.concurrency,)),
    "long": (("input", "output"), lambda cell: (cell.shape.input_tokens, cell.shape.output_tokens)),
    "batch": (("batch",), lambda cell: (cell.shape.concurrency,)),
    "memory": (("prompt tokens",), lambda cell: (cell.shape.input_tokens,)),
}
HEADINGS: Final[dict[Section, str]] = {
    "ttft": "Time to the first token",
    "throughput": "Throughput by concurrency",
    "long": "Long sequences",
    "batch": "Batches",
    "memory": "Memory stress",
}


def key_of(cell: Cell) -> Key:
    """The key of a cell within its table."""
    return _KEYS[cell.section][1](cell)


def _gather(
    section: Section, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None
) -> dict[Key, list[tuple[str, Cell | ClaimedCell]]]:
    """Key -> (run, cell) of each run and of the adapter's report, keys rising."""
    found: dict[Key, list[tuple[str, Cell | ClaimedCell]]] = {}
    for run in all_runs:
        for cell in run.record.cells:
            if cell.section == section:
                found.setdefault(key_of(cell), []).append((run.name, cell))
    for claimed in claims.cells if claims else ():
        if claimed.section == section:
            found.setdefault(claimed.key, []).append((CLAIMED, claimed))
    return dict(sorted(found.items()))


def _build(section: Section, heads: Sequence[str], all_runs: Sequence[ReportedRun], claims: ClaimedTables | None, ours: Callable[[Cell], Sequence[str]], theirs: Callable[[ClaimedCell], Sequence[str]], note: str) -> Grid | None:  # fmt: skip
    rows = []
    names = _KEYS[section][0]
    for key, members in _gather(section, all_runs, claims).items():
        for index, (name, cell) in enumerate(members):
            lead = [f"{part:,}" if index == 0 else "" for part in key]
            rows.append([*lead, name, *(theirs(cell) if isinstance(cell, ClaimedCell) else ours(cell))])
    if not rows:
        return None
    columns = [*names, "run", *heads]
    right = [i for i in range(len(columns)) if i != len(names)]
    return Grid(section, HEADINGS[section], columns, rows, right, note)


def _whole(cell: Cell) -> str:
    return f"{cell.succeeded:,} of {cell.shape.requests:,}"


def _mean(summary: Summary | None) -> str:
    return figure(summary.mean if summary else None)


def _ttft(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid | None:
    heads = ("mean, ms", "least", "p50", "p99", "greatest", "whole answers", "floor, ms", "of the floor")

    def ours(cell: Cell) -> Sequence[str]:
        found = cell.speed.ttft if cell.speed else None
        shown = (
            [figure(v) for v in (found.mean, found.minimum, found.p50, found.p99, found.maximum)]
            if found
            else [NONE] * 5
        )
        floor = cell.floor.ttft if cell.floor else None
        return [*shown, _whole(cell), figure(floor), share(found.minimum, floor, above=False) if found else NONE]

    def theirs(cell: ClaimedCell) -> Sequence[str]:
        mean, low, high = (cell.figures[name] or 0.0 for name in ("mean", "minimum", "maximum"))
        floor = cell.floor.ttft if cell.floor else None
        kept = share(low, floor, above=False)
        return [figure(mean), figure(low), NONE, NONE, figure(high), NONE, figure(floor), kept]

    note = "The least of a cell is what is held against the floor: no request can be quicker."
    return _build("ttft", heads, all_runs, claims, ours, theirs, note)


def _rates(section: Section, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid | None:
    batch = section == "batch"
    heads = ["requests/s", "ceiling", "of the ceiling", "output tokens/s", "latency, ms", "TTFT, ms", "whole answers"]
    heads = ["one batch, ms", *heads] if batch else heads

    def ours(cell: Cell) -> Sequence[str]:
        speed, ceiling = cell.speed, cell.floor.requests_per_second if cell.floor else None
        rounds = cell.shape.requests / cell.shape.concurrency
        first = [figure(1e3 * speed.seconds / rounds if speed else None)] if batch else []
        if speed is None:
            return [*first, NONE, figure(ceiling), NONE, NONE, NONE, NONE, _whole(cell)]
        rate = speed.requests_per_second
        shown = [
            figure(rate),
            figure(ceiling),
            share(rate, ceiling, above=True),
            figure(speed.output_tokens_per_second),
        ]
        return [*first, *shown, figure(speed.latency.mean), _mean(speed.ttft), _whole(cell)]

    def theirs(cell: ClaimedCell) -> Sequence[str]:
        rate, ceiling = cell.figures["rate"] or 0.0, cell.floor.requests_per_second if cell.floor else None
        first = [figure(cell.figures["total"])] if batch else []
        kept = share(rate, ceiling, above=True, claimed="rate" in cell.impossible)
        success = cell.figures.get("success")
        answers = figure(cell.figures["succeeded"]) if batch else NONE if success is None else f"{success:.1%}"
        return [*first, figure(rate), figure(ceiling), kept, NONE, figure(cell.figures["latency"]), NONE, answers]

    note = "Rates count complete answers only; latency and TTFT are means. "
    note += (
        "The adapter's report does not say how many tokens it asked for, so its ceiling is that of one token in answer to one."
        if claims
        else ""
    )
    return _build(section, heads, all_runs, claims, ours, theirs, note.strip())


def _long(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid | None:
    heads = (
        "latency, ms",
        "floor, ms",
        "of the floor",
        "tokens/s",
        "ceiling",
        "of the ceiling",
        "per token, ms",
        "whole answers",
    )

    def shown(latency: float, rate: float, cell: Cell | ClaimedCell) -> list[str]:
        least, most = (cell.floor.latency, cell.floor.output_tokens_per_second) if cell.floor else (None, None)
        shares = share(latency, least, above=False), share(rate, most, above=True)
        return [figure(latency), figure(least), shares[0], figure(rate), figure(most), shares[1]]

    def ours(cell: Cell) -> Sequence[str]:
        speed = cell.speed
        if speed is None:
            return [*[NONE] * 7, _whole(cell)]
        figures = shown(speed.latency.mean, speed.output_tokens_per_second, cell)
        return [*figures, _mean(speed.per_token), _whole(cell)]

    def theirs(cell: ClaimedCell) -> Sequence[str]:
        return [*shown(cell.figures["latency"] or 0.0, cell.figures["tokens"] or 0.0, cell), NONE, NONE]

    return _build(
        "long",
        heads,
        all_runs,
        claims,
        ours,
        theirs,
        "Latency and time per token are means; tokens are returned ones.",
    )


def _memory(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid | None:
    heads = ("run", "rounds", "requests", "success", "latency, ms", "free slots before", "after", "device before, MiB", "after", "change, MiB")  # fmt: skip
    rows = []
    for run in all_runs:
        for cell in run.record.cells:
            if cell.section != "memory":
                continue
            free = [f"{count:,}" for count in cell.free_tokens] if cell.free_tokens else [NONE, NONE]
            used = [f"{size / 2**20:,.0f}" for size in cell.device_bytes] if cell.device_bytes else [NONE, NONE]
            change = signed((cell.device_bytes[1] - cell.device_bytes[0]) / 2**20) if cell.device_bytes else NONE
            rounds = f"{len(cell.readings) - 1:,}" if cell.readings else NONE
            answered = [f"{cell.shape.requests:,}", f"{cell.success_rate:.2%}"]
            latency = figure(cell.speed.latency.mean if cell.speed else None)
            rows.append([run.name, rounds, *answered, latency, *free, *used, change])
    if claims and (stress := claims.report.memory_stress):
        success = NONE if stress.success is None else f"{stress.success:.2%}"
        change = NONE if stress.fluctuation_mib is None else f"±{stress.fluctuation_mib:g}"
        latency = claims.claimed(figure(stress.mean_latency_ms), "memory stress", "latency")
        used_mib = NONE if stress.gpu_memory_mib is None else f"{stress.gpu_memory_mib:,.0f}"
        rows.append([CLAIMED, f"{stress.rounds:,}", NONE, success, latency, NONE, NONE, NONE, used_mib, change])
    note = "Slots are read with the prefix cache flushed: any that are missing afterwards have leaked. The cache is allocated when the server starts, so device memory shows leaks outside it only."
    return Grid("memory", HEADINGS["memory"], heads, rows, range(1, len(heads)), note) if rows else None


def capacity(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid:
    """What a cache holds, and what devices are filled with."""
    heads = (
        "run",
        "effective bits",
        "bytes per token",
        "tokens that fit",
        "cache, GiB",
        "device in use, MiB",
        "of",
        "share",
    )
    rows = []
    for run in all_runs:
        record = run.record
        used = [max(cell.device_bytes) for cell in record.cells if cell.device_bytes]
        hardware = record.environment.hardware
        total = hardware.memory if hardware else None
        filled = f"{max(used) / total:.1%}" if used and total else NONE
        mib = [f"{size / 2**20:,.0f}" if size else NONE for size in (max(used, default=None), total)]
        cache = record.cache
        rows.append([run.name, f"{cache.effective_bits:.3f}", f"{cache.bytes_per_token:,}", f"{record.served.token_capacity:,}", figure(record.served.cache_gib), *mib, filled])  # fmt: skip
    for gpu in claims.report.gpu_memory_mib if claims else ():
        mib = [f"{gpu.used:,.0f}", f"{gpu.total:,.0f}", f"{gpu.used / gpu.total:.1%}"]
        rows.append([f"{CLAIMED}, GPU {gpu.gpu}", NONE, NONE, NONE, NONE, *mib])
    note = "What a cache saves shows in the tokens that fit: the server fills the device to a fixed share whatever the cache, so memory in use says nothing about it."
    if claims and claims.report.memory_estimates_gb:
        said = ", ".join(f"{name} {size:g} GB" for name, size in claims.report.memory_estimates_gb.items())
        note += f" The adapter's estimates of memory by cache: {said}."
    return Grid("capacity", "Token capacity and device memory", heads, rows, range(1, 8), note)


def layouts(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> Grid | None:
    """The adapter's "single node against distributed", where runs differ in layout or the adapter's report is given."""
    if not claims and len({layout(run.record) for run in all_runs}) < 2:
        return None
    columns = [[run.name, layout_text(run.record), *_layout_figures(run.record)] for run in all_runs]
    columns += [[CLAIMED, *column] for column in layout_columns(claims)] if claims else []
    names = (
        "layout",
        "peak requests/s",
        "peak output tokens/s",
        "mean TTFT by prompt length, ms",
        "device memory, GB",
        "tokens that fit",
    )
    heads = ["", *(column[0] for column in columns)]
    rows = [[name, *(column[index + 1] for column in columns)] for index, name in enumerate(names)]
    return Grid("layouts", "Single node against distributed", heads, rows, range(1, len(heads)))


def _layout_figures(record: Record) -> list[str]:
    speeds = [cell.speed for cell in record.cells if cell.speed and cell.section in ("throughput", "batch")]
    first = [cell.speed.ttft.mean for cell in record.cells if cell.section == "ttft" and cell.speed and cell.speed.ttft]
    used = [max(cell.device_bytes) for cell in record.cells if cell.device_bytes]
    return [
        figure(max((speed.requests_per_second for speed in speeds), default=None)),
        figure(max((speed.output_tokens_per_second for speed in speeds), default=None)),
        f"{figure(min(first))} to {figure(max(first))}" if first else NONE,
        figure(max(used) / 1e9) if used else NONE,
        f"{record.served.token_capacity:,}",
    ]


def targets(all_runs: Sequence[ReportedRun], claims: ClaimedTables) -> Grid | None:
    """The adapter's monitoring targets, judged on each run; its target for memory both on slots in use and on the device's memory."""
    wanted = claims.report.monitoring_targets
    if wanted is None:
        return None
    limits = {
        "ttft_mean": wanted.ttft_ms_below,
        "success": wanted.success_rate_above,
        "memory": wanted.gpu_memory_below,
        "device_memory": wanted.gpu_memory_below,
    }
    objectives = [slo.ServiceObjective(name, limit) for name, limit in limits.items() if limit is not None]
    rows = [[run.name, *row] for run in all_runs for row in gate_rows(slo.judge(objectives, run.record))]
    note = "Each is judged on its worst cell; memory is the fraction of the cache's slots in use, device_memory that of the device."
    unmet = [f" {v.figure}: {v.reason}." for v in claims.violations if v.where == "monitoring targets"]
    return Grid(
        "targets", "The adapter's monitoring targets", ("run", *GATE_HEADS), rows, (2, 3), note + "".join(unmet)
    )


GATE_HEADS: Final = ("objective", "limit", "value", "holds", "where")


def gate_rows(gates: Iterable[Gate]) -> list[list[str]]:
    """Objectives, judged."""
    rows = []
    for gate in gates:
        unit = slo.UNITS.get(gate.name.rpartition(".")[2], "")
        shown = "" if unit == "fraction" else f" {unit}"
        value = "not measured" if gate.value is None else f"{figure(gate.value)}{shown}"
        rows.append(
            [gate.name, f"{gate.relation} {gate.limit:g}{shown}", value, "yes" if gate.passed else "NO", gate.where]
        )
    return rows


def grids(all_runs: Sequence[ReportedRun], claims: ClaimedTables | None = None) -> list[Grid]:
    """Every table of the adapter's report that the runs or that report have rows for, in its order."""
    found = [
        _ttft(all_runs, claims),
        _rates("throughput", all_runs, claims),
        _long(all_runs, claims),
        _rates("batch", all_runs, claims),
        _memory(all_runs, claims),
        capacity(all_runs, claims),
        layouts(all_runs, claims),
        targets(all_runs, claims) if claims else None,
    ]
    return [grid for grid in found if grid is not None]
