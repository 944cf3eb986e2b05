"""The options of a benchmark run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.record import Hardware
from kvtuner_search.bench.slo import ServiceObjective


@dataclass(frozen=True)
class BenchOptions:
    """One run of ``bench``."""

    profile: Path | None  # None: whatever the server has
    model: str | None  # folder, hub id or ``reference``; None only with ``url``: what the server calls its model
    url: str | None  # of a running server; None starts one
    server_arguments: tuple[str, ...]  # for a server that is started
    server_python: str  # interpreter of the environment that has the engine
    preset: str  # its name, or ``custom``
    steps: Sequence[CellPlan]  # its cells
    objectives: Sequence[ServiceObjective]
    hardware: Hardware | None  # given; None: detect
    seed: int  # of the prompts
    timeout: float  # seconds for one request
    stall: float  # seconds without a byte after which a request counts as stalled
    start_timeout: float  # seconds until a server is ready
    workers: int | None  # processes of the load generator; None: depends on the concurrency
    cross_check: bool  # also send one cell through the engine's own client
    folder: Path
    resume: bool
    overwrite: bool
    command: str  # for the record
    api_key: str | None = field(
        default=None, repr=False
    )  # of the server; None: that of the server arguments, if they have one
