"""An ablation as one table. No torch."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtuner_search.bench.ablate.rows import Ablation, AblationRow, Figure, SpeedCell
from kvtuner_search.bench.ablate.variants import BASELINE
from kvtuner_search.profile.text import printable

_WIDEST: Final = 400  # columns where output is not a terminal: as many as the table needs
_STORED: Final = 40  # columns of the specs, which wrap
_QUALITY: Final = (
    "row",
    "stored",
    "bits",
    "capacity",
    "NLL",
    "difference [95 %]",
    "KL",
    "accuracy",
    "difference [95 %]",
    "flips",
)
_SPEED: Final = ("tokens", "TTFT ms", "tokens/s")


def print_ablation(result: Ablation, name: str) -> None:
    """Print the table and its notes on stdout.

    Args:
        result: the ablation.
        name: the model's name.
    """
    served = any(row.speed is not None for row in result.rows)
    console = Console()
    table = Table(title=Text(f"{printable(name)}: ways of storing the KV cache"))
    for title in (*_QUALITY, *(_SPEED if served else ())):
        left = title in ("row", "stored")
        table.add_column(
            title,
            justify="left" if left else "right",
            overflow="fold",
            max_width=_STORED if title == "stored" else None,
        )
    family = ""
    for row in result.rows:
        if family and row.family != family:
            table.add_section()
        family = row.family
        table.add_row(*(Text(cell) for cell in [*_quality(row), *(_speed(row) if served else [])]))
    if not console.is_terminal:
        console = Console(width=Console(width=_WIDEST).measure(table).maximum)
    console.print(table)
    for note in result.notes:
        console.print(Text(printable(note)))
    for row in result.rows:
        if row.speed is not None and row.speed.reason:
            console.print(Text(f"{row.name}: no speed: {printable(row.speed.reason)}"))


def _quality(row: AblationRow) -> list[str]:
    if row.quality is None or row.effective_bits is None or row.capacity is None:
        return [row.name, printable(row.reason), *["-"] * (len(_QUALITY) - 2)]
    accuracy, baseline = row.quality.accuracy, row.name == BASELINE
    mark = "*" if row.context is not None else ""
    return [
        row.name + mark,
        printable(row.specs),
        f"{row.effective_bits:.3f}",
        f"{row.capacity:.2f}x",
        f"{row.quality.nll.value:.4f}",
        "" if baseline else _difference(row.quality.nll, 4),
        "" if baseline else f"{row.quality.kl.value:.4f}",
        "-" if accuracy is None else f"{accuracy.value:.3f}",
        "" if accuracy is None or baseline else _difference(accuracy, 3),
        "" if accuracy is None or baseline else f"-{accuracy.lost} +{accuracy.gained}",
    ]


def _difference(figure: Figure, digits: int) -> str:
    delta = figure.value - figure.baseline
    return f"{delta:+.{digits}f} [{figure.ci_low:+.{digits}f}, {figure.ci_high:+.{digits}f}]"


def _speed(row: AblationRow) -> list[str]:
    if row.speed is None:
        return ["-", *["not in serving" if not row.servable and row.quality is not None else "-"] * 2]
    cells = {cell.section: cell for cell in row.speed.cells}
    capacity = f"{row.speed.token_capacity:,}" if row.speed.token_capacity else "-"
    return [capacity, _cell(cells.get("ttft"), "ttft_ms"), _cell(cells.get("throughput"), "tokens_per_second")]


def _cell(cell: SpeedCell | None, name: str) -> str:
    return "no speed" if cell is None else f"{getattr(cell, name):.1f}"
