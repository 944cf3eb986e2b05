"""The cells of a preset that a run measures."""

from __future__ import annotations

from collections.abc import Sequence

from kvtuner_search.bench.presets import PRESETS, CellPlan
from kvtuner_search.bench.record import RENAMED
from kvtuner_search.errors import UsageError


def choose(preset: str, sections: Sequence[str] = ()) -> list[CellPlan]:
    """The cells of a preset, or those of some of its tables.

    Raises:
        UsageError: if there is no such preset, or no cell is left.
    """
    if preset in RENAMED:
        raise UsageError(f"the preset {preset!r} is called {RENAMED[preset]!r}: give --preset {RENAMED[preset]}")
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}: choose from {', '.join(PRESETS)}")
    steps = [step for step in PRESETS[preset] if not sections or step.section in sections]
    if not steps:
        raise UsageError(f"preset {preset} has no table {', '.join(sections)}: name another with --section or --preset")
    return steps
