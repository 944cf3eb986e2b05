"""Service-level objectives: ``--slo ttft_p99=200,success=0.999,memory=0.9``. Neither torch nor SGLang is imported here.

An objective is judged on its worst cell, so that no good cell hides a bad one; an objective without a measurement fails.
docs/bench-records.md has the table of names and units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple, get_args

from kvtuner_search.bench.record import SECTIONS, Cell, Gate, Record, Section, Speed, Summary
from kvtuner_search.errors import UsageError
from kvtuner_search.servers.interface import interface
from kvtuner_search.serving.engine import engine_among

Statistic = Literal["mean", "p50", "p90", "p99", "maximum"]
_STATISTICS: Final[dict[str, Statistic]] = {
    **{name: name for name in get_args(Statistic) if name != "maximum"},
    "max": "maximum",
}
_TIMES: Final = {"ttft": "ms", "per_token": "ms", "latency": "ms"}
_PEAKS: Final = {"requests_per_second": "requests/s", "output_tokens_per_second": "tokens/s"}
UNITS: Final[dict[str, str]] = {
    **{f"{time}_{statistic}": unit for time, unit in _TIMES.items() for statistic in _STATISTICS},
    **_PEAKS,
    "success": "fraction",
    "memory": "fraction",
    "device_memory": "fraction",
}


class ServiceObjective(NamedTuple):
    """One requested limit."""

    name: str  # of UNITS
    limit: float  # in the unit of the name
    section: Section | None = None  # None: every cell counts

    @property
    def title(self) -> str:
        """As it was written."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def relation(self) -> Literal["at most", "at least"]:
        """The required relation of the value to the limit."""
        return "at least" if self.name == "success" or self.name in _PEAKS else "at most"


class _Found(NamedTuple):
    value: float | None
    where: str


def parse(text: str) -> list[ServiceObjective]:
    """Read ``NAME=LIMIT,SECTION.NAME=LIMIT,...``.

    Raises:
        UsageError: for an unknown name or section, a limit that is not a number of its unit, or a name given twice.
    """
    found: list[ServiceObjective] = []
    for part in text.split(","):
        title, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"--slo {part.strip()!r} has no limit: write NAME=LIMIT, as in ttft_p99=200")
        section, dot, name = title.rpartition(".")
        if dot and section not in SECTIONS:
            raise UsageError(f"--slo {title!r}: there is no table {section!r}: choose from {', '.join(SECTIONS)}")
        if name not in UNITS:
            raise UsageError(f"--slo {title!r} is unknown: choose from {', '.join(UNITS)}")
        if dot and name in ("memory", "device_memory"):
            raise UsageError(f"--slo {title!r}: {name} applies to the whole run: leave {section}. out")
        objective = ServiceObjective(
            name, _limit(title, name, value), next((s for s in SECTIONS if s == section), None)
        )
        if any(other[0] == name and other.section == objective.section for other in found):
            raise UsageError(f"--slo {title!r} is given twice: leave one out")
        found.append(objective)
    return found


def _limit(title: str, name: str, value: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    highest = 1.0 if UNITS[name] == "fraction" else math.inf
    if not (0 <= limit <= highest and math.isfinite(limit)):
        wanted = "a fraction from 0 to 1" if highest == 1 else f"a number of {UNITS[name]} from 0 on"
        raise UsageError(f"--slo {title}={value}: the limit is not valid: give {wanted}")
    return limit


def judge(objectives: Iterable[ServiceObjective], record: Record) -> list[Gate]:
    """One gate an objective, on the record's cells and scrapes."""
    gates = []
    for objective in objectives:
        value, where = _worst(objective, record)
        if value is None:
            passed = False
        elif objective.relation == "at most":
            passed = value <= objective.limit
        else:
            passed = value >= objective.limit
        gates.append(
            Gate(
                name=objective.title,
                relation=objective.relation,
                limit=objective.limit,
                value=value,
                where=where,
                passed=passed,
            )
        )
    return gates


def _worst(objective: ServiceObjective, record: Record) -> _Found:
    name = objective.name
    if name == "memory":
        return _slots(record)
    if name == "device_memory":
        return _device(record)
    cells = [cell for cell in record.cells if objective.section in (None, cell.section)]
    if not cells:
        return _Found(None, f"no cell of {objective.section or 'any table'} was measured")
    if name == "success":
        worst = min(cells, key=lambda cell: cell.success_rate)
        return _Found(worst.success_rate, worst.title)
    if not record.correct:
        return _Found(None, "a correctness check failed, so no speed was kept")
    if name in _PEAKS:
        rated = [(_rate(cell.speed, name), cell.title) for cell in cells if cell.speed is not None]
        return _Found(*max(rated)) if rated else _Found(None, "no request succeeded")
    return _slowest(cells, name)


def _slowest(cells: Sequence[Cell], name: str) -> _Found:
    """The cell with the longest time; a cell without a time, because no answer came, is worse than any."""
    time, statistic = name.rsplit("_", 1)
    found: list[tuple[float, str]] = []
    for cell in cells:
        if cell.speed is None:
            return _Found(None, f"{cell.title}: no request succeeded")
        summary = _summary(cell.speed, time)
        if summary is not None:
            found.append((getattr(summary, _STATISTICS[statistic]), cell.title))
    return _Found(*max(found)) if found else _Found(None, f"no cell has a {time.replace('_', ' ')}")


def _summary(speed: Speed, time: str) -> Summary | None:
    return {"ttft": speed.ttft, "per_token": speed.per_token, "latency": speed.latency}[time]


def _rate(speed: Speed, name: str) -> float:
    return speed.requests_per_second if name == "requests_per_second" else speed.output_tokens_per_second


def _slots(record: Record) -> _Found:
    """The greatest fraction of the cache's token slots in use, by the server's own gauge; for several ranks the fullest."""
    gauge = interface(engine_among(record.environment.versions)).TOKEN_USAGE
    peaks = [
        (scrape.maximum, f"{scrape.name}, {scrape.samples} readings")
        for scrape in record.scrapes
        if scrape.name.partition("{")[0] == gauge
    ]
    return _Found(*max(peaks)) if peaks else _Found(None, f"the server's {gauge} was not read: --enable-metrics")


def _device(record: Record) -> _Found:
    """Memory in use on the first device over all it has; the cache is allocated in advance, so load hardly moves it."""
    hardware = record.environment.hardware
    used = [(max(cell.device_bytes), cell.title) for cell in record.cells if cell.device_bytes is not None]
    if not used:
        return _Found(None, "device memory was not read")
    if hardware is None or not hardware.memory:
        return _Found(None, "how much memory the device has is unknown: name it with --hardware")
    most, where = max(used)
    return _Found(most / hardware.memory, where)
