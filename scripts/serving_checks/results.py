"""What a run found: records, their table, and a JSON file that is written again after every step."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Kind = Literal["check", "target", "figure"]


@dataclass(frozen=True)
class Record:
    """One line of the table."""

    part: str
    name: str
    value: str  # as shown
    kind: Kind = "figure"  # a check that fails is an error, a target that is missed is only said, a figure has neither
    met: bool | None = None  # None for a figure
    wanted: str = ""  # the condition, as shown


def check(part: str, name: str, met: bool, value: str, wanted: str) -> Record:
    """Something that must hold."""
    return Record(part, name, value, "check", met, wanted)


def at_least(part: str, name: str, value: float, target: float, unit: str = "x") -> Record:
    """A target for a figure that should be large."""
    return Record(part, name, f"{value:.3f}{unit}", "target", value >= target, f"at least {target:g}{unit}")


def at_most(part: str, name: str, value: float, target: float, unit: str = "x") -> Record:
    """A target for a figure that should be small."""
    return Record(part, name, f"{value:.3f}{unit}", "target", value <= target, f"at most {target:g}{unit}")


def failed(records: Sequence[Record]) -> list[Record]:
    """The checks that do not hold."""
    return [record for record in records if record.kind == "check" and not record.met]


@dataclass
class Run:
    """One run of the command; ``path`` holds it and the runs before it."""

    path: Path | None
    about: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # server or process -> measurement -> figures
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._earlier = json.loads(self.path.read_text())["runs"] if self.path and self.path.exists() else []

    def note(self, subject: str, measurement: str, figures: Any) -> None:
        """Keep what was measured on a server or process."""
        self.measured.setdefault(subject, {})[measurement] = figures
        self.save()

    def add(self, records: Sequence[Record]) -> None:
        """Keep a part's records."""
        self.records += records
        self.save()

    def save(self) -> None:
        """Write all runs; a reader sees the old file or the new one."""
        if self.path is None:
            return
        run = {
            **self.about, "seconds": round(time.monotonic() - self.began, 1),
            "records": [asdict(record) for record in self.records], "measured": self.measured,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps({"runs": [*self._earlier, run]}, indent=1) + "\n")
        partial.replace(self.path)

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table("Part", "What", "Found", "Wanted", "")
        marks = {True: "ok", False: "[red]FAILED[/red]", None: ""}
        for record in self.records:
            mark = marks[record.met] if record.kind != "target" or record.met else "[yellow]missed[/yellow]"
            table.add_row(record.part, record.name, record.value, record.wanted, mark)
        console.print(table)
