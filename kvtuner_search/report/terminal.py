"""The terminal's summary at the end of a calibration; readable at 100 columns and without colour."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any, Final, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtuner_kernels.layout import TensorSpec
from kvtuner_search.calibration.record import SIDES, CalibrationRecord, Compared, TargetRecord
from kvtuner_search.profile.terminal import bits_style
from kvtuner_search.profile.text import printable
from kvtuner_search.report import reading
from kvtuner_search.report.reading import change, number

_VERDICT_STYLE: Final = {"better": "green", "worse": "red", "inconclusive": "yellow"}
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 100  # columns where the output is not a terminal
_STRIP: Final = 64  # layers in one line
_LEAD: Final = 20  # characters before them
_RIVALS: Final = (
    ("proxy", "best proxy"),
    ("uniform", "best uniform"),
    ("random", "random"),
)  # (origin, head of its column)


def print_summary(record: CalibrationRecord) -> None:
    """Print the summary on standard output: in a file or a pipe 100 columns wide, without spaces at the ends of lines."""
    console = Console()
    summary(record, console if console.is_terminal else Console(file=cast(IO[str], _Trimmed(sys.stdout)), width=_WIDTH))


class _Trimmed:
    """A text stream without the spaces by which rich fills a table's lines; rich writes whole lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(" +$", "", text, flags=re.MULTILINE))


def summary(record: CalibrationRecord, console: Console) -> None:
    """Print, for every target, what was chosen, how it compares, and why; then what the run cost."""
    model, samples, tokens = record.model, *reading.test_samples(record)
    console.print(Text.assemble((f"Calibration of {printable(model.id)}", "bold"), f"  {printable(record.tool)}"))
    if model.id == "reference":
        console.print(Text(reading.REFERENCE_LABEL))
    console.print(Text(reading.OFFLINE_LABEL))
    console.print(
        Text(
            f"{reading.shape(model)}; test split: {samples:,} samples, {tokens:,} tokens.",
            "dim",
        )
    )
    for target in record.targets:
        _target(console, record, target)
    _cost(console, record)


def _target(console: Console, record: CalibrationRecord, target: TargetRecord) -> None:
    row = target.chosen
    bits, loss = row.effective_bits, reading.loss_interval(row)
    console.print()
    console.rule(Text.assemble((printable(target.label), "bold")), align="left", style="dim", characters="─")
    console.print(
        Text.assemble(
            (f"{bits:.3f} effective bits", "bold"),
            f", {row.bytes_per_token:,} bytes per token of {reading.raw_bytes(record.model):,}: ",
            (f"{16 / bits:.2f} times the tokens", "bold"),
            " of a 16-bit cache",
        )
    )
    for index, sentence in enumerate(reading.findings(record, target)):
        _bullet(console, sentence, "bold" if index == 0 else "")
    console.print()
    _compared(console, record, target, loss)
    _sources(console, record, target)
    console.print()
    _layers(console, record, row)


def _bullet(console: Console, sentence: str, style: str) -> None:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column()
    line.add_column(overflow="fold")
    line.add_row(Text("-"), Text(printable(sentence), style))
    console.print(line)


def _compared(console: Console, record: CalibrationRecord, target: TargetRecord, loss: reading.Interval) -> None:
    chosen = target.chosen
    table = _table(
        "setting",
        "from",
        "bits",
        "KL, nats",
        f"chosen - this [{reading.confidence(record)}]",
        "chosen is",
        "bytes",
        right=(2, 3, 4, 6),
    )
    interval = f"KL [{number(loss.low)}, {number(loss.high)}]"
    table.add_row(*_cells(chosen), Text(interval, "bold"), Text("chosen", "bold"), "")
    for row in sorted(target.rivals, key=lambda r: (r.effective_bits, r.loss)):
        verdict = Text(reading.verdict_words(row), _VERDICT_STYLE.get(row.verdict, ""))
        table.add_row(*_cells(row), change(reading.paired(row)), verdict, reading.bytes_change(row, chosen))
    console.print(table)


def _cells(row: Compared) -> Iterable[Text]:
    yield Text(printable(row.name))
    yield Text(printable(row.origin))
    yield Text(f"{row.effective_bits:.3f}")
    yield Text(number(row.loss))


def _sources(console: Console, record: CalibrationRecord, target: TargetRecord) -> None:
    """NLL and accuracy of the chosen setting by source, as change from 16 bits, and the best rivals' changes beside it."""
    rivals = {head: row for origin, head in _RIVALS if (row := reading.best_rival(record, target, origin)) is not None}
    others = [{(m.metric, m.data): m.value - m.baseline for m in row.measures} for row in rivals.values()]
    heads = ("test split", "16 bits", f"chosen: change [{reading.confidence(record)}]", *rivals)
    table = _table(*heads, right=range(1, len(heads)))
    for metric, name in (("nll", "NLL"), ("accuracy", "accuracy")):
        for m in target.chosen.measures:
            if m.metric != metric:
                continue
            which = (metric, m.data)
            table.add_row(
                Text(printable(f"{name} {m.data}")),
                number(m.baseline),
                change(reading.measured_change(m), 2),
                *(number(found.get(which), "+", 2) for found in others),
            )
    if table.row_count:
        console.print()
        console.print(table)


def _layers(console: Console, record: CalibrationRecord, row: Compared) -> None:
    """One character a layer: bits of keys and values, and how much each side hurts alone in its cheapest class."""
    layers = reading.specs(row)
    sides = {}
    for side in SIDES:
        name = reading.storage_classes(record, side)[-1]
        sides[side] = (name, reading.alone_losses(record, side, name))
    known = [x for _, losses in sides.values() for x in losses if x is not None and x > 0]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    for start in range(0, len(layers), _STRIP):
        part = range(start, min(start + _STRIP, len(layers)))
        console.print(Text("layer".ljust(_LEAD) + _ruler(part), "dim"))
        for side, (name, losses) in sides.items():
            line = Text(f"{side} bits".ljust(_LEAD))
            for i in part:
                line.append(*_mark(layers[i].key if side == "keys" else layers[i].value))
            console.print(line)
            levels = "".join(_level(losses[i], low, high) for i in part)
            console.print(Text(f"  KL at {name}".ljust(_LEAD) + levels, "dim"))
    console.print(
        Text(
            f"F is 16 bits{'; a side in bands shows the rounded mean of its bits' if reading.has_bands(row) else ''}. KL: of the model's output with only that side of that layer stored in that class, on a log scale from"
            f" {number(low)} ({_LEVELS[0]}) to {number(high)} ({_LEVELS[-1]}) nats.",
            "dim",
        )
    )


def _ruler(part: range) -> str:
    """Layer numbers above their columns, every ten."""
    line = [" "] * (len(part) + 3)
    for layer in part:
        if layer % 10 == 0 or layer == part.start:
            line[layer - part.start : layer - part.start + len(str(layer))] = str(layer)
    return "".join(line).rstrip()


def _mark(spec: TensorSpec) -> tuple[str, str]:
    """One character for a side's bits, and its style."""
    return "F" if spec.raw else f"{spec.mean_bits:.0f}", bits_style(spec.mean_bits)


def _level(loss: float | None, low: float, high: float) -> str:
    if loss is None:
        return " "
    if loss <= low or high <= low:
        return _LEVELS[0]
    return _LEVELS[min(len(_LEVELS) - 1, int(len(_LEVELS) * math.log(loss / low) / math.log(high / low)))]


def _cost(console: Console, record: CalibrationRecord) -> None:
    stages = ", ".join(f"{printable(name)} {seconds:.1f}" for name, seconds in record.seconds.items())
    counts = ", ".join(f"{c.origin} {c.complete} of {c.complete + c.stopped}" for c in reading.trial_counts(record))
    console.print()
    console.rule(Text("cost", "bold"), align="left", style="dim", characters="─")
    console.print(Text(printable(reading.cost(record))))
    console.print(Text(f"Seconds by stage: {stages}."))
    console.print(
        Text(f"Trials that ran to the end (the others, poor or over the budget, were stopped early): {counts}.")
    )


def _table(*heads: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    for index, head in enumerate(heads):
        figure = index in right
        table.add_column(Text(head), justify="right" if figure else "left", overflow="fold", no_wrap=figure)
    return table
