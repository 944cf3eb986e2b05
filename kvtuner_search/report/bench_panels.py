"""The drawings of a benchmark report: which figures, over what, and beside which floors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from kvtuner_search.bench.record import Cell, Floor, Section, Speed
from kvtuner_search.report.bench_claims import CLAIMED, ClaimedCell, ClaimedTables
from kvtuner_search.report.bench_figures import CLAIMED_SHAPE, Series, Spot, Zone, plot, run_class, run_shape
from kvtuner_search.report.bench_tables import ReportedRun, beyond, figure, key_of, machine
from kvtuner_search.report.svg import Point


class Quantity(NamedTuple):
    """A quantity to draw."""

    id: str
    unit: str
    rate: bool  # has a ceiling instead of a floor
    bound: Callable[[Floor], float]
    value: Callable[[Speed], tuple[float, float, float] | None]  # figure, least, greatest; of a rate all are alike
    claim: str  # what ClaimedCell.figures calls it


def _ttft(speed: Speed) -> tuple[float, float, float] | None:
    return (speed.ttft.mean, speed.ttft.minimum, speed.ttft.maximum) if speed.ttft else None


_TTFT: Final = Quantity("ttft", "ms", False, lambda floor: floor.ttft, _ttft, "mean")
_RATE: Final = Quantity("rate", "requests/s", True, lambda floor: floor.requests_per_second, lambda speed: (speed.requests_per_second,) * 3, "rate")  # fmt: skip
_TOKENS: Final = Quantity("tokens", "tokens/s", True, lambda floor: floor.output_tokens_per_second, lambda speed: (speed.output_tokens_per_second,) * 3, "tokens")  # fmt: skip


class Drawing(NamedTuple):
    """One panel: a quantity of a table's cells over one part of their keys."""

    section: Section
    quantity: Quantity
    title: str
    axis: str
    part: int  # of the key
    prompt: int | None = None  # only cells with this many prompt tokens


_DRAWN: Final[dict[str, tuple[Drawing, ...]]] = {
    "ttft": (Drawing("ttft", _TTFT, "Time to the first token", "prompt tokens", 0),),
    "throughput": (
        Drawing("throughput", _RATE, "Requests", "requests in flight", 0),
        Drawing("throughput", _TOKENS, "Output tokens", "requests in flight", 0),
    ),
    "batch": (Drawing("batch", _RATE, "Requests by batch size", "batch", 0),),
}


def drawings(table: str, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> list[str]:
    """The drawings that belong to a table, by its id; a drawing without a single figure is left out."""
    wanted: Iterable[Drawing] = _DRAWN.get(table, ())
    if table == "long":
        prompts = {cell.shape.input_tokens for run in all_runs for cell in run.record.cells if cell.section == "long"}
        prompts |= {claim.key[0] for claim in (claims.cells if claims else ()) if claim.section == "long"}
        wanted = [
            Drawing("long", _TOKENS, f"{prompt:,} prompt tokens", "output tokens", 1, prompt)
            for prompt in sorted(prompts)
        ]
    return [drawn for one in wanted if (drawn := _draw(one, all_runs, claims))]


def _draw(one: Drawing, all_runs: Sequence[ReportedRun], claims: ClaimedTables | None) -> str:
    series = []
    floors: dict[str, dict[float, float]] = {}  # machine -> position -> floor
    for index, run in enumerate(all_runs):
        cells = [cell for cell in run.record.cells if _wanted(one, cell.section, key_of(cell))]
        spots = [spot for cell in cells if (spot := _spot(one, cell, run.name))]
        if spots:
            series.append(Series(sorted(spots), run_class(index), run_shape(index)))
        for cell in cells:
            if cell.floor is not None:
                line, at = floors.setdefault(machine(run.record), {}), float(key_of(cell)[one.part])
                line[at] = _lenient(one, [one.quantity.bound(cell.floor), *([line[at]] if at in line else [])])
    rows = [claim for claim in (claims.cells if claims else ()) if _wanted(one, claim.section, claim.key)]
    claimed = [claim for claim in rows if claim.figures.get(one.quantity.claim) is not None]
    if claimed:
        series.append(Series(sorted(_claim(one, claim) for claim in claimed), CLAIMED, CLAIMED_SHAPE))
    if not series:
        return ""
    bounds = {float(c.key[one.part]): one.quantity.bound(c.floor) for c in claimed if c.floor}
    name = f"{one.section}-{one.quantity.id}" + (f"-{one.prompt}" if one.prompt is not None else "")
    zones = _zones(one, floors, bounds)
    return plot(name, one.title, (one.axis, one.quantity.unit), series, zones, one.quantity.rate)


def _wanted(one: Drawing, section: Section, key: tuple[int, ...]) -> bool:
    return section == one.section and (one.prompt is None or key[0] == one.prompt)


def _lenient(one: Drawing, bounds: Sequence[float]) -> float:
    return max(bounds) if one.quantity.rate else min(bounds)


def _zones(one: Drawing, floors: dict[str, dict[float, float]], claimed: dict[float, float]) -> list[Zone]:
    """The adapter's zone, then ours: what no machine in the report can do is hatched, other machines have a line."""
    word = "ceiling" if one.quantity.rate else "floor"
    zones = [Zone(sorted(claimed.items()), "claimedfloor", f"{word} of the adapter's hardware")] if claimed else []
    lines: dict[str, list[Point]] = {name: sorted(line.items()) for name, line in floors.items()}
    best = sorted(lines, key=lambda name: _lenient(one, [y for _, y in lines[name]]), reverse=one.quantity.rate)
    return zones + [Zone(lines[name], "floor", f"{word}: {name}", index == 0) for index, name in enumerate(best)]


def _spot(one: Drawing, cell: Cell, run: str) -> Spot | None:
    quantity = one.quantity
    found = quantity.value(cell.speed) if cell.speed else None
    if found is None:
        return None
    value, low, high = found
    bound = quantity.bound(cell.floor) if cell.floor else None
    note = f"{run}: {cell.title}: {figure(value)} {quantity.unit}"
    note += "" if quantity.rate else f", {figure(low)} to {figure(high)}"
    note += f", {cell.succeeded:,} requests"
    note += f"; {'ceiling' if quantity.rate else 'floor'} {figure(bound)}" if bound is not None else ""
    wrong = beyond(value if quantity.rate else low, bound, quantity.rate)
    note += ": impossible" if wrong else ""
    at = float(key_of(cell)[one.part])
    return Spot(at, value, note, impossible=wrong) if quantity.rate else Spot(at, value, note, low, high, wrong)


def _claim(one: Drawing, claim: ClaimedCell) -> Spot:
    quantity = one.quantity
    value = claim.figures[quantity.claim] or 0.0
    wrong = quantity.claim in claim.impossible
    note = f"claimed: {figure(value)} {quantity.unit}"
    if claim.floor:
        note += (
            f"; its hardware allows no {'more' if quantity.rate else 'less'} than {figure(quantity.bound(claim.floor))}"
        )
    note += ": impossible" if wrong else ""
    return Spot(
        float(claim.key[one.part]), value, note, claim.figures.get("minimum"), claim.figures.get("maximum"), wrong
    )
