"""``bench compare A B``: the same cells of two records, paired; how much faster or slower B is, and whether that exceeds scatter.

A record that is not a result (a check failed, a figure is impossible, a request failed) is refused, and so are records of other models or presets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from kvtuner_search.bench import intervals
from kvtuner_search.bench.intervals import Floats, Interval
from kvtuner_search.bench.raw import Timings, timings_beside
from kvtuner_search.bench.record import Cell, Model, Record, Section, Speed, Summary
from kvtuner_search.errors import NotComparableError

Better = Literal["lower", "higher"]
Basis = Literal["requests", "summaries", "none"]
_SHAPE: Final = ("name", "layers", "hidden_size", "heads", "kv_heads", "head_dim", "vocabulary")
_SERVED: Final = (
    "version",
    "dtype",
    "quantization",
    "page_size",
    "prefix_cache",
    "speculative",
    "draft_tokens",
    "started",
)
_P99_SAMPLES: Final = 100


class Metric(NamedTuple):
    """A figure of a cell that two records are compared by."""

    name: str
    unit: str
    better: Better
    of_speed: Callable[[Speed], float | None]  # the figure itself
    summary: Callable[[Speed], Summary | None]  # the times behind it
    of_request: Callable[[Timings], Floats]  # [n] the same times, one a request
    statistic: intervals.Statistic = intervals.mean


class Ratio(NamedTuple):
    """B over A."""

    value: float
    interval: Interval | None  # None: too few requests, or a figure without one, such as capacity
    basis: Basis  # what the interval is from
    samples: tuple[int, int]  # requests in A and in B


class ComparedFigure(NamedTuple):
    """One figure of one cell in both records."""

    section: Section
    cell: str
    metric: str
    unit: str
    better: Better
    a: float
    b: float
    ratio: Ratio

    @property
    def verdict(self) -> str:
        """better, worse or undecided, for B; unjudged without an interval."""
        if self.ratio.interval is None:
            return "unjudged"
        low, high = self.ratio.interval
        if low <= 1 <= high:
            return "undecided"
        return "better" if (high < 1) == (self.better == "lower") else "worse"


class Difference(NamedTuple):
    """A difference; ``warn``: it changes the figures and is not the subject of a comparison of caches or layouts."""

    what: str
    a: str
    b: str
    warn: bool


class RecordComparison(NamedTuple):
    """Two records, paired."""

    a: Record
    b: Record
    rows: list[ComparedFigure]
    capacity: float  # tokens of B's cache over A's
    unpaired: list[str]  # cells that only one has, or that one has no speed of
    differences: list[Difference]

    @property
    def layouts_differ(self) -> bool:
        """Whether the two were spread over devices differently."""
        return layout(self.a) != layout(self.b)


def _mean_time(name: str, summary: Callable[[Speed], Summary | None], times: Callable[[Timings], Floats]) -> Metric:
    def mean(speed: Speed) -> float | None:
        found = summary(speed)
        return found.mean if found else None

    return Metric(f"{name} mean", "ms", "lower", mean, summary, times)


def _p99(speed: Speed) -> float | None:
    return speed.ttft.p99 if speed.ttft and speed.ttft.samples >= _P99_SAMPLES else None


_TTFT: Final = _mean_time("TTFT", lambda speed: speed.ttft, lambda raw: raw.ttft)
_TTFT_P99: Final = Metric(
    "TTFT p99", "ms", "lower", _p99, lambda speed: speed.ttft, lambda raw: raw.ttft, intervals.percentile(0.99)
)
_LATENCY: Final = _mean_time("latency", lambda speed: speed.latency, lambda raw: raw.latency)
_PER_TOKEN: Final = _mean_time("time per token", lambda speed: speed.per_token, lambda raw: raw.per_token)


def _rate(values: Floats) -> Floats:
    """With a fixed number in flight, the rate is that number over the mean latency (Little's law); the number cancels in a ratio."""
    found: Floats = 1 / values.mean(axis=-1)
    return found


def _of_rate(name: str, unit: str, take: Callable[[Speed], float]) -> Metric:
    return Metric(name, unit, "higher", take, lambda speed: speed.latency, lambda raw: raw.latency, _rate)


_REQUESTS: Final = _of_rate("throughput", "requests/s", lambda speed: speed.requests_per_second)
_TOKENS: Final = _of_rate("throughput", "tokens/s", lambda speed: speed.output_tokens_per_second)
METRICS: Final[dict[Section, tuple[Metric, ...]]] = {
    "ttft": (_TTFT, _TTFT_P99),
    "throughput": (_REQUESTS, _TTFT, _PER_TOKEN),
    "long": (_TOKENS, _LATENCY, _PER_TOKEN),
    "batch": (_REQUESTS, _LATENCY),
    "memory": (_LATENCY,),
}


def layout(record: Record) -> tuple[int, int, int]:
    """(tensor-parallel ranks, pipeline stages, nodes)."""
    served = record.served
    return served.tensor_parallel, served.pipeline_parallel, served.nodes


def compare(a: Record, b: Record, paths: tuple[Path, Path] | None = None) -> RecordComparison:
    """Pair the cells of two records and compare their figures.

    Args:
        a, b: the records; ratios are b over a.
        paths: where they were read from, so that the raw requests beside them are found; without, intervals are from summaries.

    Raises:
        NotComparableError: if a record is not a result, the models or presets differ, or no cell is in both.
    """
    _refuse(a, b)
    pairs, unpaired = _pair(a, b)
    raw: list[dict[str, Timings]] = [{}, {}]
    if paths is not None:
        raw = [timings_beside(path, record) for path, record in zip(paths, (a, b), strict=True)]
    rows = [row for old, new in pairs for row in _rows(old, new, raw[0], raw[1])]
    if not rows:
        raise NotComparableError("the records have no cell with speed in common: run the same preset for both")
    return RecordComparison(a, b, rows, b.served.token_capacity / a.served.token_capacity, unpaired, _differences(a, b))


def _refuse(a: Record, b: Record) -> None:
    for name, record in (("A", a), ("B", b)):
        failed = [check.name for check in record.correctness if not check.passed]
        if failed:
            raise NotComparableError(
                f"{name} failed its correctness check ({', '.join(failed)}): it has no speed; run it again"
            )
        if record.violations:
            first = record.violations[0]
            raise NotComparableError(
                f"{name} has {len(record.violations)} violations, the first {first.rule} at {first.where}: it is not a result;"
                " `kvtuner-search bench check` lists them"
            )
    for field in _SHAPE:
        old, new = getattr(a.model, field), getattr(b.model, field)
        if old != new:
            raise NotComparableError(
                f"A measured {_of_model(a.model)} and B {_of_model(b.model)} ({field} {old} and {new}): compare one model"
            )
    if a.preset != b.preset:
        raise NotComparableError(f"A used preset {a.preset} and B {b.preset}: run the same preset for both")


def _of_model(model: Model) -> str:
    return f"{model.name}, {model.layers} layers"


def _key(cell: Cell) -> tuple[object, ...]:
    shape = cell.shape
    return cell.section, shape.input_tokens, shape.output_tokens, shape.concurrency


def _pair(a: Record, b: Record) -> tuple[list[tuple[Cell, Cell]], list[str]]:
    """Cells of the same table and shape (the number of requests may differ), and the titles of those that have no partner with speed."""
    old = {_key(cell): cell for cell in a.cells if cell.speed is not None}
    new = {_key(cell): cell for cell in b.cells if cell.speed is not None}
    unpaired = dict.fromkeys(
        cell.title for cell in [*a.cells, *b.cells] if not (_key(cell) in old and _key(cell) in new)
    )
    return [(cell, new[key]) for key, cell in old.items() if key in new], list(unpaired)


def _rows(old: Cell, new: Cell, raw_old: dict[str, Timings], raw_new: dict[str, Timings]) -> Iterator[ComparedFigure]:
    assert old.speed is not None
    assert new.speed is not None
    for metric in METRICS[old.section]:
        a, b = metric.of_speed(old.speed), metric.of_speed(new.speed)
        if not a or not b:  # not measured in one of them, or a clock that saw nothing pass: no ratio
            continue
        values, basis = _values(metric, (new, new.speed, raw_new), (old, old.speed, raw_old))
        flight = (new.shape.concurrency, old.shape.concurrency)
        found = intervals.ratio(*values, flight if basis == "requests" else (1, 1), metric.statistic)
        samples = (old.speed.latency.samples, new.speed.latency.samples)
        ratio = Ratio(b / a, found, basis if found else "none", samples)
        yield ComparedFigure(old.section, old.title, metric.name, metric.unit, metric.better, a, b, ratio)


def _values(
    metric: Metric, *sides: tuple[Cell, Speed, dict[str, Timings]]
) -> tuple[tuple[Floats, Floats], Literal["requests", "summaries"]]:
    """One value a request on both sides if the raw requests of both are there, otherwise their stand-ins."""
    new, old = sides
    if new[0].title in new[2] and old[0].title in old[2]:
        return (metric.of_request(new[2][new[0].title]), metric.of_request(old[2][old[0].title])), "requests"
    return (_stand_in(metric, new), _stand_in(metric, old)), "summaries"


def _stand_in(metric: Metric, side: tuple[Cell, Speed, dict[str, Timings]]) -> Floats:
    summary = metric.summary(side[1])
    return np.zeros(0) if summary is None else intervals.values_from_summary(summary, side[0].shape.concurrency)


def _differences(a: Record, b: Record) -> list[Difference]:
    pairs: list[tuple[str, object, object, bool]] = [
        ("cache", _cache(a), _cache(b), False),
        ("layout", layout_text(a), layout_text(b), False),
        # another cache may need another back end, so it is part of the comparison
        (
            "attention back end",
            a.served.attention_backend,
            b.served.attention_backend,
            a.cache.digest == b.cache.digest,
        ),
        ("hardware", _hardware(a), _hardware(b), True),
        ("client", a.environment.client, b.environment.client, True),
        ("dummy weights", a.model.dummy_weights, b.model.dummy_weights, True),
        ("weight bytes", a.model.weight_bytes, b.model.weight_bytes, True),
    ]
    pairs += [(field.replace("_", " "), getattr(a.served, field), getattr(b.served, field), True) for field in _SERVED]
    versions = (a.environment.versions, b.environment.versions)
    pairs += [
        (f"version of {name}", versions[0].get(name), versions[1].get(name), True)
        for name in sorted(versions[0] | versions[1])
    ]
    return [Difference(what, _said(old), _said(new), warn) for what, old, new, warn in pairs if old != new]


def _said(value: object) -> str:
    if value is None:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _cache(record: Record) -> str:
    cache = record.cache
    return f"{cache.profile}, {cache.effective_bits:.3f} bits" + (f", {cache.digest[:19]}" if cache.digest else "")


def _hardware(record: Record) -> str:
    """The device; how many there are belongs to the layout."""
    hardware = record.environment.hardware
    return hardware.name if hardware else "unknown"


def layout_text(record: Record) -> str:
    """E.g. ``TP=2 x PP=2, 2 nodes``."""
    tensor, pipeline, nodes = layout(record)
    stages = f" x PP={pipeline}" if pipeline > 1 else ""
    return f"TP={tensor}{stages}" + (f", {nodes} nodes" if nodes > 1 else "")


def to_json(comparison: RecordComparison) -> dict[str, Any]:
    """The output of ``bench compare --json``."""
    return {
        "a": {
            "cache": comparison.a.cache.model_dump(),
            "layout": layout(comparison.a),
            "created": comparison.a.created,
        },
        "b": {
            "cache": comparison.b.cache.model_dump(),
            "layout": layout(comparison.b),
            "created": comparison.b.created,
        },
        "capacity_ratio": comparison.capacity,
        "confidence": intervals.CONFIDENCE,
        "rows": [
            {
                **{
                    name: getattr(row, name)
                    for name in ("section", "cell", "metric", "unit", "better", "a", "b", "verdict")
                },
                "ratio": row.ratio.value,
                "interval": list(row.ratio.interval) if row.ratio.interval else None,
                "interval_from": row.ratio.basis,
                "requests": list(row.ratio.samples),
            }
            for row in comparison.rows
        ],
        "unpaired": comparison.unpaired,
        "differences": [difference._asdict() for difference in comparison.differences],
    }
