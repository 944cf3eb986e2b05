"""Drawings of bands, one column per layer: each band's bits, its worth, and its worth head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.places import BANDS, MAX_BAND_BITS
from kvtuner_search.calibration.record import SIDES, CalibrationRecord, TargetRecord
from kvtuner_search.report.layer_figures import LEFT, WIDTH, Columns, Scale, heat_legend
from kvtuner_search.report.reading import band_worth, head_worth, number, specs
from kvtuner_search.report.svg import label, rect, svg, tag

ROW: Final = 16.0  # height of a band's row
_DIGITS: Final = 13.0  # width of the narrowest column that has room for a digit
_ACROSS: Final = 10  # small panels in one row
_PANEL: Final = (92.0, 62.0)  # width and height of a small panel
_DECADES: Final = 6  # of worth that a figure shows; smaller values lie on its edge


def bits_by_band(layers: Sequence[LayerSpec]) -> str:
    """The bits of each band of keys and of values; sides without bands are one block with their own bits."""
    columns, y = Columns(len(layers)), 6.0
    parts: list[str] = []
    for side in SIDES:
        parts += _names(side, y)
        for index, layer in enumerate(layers):
            spec = layer.key if side == "keys" else layer.value
            parts += _bands(columns, index, y, spec, f"layer {index} {side}")
        y += BANDS * ROW + 14
    parts += columns.labels(y + 4)
    return svg(WIDTH, y + 12, "Bits of each band of keys and values by layer", parts)


def _names(side: str, y: float) -> Iterator[str]:
    """The side, and the numbers of its bands."""
    yield label(0, y + 11, side, class_="strong")
    yield label(0, y + 26, "by band")
    for band in range(BANDS):
        yield label(LEFT - 8, y + band * ROW + 11.5, band + 1, "end")


def _bands(columns: Columns, layer: int, y: float, spec: TensorSpec, name: str) -> Iterator[str]:
    x, wide, middle = columns.left(layer), columns.step - 1, columns.middle(layer)
    if not spec.banded:
        yield rect(x, y, wide, BANDS * ROW - 1, f"b{spec.bits}", f"{name}: {spec}, without bands", 0.45)
        if columns.step >= _DIGITS:
            yield label(middle, y + BANDS * ROW / 2 + 4, spec.bits, "middle", "ink small")
        return
    for band, bits in enumerate(spec.bands):
        top = y + band * ROW
        opacity = round(0.08 + 0.92 * bits / MAX_BAND_BITS, 3)
        yield rect(x, top, wide, ROW - 1, "band", f"{name}, band {band + 1}: {bits} bits", opacity)
        if columns.step >= _DIGITS:
            yield label(middle, top + 11.5, bits, "middle", "onheat small" if opacity > 0.5 else "ink small")


def worth_figure(record: CalibrationRecord, shown: TargetRecord) -> str:
    """What each band is worth, on a log scale; the digits are the bits that ``shown``, a target, gives it."""
    columns, stored = Columns(len(record.sensitivity)), specs(shown.chosen)
    found = {side: band_worth(record, side) for side in SIDES}
    scale = Scale([x for rows in found.values() for row in rows for x in row or []], _DECADES)
    y = 6.0
    parts: list[str] = []
    for side, rows in found.items():
        parts += _names(side, y)
        for layer, row in enumerate(rows):
            spec = stored[layer].key if side == "keys" else stored[layer].value
            for band, worth in enumerate(row or []):
                what = f"layer {layer} {side}, band {band + 1}: {number(worth)} nats"
                what += f"; {spec.bands[band]} bits for {shown.label}" if spec.banded else ""
                top, share = y + band * ROW, scale.share(worth)
                parts.append(
                    rect(
                        columns.left(layer), top, columns.step - 1, ROW - 1, "heat", what, round(0.06 + 0.94 * share, 3)
                    )
                )
                if spec.banded and columns.step >= _DIGITS:
                    strong = "onheat" if share > 0.6 else "ink"
                    parts.append(
                        label(columns.middle(layer), top + 11.5, spec.bands[band], "middle", f"{strong} small")
                    )
        y += BANDS * ROW + 14
    parts += columns.labels(y + 4)
    parts += heat_legend(y + 20, scale, "worth, nats")
    return svg(WIDTH, y + 50, "Worth of each band of keys and values by layer", parts)


def head_figure(record: CalibrationRecord) -> str:
    """What bands are worth head by head: a small panel for each side of each layer, a line for each KV head; empty if it was not recorded."""
    found = {side: head_worth(record, side) for side in SIDES}
    values = [x for layers in found.values() for heads in layers for row in heads or [] for x in row]
    if not values:
        return ""
    scale, y = Scale(values, _DECADES), 0.0
    parts: list[str] = []
    tall = _PANEL[1]
    for side, layers in found.items():
        parts.append(
            label(0, y + 12, f"{side}: {number(scale.low)} to {number(scale.high)} nats in each panel", class_="strong")
        )
        y += 20
        for layer, heads in enumerate(layers):
            x, top = layer % _ACROSS * WIDTH / _ACROSS, y + layer // _ACROSS * (tall + 22)
            parts += _panel(x, top, f"layer {layer} {side}", heads or [], scale)
        y += -(-len(layers) // _ACROSS) * (tall + 22) + 12
    return svg(WIDTH, y, "Worth of each band by layer and KV head", parts)


def _panel(x: float, y: float, name: str, heads: Sequence[Sequence[float]], scale: Scale) -> Iterator[str]:
    wide, tall = _PANEL
    yield tag("rect", class_="cover frame", x=x, y=y + 14, width=wide, height=tall)
    yield label(x, y + 10, name, class_="small")
    for head, row in enumerate(heads):
        step = wide / (len(row) or 1)
        points = [(x + (i + 0.5) * step, y + 14 + tall * (1 - scale.share(worth))) for i, worth in enumerate(row)]
        path = "M" + "L".join(f"{px:.2f} {py:.2f}" for px, py in points)
        what = f"{name}, head {head}: {', '.join(map(number, row))} nats"
        yield tag("path", "", what, class_="line accent head", d=path)
