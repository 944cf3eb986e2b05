"""Runs of a few tiny cells against the fake server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fake_server import Fake

from kvtuner_search.bench.options import BenchOptions
from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.record import Record, Section, Shape
from kvtuner_search.bench.run import BenchRun
from kvtuner_search.progress import Reporter

ROOT = Path(__file__).parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
Start = Callable[..., Fake]


def step(section: Section, requests: int, concurrency: int, given: int, returned: int, rounds: int = 1) -> CellPlan:
    shape = Shape(requests=requests, concurrency=concurrency, input_tokens=given, output_tokens=returned)
    return CellPlan(section, shape, rounds)


STEPS = [
    step("ttft", 3, 1, 10, 1),
    step("throughput", 6, 3, 20, 5),
    step("long", 2, 1, 100, 20),
    step("batch", 8, 4, 20, 4, rounds=2),
    step("memory", 6, 2, 400, 2, rounds=3),
]
OPTIONS = BenchOptions(
    profile=PROFILE,
    model="reference",
    url=None,
    server_arguments=(),
    server_python=sys.executable,
    preset="custom",
    steps=STEPS,
    objectives=(),
    hardware=None,
    seed=0,
    timeout=60.0,
    stall=30.0,
    start_timeout=60.0,
    workers=1,
    cross_check=False,
    folder=Path(),
    resume=False,
    overwrite=False,
    command="kvtuner-search bench",
)


def measure(folder: Path, reporter: Reporter | None = None, **changed: Any) -> Record:
    return BenchRun(replace(OPTIONS, folder=folder, **changed), reporter or Reporter(quiet=True)).measure()


def failed(record: Record) -> dict[str, str]:
    """The checks that failed: name -> what was seen."""
    return {check.name: check.detail for check in record.correctness if not check.passed}


def rules(record: Record) -> set[str]:
    return {violation.rule for violation in record.violations}
