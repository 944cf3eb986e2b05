"""Drawings of a benchmark report: measured times and rates on log axes, with the area that the hardware cannot reach as a hatched zone behind a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from kvtuner_search.report.svg import Panel, Point, label, log_range, mark, path, rect, svg, tag

WIDTH: Final = 560.0
_LEFT, _TOP, _RIGHT, _BELOW = 58.0, 40.0, 12.0, 48.0
_TALL: Final = 270.0
_LEAST_RANGE: Final = 10.0  # of the y axis, so that it has several ticks
_APART: Final = 30.0  # pixels between the labels of two ticks
RUN_SHAPES: Final = ("circle", "square", "diamond", "triangle", "plus", "star")
CLAIMED_SHAPE: Final = "cross"
STYLE: Final = """
.r0 { fill: var(--b16); } .r1 { fill: var(--b8); } .r2 { fill: var(--refined); } .r3 { fill: var(--b4); } .r4 { fill: var(--preset); } .r5 { fill: var(--plain); }
.line.r0, .stroke.r0 { fill: none; stroke: var(--b16); } .line.r1, .stroke.r1 { fill: none; stroke: var(--b8); } .line.r2, .stroke.r2 { fill: none; stroke: var(--refined); }
.line.r3, .stroke.r3 { fill: none; stroke: var(--b4); } .line.r4, .stroke.r4 { fill: none; stroke: var(--preset); } .line.r5, .stroke.r5 { fill: none; stroke: var(--plain); }
.stroke.claimed { fill: none; stroke: var(--chosen); stroke-width: 2; } .ring { fill: none; stroke: var(--chosen); stroke-width: 1.2; }
.line.floor { stroke: var(--ink); stroke-width: 2; } .line.claimedfloor { stroke: var(--chosen); stroke-width: 1.6; stroke-dasharray: 7 4; }
.hatch { stroke: var(--dim); stroke-opacity: .55; } .claimedhatch { stroke: var(--chosen); stroke-opacity: .38; } .zone { fill: var(--dim); fill-opacity: .1; }
.claimedzone { fill: var(--chosen); fill-opacity: .06; } svg text.claimed { fill: var(--chosen); font-weight: 650; } svg text.floor { fill: var(--ink); font-weight: 650; }
.halo { paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round; }
.panels { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; } .panels figure { flex: 1 1 22rem; min-width: 0; max-width: 42rem; }
.panels figure svg { min-width: 0; } .panels .scroll { overflow: visible; }
.bad { color: var(--chosen); font-weight: 650; } .good { color: var(--b8); font-weight: 650; } .badge { white-space: nowrap; }
tr.claim { background: color-mix(in srgb, var(--chosen) 7%, transparent); } tr.bad { font-weight: 400; }
.cells td { white-space: nowrap; } .cells td:first-child { min-width: 0; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 2rem; } .panels figure { flex-basis: 100%; } svg text { font-size: 13px; } svg text.small { font-size: 12px; } }
"""


class Spot(NamedTuple):
    """One figure with its range."""

    x: float
    y: float
    title: str  # what hovering says
    low: float | None = None
    high: float | None = None
    impossible: bool = False


class Series(NamedTuple):
    """The figures of one run, or of the adapter's report (class ``claimed``)."""

    spots: Sequence[Spot]
    class_: str
    shape: str


class Zone(NamedTuple):
    """An impossible area: everything beyond a line, which is a floor of times or a ceiling of rates."""

    line: Sequence[Point]  # rising in x
    class_: str  # floor or claimedfloor
    words: str
    hatched: bool = True  # False: only the line, of hardware that others in the drawing surpass


def run_class(index: int) -> str:
    """CSS class of a run's colour."""
    return f"r{index % len(RUN_SHAPES)}"


def run_shape(index: int) -> str:
    """Mark of a run."""
    return RUN_SHAPES[index % len(RUN_SHAPES)]


def key(class_: str, shape: str) -> str:
    """A small mark for a legend."""
    return svg(14, 14, class_, [mark(shape, 7.0, 7.0, 4.0, class_)])


def zone_key(class_: str) -> str:
    """A small piece of a forbidden zone for a legend."""
    parts = [_pattern(f"key-{class_}", class_), _fill(0, 3, 14, 11, f"key-{class_}", class_)]
    parts.append(path([(0, 3), (14, 3)], class_))
    return svg(14, 14, class_, parts)


def plot(
    name: str, title: str, axes: tuple[str, str], series: Sequence[Series], zones: Sequence[Zone], above: bool
) -> str:
    """A panel with log axes.

    Args:
        name: id for the drawing's patterns, unique in the page.
        title: what stands over the panel.
        axes: names of both axes.
        series: the figures; at least one.
        zones: impossible areas, the most lenient first.
        above: the zones lie above their lines (rates) instead of below (times).
    """
    spots = [spot for one in series for spot in one.spots]
    xs = sorted({spot.x for spot in spots} | {x for zone in zones for x, _ in zone.line})
    ys = [y for s in spots for y in (s.y, s.low, s.high) if y is not None]
    ys += [y for zone in zones for _, y in zone.line]
    low, high = log_range(ys, pad=1.3)
    spread = math.sqrt(max(1.0, _LEAST_RANGE * low / high))
    low, high = low / spread, high * spread
    room = (high / low) ** 0.09  # so that a zone is seen even where nothing lies in it
    low, high = (low / room**0.5, high * room) if above else (low / room, high)
    inner = WIDTH - _LEFT - _RIGHT
    panel = Panel(_LEFT, _TOP, inner, _TALL, log_range(xs, pad=1.18 if len(xs) > 1 else 2.0), (low, high), log_x=True)
    for zone in zones:
        if zone.hatched:
            panel.parts += _zone(panel, f"{name}-{zone.class_}", zone, above)
    panel.axes(
        _ticks(panel, xs), axes[0], axes[1], x_text=lambda value: f"{value:,.0f}", y_text=lambda value: f"{value:,g}"
    )
    panel.parts.append(label(WIDTH - _RIGHT, 14, title, "end", "strong"))
    for zone in zones:
        panel.parts.append(path(_across(panel, zone.line), zone.class_))
        panel.parts.append(_words(panel, zone, above))
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * 5.0  # runs with similar figures stay distinguishable
        panel.parts += _series(panel, one, shift)
    return svg(WIDTH, _TOP + _TALL + _BELOW, f"{title}: {axes[1]} over {axes[0]}", panel.parts)


def _series(panel: Panel, one: Series, shift: float) -> Iterable[str]:
    at = [(panel.x(spot.x) + shift, panel.y(spot.y)) for spot in one.spots]
    if (
        len(at) > 1 and one.class_ != "claimed"
    ):  # lines of claims that cannot be would give them a shape that they have not
        yield path(at, one.class_)
    for spot, (x, y) in zip(one.spots, at, strict=True):
        if spot.low is not None and spot.high is not None:
            ends = f"M{x:.2f} {panel.y(spot.high):.2f}V{panel.y(spot.low):.2f}"
            yield tag("path", class_=f"line {one.class_}", d=ends)
        yield mark(one.shape, x, y, 4.5, one.class_, spot.title)
        if spot.impossible:
            yield tag("circle", title=spot.title, class_="ring", cx=x, cy=y, r=8.5)


def _zone(panel: Panel, name: str, zone: Zone, above: bool) -> Iterable[str]:
    """The hatched area between a line and the panel's edge."""
    line = _across(panel, zone.line)
    edge = panel.top if above else panel.top + panel.height
    outline = "".join(f"{'M' if i == 0 else 'L'}{x:.2f} {y:.2f}" for i, (x, y) in enumerate(line))
    outline += f"V{edge:.2f}H{line[0][0]:.2f}Z"
    base = "zone" if zone.class_ == "floor" else "claimedzone"
    yield _pattern(name, zone.class_)
    yield tag("path", class_=base, d=outline)
    yield tag("path", style=f"fill: url(#{name})", d=outline)


def _pattern(name: str, class_: str) -> str:
    """Hatching: one diagonal for our hardware, the other for the adapter's."""
    hatch, turn = ("hatch", 45) if class_ == "floor" else ("claimedhatch", -45)
    line = tag("line", class_=hatch, x1=0.0, y1=0.0, x2=0.0, y2=7.0, stroke_width=1.6)
    pattern = tag(
        "pattern",
        line,
        id=name,
        width=7.0,
        height=7.0,
        patternUnits="userSpaceOnUse",
        patternTransform=f"rotate({turn})",
    )
    return tag("defs", pattern)


def _fill(x: float, y: float, width: float, height: float, name: str, class_: str) -> str:
    base = rect(x, y, width, height, "zone" if class_ == "floor" else "claimedzone")
    hatching = tag(
        "rect", style=f"fill: url(#{name})", x=float(x), y=float(y), width=float(width), height=float(height)
    )
    return base + hatching


def _across(panel: Panel, line: Sequence[Point]) -> list[Point]:
    """Pixel positions of a line, run level to both edges."""
    at = panel.at(line)
    return [(panel.left, at[0][1]), *at, (panel.left + panel.width, at[-1][1])]


def _words(panel: Panel, zone: Zone, above: bool) -> str:
    """What a line is: ours inside its zone, the adapter's outside of its own, at opposite ends, where drawings have least."""
    ours = zone.class_ == "floor"
    left = ours == above
    y = panel.y(zone.line[0 if left else -1][1])
    y = max(y - 7, panel.top + 11) if ours == above else min(y + 15, panel.top + panel.height - 5)
    x = panel.left + 6 if left else panel.left + panel.width - 6
    return label(x, y, zone.words, "start" if left else "end", f"halo small {'floor' if ours else 'claimed'}")


def _ticks(panel: Panel, xs: Sequence[float]) -> list[float]:
    """The measured positions, less those whose labels would overlap."""
    kept: list[float] = []
    for x in xs:
        if not kept or panel.x(x) - panel.x(kept[-1]) >= _APART:
            kept.append(x)
    return kept
