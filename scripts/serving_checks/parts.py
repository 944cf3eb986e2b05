"""What a part of the check is: which servers it needs, what it measures on each, and what it makes of the measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serving_checks.results import Record
from serving_checks.servers import Config, Server

Found = dict[str, dict[str, Any]]  # server -> measurement -> figures


@dataclass(frozen=True)
class Measurement:
    """Something to do on a running server. Parts that share a name share the figures."""

    name: str
    take: Callable[[Server, float], Any]  # given the server and the seconds it may take; returns what JSON can hold


@dataclass(frozen=True)
class Task:
    """A measurement on one server."""

    config: Config
    measurement: Measurement


@dataclass(frozen=True)
class Part:
    """Several tasks and their conclusion, which sees the figures of all servers that came up."""

    name: str
    tasks: Sequence[Task]
    conclude: Callable[[Found], list[Record]]


def gather(parts: Sequence[Part]) -> dict[Config, list[tuple[Part, Measurement]]]:
    """What to do on each server, each measurement once, servers in the order in which they are first needed."""
    plan: dict[Config, list[tuple[Part, Measurement]]] = {}
    for part in parts:
        for task in part.tasks:
            known = plan.setdefault(task.config, [])
            if task.measurement.name not in [measurement.name for _, measurement in known]:
                known.append((part, task.measurement))
    return plan
