"""Drawings with one column a layer, all on the same horizontal grid: stored bits, sensitivity, and error of the attention output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from kvtuner_kernels.layout import CODE_BITS, LayerSpec, TensorSpec
from kvtuner_search.calibration.record import SIDES, CalibrationRecord, Compared, PairErrors, TargetRecord
from kvtuner_search.report.reading import (
    alone_losses,
    chosen_class,
    number,
    specs,
    storage_classes,
)
from kvtuner_search.report.svg import (
    Panel,
    label,
    log_range,
    log_ticks,
    mark,
    path,
    rect,
    svg,
    tag,
)

WIDTH: Final = 1100.0  # SVG units of every drawing
LEFT: Final = 86.0  # of the first layer's column
LANE: Final = 44.0  # height of the tallest bar
ROW: Final = 21.0  # height of a row of the heat map
VARIANTS: Final = (  # of keys: (centred, rotated), CSS class, mark, name
    ((False, False), "v0", "cross", "as they are"),
    ((True, False), "v1", "square", "centred"),
    ((True, True), "v2", "circle", "centred and rotated"),
)


class Columns:
    """The positions of the layers' columns."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.step = (WIDTH - LEFT - 8) / layers
        if layers < 12:  # few layers: no need to fill the page
            self.step = min(self.step, 84.0)

    @property
    def right(self) -> float:
        return self.middle(self.layers - 1) + self.step / 2

    def left(self, layer: int) -> float:
        return LEFT + layer * self.step

    def middle(self, layer: int) -> float:
        return LEFT + (layer + 0.5) * self.step

    def labels(self, y: float) -> Iterator[str]:
        """Layer numbers, as many as fit."""
        every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * self.step >= 18 or n >= self.layers)
        yield label(LEFT - 8, y, "layer", "end")
        for layer in range(0, self.layers, every):
            yield label(self.middle(layer), y, layer, "middle")


class Scale:
    """A logarithmic scale of strengths in [0, 1] for positive values; zero and negative values have no strength.

    Args:
        values: values that must fit.
        decades: range shown below the largest value; the whole range if not given.
    """

    def __init__(self, values: Sequence[float], decades: float = math.inf) -> None:
        self.low, self.high = log_range(values, pad=1.0)
        self.low = max(self.low, self.high / 10.0 ** min(decades, 300.0))
        self.span = math.log(self.high / self.low) or 1.0

    def share(self, value: float) -> float:
        """Where a value lies between the ends."""
        return math.log(max(value, self.low) / self.low) / self.span if value > 0 else 0.0


def side_bits(spec: TensorSpec, head_dim: int) -> float:
    """Bits per channel of one side with its metadata; for bands without the unused bits of their words, which keys and values share."""
    return (
        spec.mean_bits + 8 * spec.metadata_bytes(head_dim) / head_dim if spec.banded else spec.effective_bits(head_dim)
    )


def bits_figure(record: CalibrationRecord, row: Compared) -> str:
    """Stored bits of keys (up) and values (down), and below them the effective bits of each layer."""
    model, layers = record.model, specs(row)
    columns, gap = Columns(len(layers)), 1.0
    head_dim, heads = model.head_dim, model.num_kv_heads
    stored = [spec for target in record.targets for layer in specs(target.chosen) for spec in (layer.key, layer.value)]
    most = max(2.0, *(side_bits(spec, head_dim) for spec in stored))
    middle = LANE + 2
    parts = [
        label(LEFT - 8, middle - LANE / 2 + 4, "keys", "end"),
        label(LEFT - 8, middle + LANE / 2 + 8, "values", "end"),
    ]
    for index, layer in enumerate(layers):
        x = columns.left(index) + gap / 2
        for spec, up, side in ((layer.key, True, "keys"), (layer.value, False, "values")):
            bits = side_bits(spec, head_dim)
            tall = max(2.0, LANE * math.log2(bits) / math.log2(most))
            y = middle - tall if up else middle + 4
            what = f"layer {index} {side}: {spec}, "
            what += f"{spec.mean_bits:g} bits on average" if spec.banded else f"{bits:.3f} effective bits"
            parts.append(rect(x, y, columns.step - gap, tall, "bb" if spec.banded else f"b{spec.bits}", what))
            text = f"{spec.mean_bits:.3g}" if spec.banded else str(spec.bits)
            if columns.step >= 2 + 5 * len(text) and tall >= 12:
                size = f"font-size: {min(12.0, columns.step + 1):g}px"
                at = y + tall - 5 if up else y + 11
                parts.append(label(columns.middle(index), at, text, "middle", "onbar", style=size))
    top = middle + LANE + 16
    parts += _effective(layers, heads, head_dim, columns, top, row.effective_bits)
    parts += columns.labels(top + 44)
    return svg(WIDTH, top + 50, f"Bits of keys and values by layer: {row.name}", parts)


def _effective(
    layers: list[LayerSpec], heads: int, head_dim: int, columns: Columns, top: float, average: float
) -> Iterator[str]:
    """A strip with the effective bits of each layer: figures where they fit, a stepped line otherwise."""
    bits = [layer.effective_bits(heads, head_dim) for layer in layers]
    yield label(LEFT - 8, top + 10, "effective", "end")
    yield label(LEFT - 8, top + 22, "bits", "end")
    if columns.step >= 28:
        digits = 3 if columns.step >= 38 else 2
        for index, value in enumerate(bits):
            yield label(columns.middle(index), top + 16, f"{value:.{digits}f}", "middle", "ink")
        return
    low, high = min(bits), max(bits)

    def height(value: float) -> float:
        return top + 26 - 24 * ((value - low) / (high - low) if high > low else 0.5)

    line = [(columns.left(i), height(value)) for i, value in enumerate(bits)]
    yield tag("line", class_="grid", x1=LEFT, x2=columns.right, y1=height(average), y2=height(average))
    yield path([*line, (columns.right, line[-1][1])], "accent", step=True)
    for index, value in enumerate(bits):
        yield rect(columns.left(index), top, columns.step, 28, "cover", f"layer {index}: {value:.3f} effective bits")
    yield label(columns.right, top - 2, f"{low:.3f} to {high:.3f}, together {average:.3f}", "end")


def heat_map(record: CalibrationRecord, shown: TargetRecord) -> str:
    """Layer-alone KL of every storage class of keys and of values, on a log scale; dots mark what ``shown``, a target, stores."""
    columns = Columns(len(record.sensitivity))
    names = {side: storage_classes(record, side) for side in SIDES}
    table = {(side, name): alone_losses(record, side, name) for side in names for name in names[side]}
    scale = Scale([x for row in table.values() for x in row if x is not None])
    picked = {
        (target.label, side): chosen_class(record, target.chosen, side) for target in record.targets for side in names
    }
    parts, y = [], 16.0
    for side, classes in names.items():
        parts.append(label(LEFT - 8, y - 4, side, "end", "strong"))
        for name in classes:
            parts.append(label(LEFT - 8, y + ROW / 2 + 4, name, "end"))
            for layer, loss in enumerate(table[side, name]):
                if loss is None:
                    continue
                users = [t.label for t in record.targets if picked[t.label, side][layer] == name]
                spec = record.sensitivity[layer].side(side)[name].spec
                what = f"layer {layer} {side} as {name} ({spec}): KL {number(loss)} nats"
                what += f"; chosen for {', '.join(users)}" if users else ""
                strength = scale.share(loss)
                opacity = round(0.06 + 0.94 * strength, 3)
                parts.append(rect(columns.left(layer), y, columns.step - 1, ROW - 1, "heat", what, opacity))
                strong = "onheat" if strength > 0.66 else "ink"
                if columns.step >= 46:
                    at = columns.middle(layer) + 3
                    parts.append(label(at, y + ROW / 2 + 3.5, _short(loss), "middle", f"{strong} small"))
                if shown.label in users:
                    radius = min(3.0, columns.step / 3)
                    at = columns.left(layer) + (6 if columns.step >= 46 else columns.step / 2 - 0.5)
                    parts.append(mark("circle", at, y + ROW / 2 - 0.5, radius, f"dot {strong}", what))
            y += ROW
        y += 22
    parts += columns.labels(y - 8)
    parts += heat_legend(y + 18, scale, "KL, nats")
    return svg(WIDTH, y + 44, "Layer-alone KL by layer and storage class", parts)


def _short(loss: float) -> str:
    return f"{loss:.0e}".replace("e+00", "").replace("e+0", "e+").replace("e-0", "e-")


def heat_legend(y: float, scale: Scale, name: str) -> Iterator[str]:
    """A stepped ramp with its decades."""
    wide, steps = 320.0, 32
    yield label(LEFT - 8, y + 10, name, "end")
    for i in range(steps):
        yield rect(
            LEFT + i * wide / steps, y, wide / steps, 10, "heat", opacity=round(0.06 + 0.94 * (i + 0.5) / steps, 3)
        )
    for tick in log_ticks(scale.low, scale.high):
        yield label(LEFT + wide * scale.share(tick), y + 23, _short(tick), "middle")


def output_error(record: CalibrationRecord) -> str:
    """e_o by layer of keys at the narrow widths (4 and 2 bits), values at 16 bits: as they are, centred, and centred and rotated."""
    found = [_key_errors(layer.errors) for layer in record.sensitivity]
    widths = sorted({bits for errors in found for bits, _, _ in errors if bits in CODE_BITS[:-1]}, reverse=True)
    columns, parts, tall = Columns(len(found)), [], 150.0
    values = [error for errors in found for (bits, _, _), error in errors.items() if bits in widths]
    if not values:
        return ""
    y_range = log_range(values)
    for index, bits in enumerate(widths):
        x_range = (-0.5, len(found) - 0.5)
        panel = Panel(LEFT, 24 + index * (tall + 62), columns.right - LEFT, tall, x_range, y_range)
        panel.axes([], "", f"keys at {bits} bits: relative error of the attention output, e_o")
        panel.parts += columns.labels(panel.top + tall + 16)
        for (centred, rotated), class_, shape, name in VARIANTS:
            key = (bits, centred, rotated)
            points = [(layer, errors[key]) for layer, errors in enumerate(found) if key in errors]
            panel.parts.append(path(panel.at(points), class_))
            for layer, error in points:
                what = f"layer {layer}, {bits}-bit keys {name}: e_o {number(error)}"
                panel.mark(shape, layer, error, min(3.4, columns.step / 2.5), class_, what)
        parts += panel.parts
    return svg(WIDTH, len(widths) * (tall + 62) - 10, "Error of the attention output by layer", parts)


def _key_errors(rows: Sequence[PairErrors]) -> dict[tuple[int, bool, bool], float]:
    """e_o of a layer's key variants by (bits, centred, rotated), values at 16 bits; asymmetric and the largest groups, if measured."""
    best: dict[tuple[int, bool, bool], tuple[bool, int, float]] = {}
    for name, *_, error in rows:
        key, _, value = name.partition("/")
        if value != "16" or key == "16":
            continue
        spec = TensorSpec.parse(key)
        if spec.banded:  # neither of 2 nor of 4 bits
            continue
        rank = (not spec.symmetric, spec.group_size, float(error))
        where = (spec.bits, spec.centred, spec.rotated)
        best[where] = max(best.get(where, rank), rank, key=lambda r: r[:2])
    return {where: error for where, (_, _, error) in best.items()}
