"""Inline SVG: elements as escaped text, scales, ticks and a plot panel. Colours are CSS classes, so that one drawing suits both themes."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvtuner_search.profile.text import printable

Point = tuple[float, float]
MARKS: Final = ("circle", "square", "diamond", "triangle", "cross", "plus", "star")


def escaped(value: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(printable(value), quote=True)


def tag(name: str, content: str = "", title: str = "", **attributes: object) -> str:
    """An element; ``content`` is markup, ``title`` and attributes are text. Names as in ``class_`` and ``stroke_width``; empty ones are left out."""
    pairs = []
    for key, value in attributes.items():
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escaped(value)
        if shown:
            pairs.append(f' {key.rstrip("_").replace("_", "-")}="{shown}"')
    inner = (f"<title>{escaped(title)}</title>" if title else "") + content
    return f"<{name}{''.join(pairs)}>{inner}</{name}>" if inner else f"<{name}{''.join(pairs)}/>"


def label(x: float, y: float, content: object, anchor: str = "start", class_: str = "", style: str = "") -> str:
    """A line of text."""
    return tag("text", escaped(content), class_=class_, style=style, x=float(x), y=float(y), text_anchor=anchor)


def rect(x: float, y: float, width: float, height: float, class_: str, title: str = "", opacity: object = "") -> str:
    """A filled rectangle."""
    x, y, width, height = float(x), float(y), float(width), float(height)
    return tag("rect", "", title, class_=class_, fill_opacity=opacity, x=x, y=y, width=width, height=height)


def svg(width: float, height: float, name: str, parts: Iterable[str]) -> str:
    """A whole drawing; ``name`` is the text for screen readers."""
    content = "".join(parts)
    return tag("svg", content, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=name)


def mark(shape: str, x: float, y: float, size: float, class_: str, title: str = "") -> str:
    """A point of one of MARKS, about ``2 * size`` wide."""
    if shape == "circle":
        return tag("circle", title=title, class_=class_, cx=x, cy=y, r=size)
    corners: dict[str, Sequence[Point]] = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "star": [
            (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
            for i in range(10)
            for r in (1.7 if i % 2 == 0 else 0.7,)
        ],
    }
    if shape in corners:
        points = " ".join(f"{x + size * dx:.2f},{y + size * dy:.2f}" for dx, dy in corners[shape])
        return tag("polygon", title=title, class_=class_, points=points)
    arms = {"cross": ((-1, -1, 1, 1), (-1, 1, 1, -1)), "plus": ((-1.2, 0, 1.2, 0), (0, -1.2, 0, 1.2))}[shape]
    path = "".join(
        f"M{x + size * a:.2f} {y + size * b:.2f}L{x + size * c:.2f} {y + size * d:.2f}" for a, b, c, d in arms
    )
    return tag("path", title=title, class_=f"{class_} stroke", d=path)


def path(points: Sequence[Point], class_: str, step: bool = False) -> str:
    """A line through pixel positions; with ``step`` it runs level to the next x before it moves in y."""
    if not points:
        return ""
    parts = [f"M{points[0][0]:.2f} {points[0][1]:.2f}"]
    for x, y in points[1:]:
        parts.append(f"H{x:.2f}V{y:.2f}" if step else f"L{x:.2f} {y:.2f}")
    return tag("path", class_=f"line {class_}", d="".join(parts))


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within the range, about ``count``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range, with 2 and 5 between them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def log_range(values: Iterable[float], pad: float = 1.25) -> tuple[float, float]:
    """A range for a log axis that holds all positive values with room around them; (0.1, 1) if there is none."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return (min(positive) / pad, max(positive) * pad) if positive else (0.1, 1.0)


def linear_range(values: Iterable[float], pad: float = 0.05) -> tuple[float, float]:
    """A range for a linear axis with room around the values."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    room = pad * (max(found) - min(found)) or 0.5
    return min(found) - room, max(found) + room


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    """Where a value lies between the ends of an axis, 0 to 1."""
    low, high = ends
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


@dataclass
class Panel:
    """A plot area at (left, top) with two axes; values below a log axis, including zero and negative ones, are drawn at its lower edge."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = True
    log_x: bool = False
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Pixel position of a value on the x axis."""
        return self.left + self.width * _share(value, self.x_range, self.log_x)

    def y(self, value: float) -> float:
        """Pixel position of a value on the y axis."""
        return self.top + self.height * (1 - _share(value, self.y_range, self.log_y))

    def at(self, points: Iterable[Point]) -> list[Point]:
        """Pixel positions of points."""
        return [(self.x(x), self.y(y)) for x, y in points]

    def axes(
        self,
        x_ticks: Iterable[float],
        x_name: str,
        y_name: str = "",
        title: str = "",
        x_text: Callable[[float], str] = lambda value: f"{value:g}",
        y_text: Callable[[float], str] = lambda value: f"{value:.3g}",
    ) -> None:
        """Grid, ticks and names."""
        bottom, right = self.top + self.height, self.left + self.width
        for tick in log_ticks(*self.y_range) if self.log_y else linear_ticks(*self.y_range, 4):
            y = self.y(tick)
            self.parts.append(tag("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y))
            self.parts.append(label(self.left - 6, y + 3.5, y_text(tick), "end"))
        for tick in x_ticks:
            x = self.x(tick)
            self.parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            self.parts.append(label(x, bottom + 16, x_text(tick), "middle"))
        self.parts.append(tag("line", class_="axis", x1=self.left, x2=right, y1=bottom, y2=bottom))
        self.parts.append(label(self.left + self.width / 2, bottom + 32, x_name, "middle"))
        if y_name:
            self.parts.append(label(self.left, self.top - 8, y_name))
        if title:
            self.parts.append(label(right, self.top - 8, title, "end", "strong"))

    def mark(self, shape: str, x: float, y: float, size: float, class_: str, title: str = "") -> None:
        """A point at data position (x, y)."""
        self.parts.append(mark(shape, self.x(x), self.y(y), size, class_, title))

    def whisker(self, x: float, low: float, high: float, class_: str) -> None:
        """A vertical interval at data position x."""
        at, top, bottom = self.x(x), self.y(high), self.y(low)
        caps = "".join(f"M{at - 3:.2f} {y:.2f}h6" for y in (top, bottom))
        self.parts.append(tag("path", class_=f"line {class_}", d=f"M{at:.2f} {top:.2f}V{bottom:.2f}{caps}"))
