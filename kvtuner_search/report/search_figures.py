"""Drawings of the search: the front on the search and on the test split, and the history of each target."""

from __future__ import annotations

from typing import Final

from kvtuner_search.calibration.record import CalibrationRecord, Compared, Trial
from kvtuner_search.report.layer_figures import WIDTH
from kvtuner_search.report.reading import (
    HistoryPoint,
    effective_bits,
    front,
    history,
    loss_interval,
    number,
)
from kvtuner_search.report.svg import Panel, label, linear_range, linear_ticks, log_range, mark, path, svg

SHAPES: Final = {  # origin -> mark; the CSS class of the same name gives the colour
    "uniform": "square",
    "proxy": "diamond",
    "fisher": "diamond",
    "preset": "triangle",
    "plain": "plus",
    "random": "cross",
}
SEARCHED_SHAPE: Final = "circle"
BITS_TICKS: Final = (2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16)  # of the logarithmic axis of effective bits


def shape(origin: str) -> str:
    """The mark of an origin."""
    return SHAPES.get(origin, SEARCHED_SHAPE)


def colour(origin: str) -> str:
    """The CSS class of an origin."""
    return f"o-{origin}" if origin in (*SHAPES, "refined") else "o-searched"


def origins(record: CalibrationRecord) -> list[str]:
    """Every origin in the record, in order of first appearance."""
    rows: list[Trial | Compared] = [*record.trials, *record.random_trials]
    rows += [row for target in record.targets for row in (target.chosen, *target.rivals)]
    return list(dict.fromkeys(row.origin for row in rows))


def key(origin: str) -> str:
    """A small mark for a legend."""
    return svg(14, 14, origin, [mark(shape(origin), 7, 7, 4, colour(origin))])


def pareto_figure(record: CalibrationRecord) -> str:
    """Loss against effective bits: complete trials on the search split, and compared settings with intervals on the test split."""
    model = record.model
    trials = [t for t in [*record.trials, *record.random_trials] if t.complete and not t.duplicate]
    chosen: dict[tuple[str, str], tuple[Compared, list[str]]] = {}  # one setting may be chosen for several targets
    for target in record.targets:
        row = target.chosen
        chosen.setdefault((row.name, row.origin), (row, []))[1].append(target.label)
    rivals = {(r.name, r.origin): r for t in record.targets for r in t.rivals}
    rivals = {key: row for key, row in rivals.items() if key not in chosen}
    tested = [row for row, _ in chosen.values()] + list(rivals.values())
    bits = [effective_bits(model, t.bytes_per_token) for t in trials] + [row.effective_bits for row in tested]
    losses = [t.loss for t in trials] + [row.loss for row in tested]
    x_range, y_range = log_range(bits, pad=1.06), log_range(losses, pad=1.6)
    wide, tall = (WIDTH - 64 - 50 - 8) / 2, 380.0
    left = Panel(64, 34, wide, tall, x_range, y_range, log_x=True)
    right = Panel(64 + wide + 50, 34, wide, tall, x_range, y_range, log_x=True)
    ticks = [bits for bits in BITS_TICKS if x_range[0] <= bits <= x_range[1]]
    left.axes(ticks, "effective bits", "KL to the 16-bit model, nats", "search split: every complete trial")
    right.axes(ticks, "effective bits", title="test split: chosen settings and their rivals")
    _search_split(left, record, trials)
    for row in rivals.values():
        _tested(right, row, shape(row.origin), 4, colour(row.origin), "")
    for row, names in chosen.values():
        name = ", ".join(names)
        _tested(right, row, "star", 5, "o-chosen", f"chosen for {name}: ")
        right.parts.append(label(right.x(row.effective_bits) + 10, right.y(row.loss) - 8, name, class_="strong"))
    return svg(WIDTH, tall + 76, "Loss against effective bits", [*left.parts, *right.parts])


def _search_split(panel: Panel, record: CalibrationRecord, trials: list[Trial]) -> None:
    model = record.model
    predicted = [(effective_bits(model, nbytes), loss) for nbytes, loss in record.proxy_front]
    low, high = panel.x_range
    predicted = [(x, y) for x, y in predicted if low <= x <= high and panel.y_range[0] <= y <= panel.y_range[1]]
    thin = predicted[:: max(1, len(predicted) // 200)]
    panel.parts.append(path(panel.at(thin), "predicted"))
    for each, class_ in ((record.trials, "searched"), (record.random_trials, "random")):
        panel.parts.append(path(panel.at(front(model, each)), f"{class_} front", step=True))
    for trial in trials:
        bits = effective_bits(model, trial.bytes_per_token)
        what = f"{trial.origin} trial {trial.number}: {bits:.3f} effective bits, KL {number(trial.loss)} nats"
        panel.mark(shape(trial.origin), bits, trial.loss, 4, colour(trial.origin), what)


def _tested(panel: Panel, row: Compared, drawn: str, size: float, class_: str, prefix: str) -> None:
    found = loss_interval(row)
    what = (
        f"{prefix}{row.name} ({row.origin}): {row.effective_bits:.3f} effective bits,"
        f" KL {number(found.value)} [{number(found.low)}, {number(found.high)}] nats"
    )
    panel.whisker(row.effective_bits, found.low, min(found.high, panel.y_range[1]), class_)
    panel.mark(drawn, row.effective_bits, row.loss, size, class_, what)


def history_figure(record: CalibrationRecord) -> str:
    """One panel a target: complete trials within it, the best so far, and the best so far of the random search."""
    targets = record.targets
    studies = (record.trials, record.random_trials)
    last = max((t.number for trials in studies for t in trials), default=0)
    across = 1 if len(targets) == 1 else 2
    wide, tall = (WIDTH - 64 - 8 - 64 * (across - 1)) / across, 190.0
    parts: list[str] = []
    for index, target in enumerate(targets):
        both = [history(record, target, trials) for trials in studies]
        values = [step.value for steps in both for step in steps]
        log = target.target_bits is not None
        y_range = log_range(values, pad=1.2) if log else linear_range(values)
        at = (64 + index % across * (wide + 64), 34 + index // across * (tall + 78))
        panel = Panel(*at, wide, tall, (0, max(last, 1)), y_range, log)
        unit = "KL, nats, search split" if log else "effective bits"
        panel.axes([t for t in linear_ticks(0, last, 8) if t == int(t)], "trial number", unit, target.label)
        for steps, class_ in ((both[1], "random"), (both[0], "searched")):
            _run(panel, steps, class_, last)
        parts += panel.parts
    rows = -(-len(targets) // across)
    return svg(WIDTH, rows * (tall + 78) + 10, "Search history", parts)


def _run(panel: Panel, steps: list[HistoryPoint], class_: str, last: int) -> None:
    if not steps:
        return
    best = [(float(step.number), step.best) for step in steps]
    panel.parts.append(path(panel.at([*best, (float(last), best[-1][1])]), f"{class_} front", step=True))
    for step in steps:
        what = f"{step.origin} trial {step.number}: {number(step.value)}; best so far {number(step.best)}"
        record = step.value == step.best
        panel.mark(shape(step.origin), step.number, step.value, 4.5 if record else 3, colour(step.origin), what)
