"""The times of the raw requests beside a record, for intervals. The client's HTTP library is imported only where such a file is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvtuner_search.bench.intervals import Floats
from kvtuner_search.bench.record import Cell, Record
from kvtuner_search.errors import DataError

if TYPE_CHECKING:
    from kvtuner_search.bench.client import RequestResult

MAX_BYTES: Final = 2**30
_REMEDY: Final = "move it away to compare by the summaries"


class Timings(NamedTuple):
    """[n] each: the requests of a cell that succeeded, in the order in which they were sent, ms."""

    ttft: Floats
    latency: Floats
    per_token: Floats  # NaN where an answer has one token


def timings_beside(record_path: Path, record: Record) -> dict[str, Timings]:
    """Title of a cell -> its requests, from ``requests.jsonl`` in the record's folder; empty without that file.

    A cell whose requests are not the record's (another number, or another mean latency: the file belongs to another run) is left out.

    Raises:
        DataError: if the file cannot be read.
    """
    from kvtuner_search.bench import journal

    path = record_path.with_name(journal.REQUESTS)
    try:
        size = path.stat().st_size if path.is_file() else 0
        logs = journal.read(path) if 0 < size <= MAX_BYTES else {}
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}; or {_REMEDY}") from error
    if size > MAX_BYTES:
        raise DataError(f"{path} has {size:,} bytes, over {MAX_BYTES:,}: {_REMEDY}")
    found = {}
    for cell in record.cells:
        log = logs.get(journal.cell_key(cell.section, cell.shape))
        timings = _timings(log.results) if log else None
        if timings is not None and _same(cell, timings):
            found[cell.title] = timings
    return found


def _timings(results: Sequence[RequestResult]) -> Timings | None:
    whole = sorted((r for r in results if r.whole and not r.warmup), key=lambda result: result.sent)
    rows = np.array([(r.ttft, r.latency, math.nan if r.per_token is None else r.per_token) for r in whole])
    return Timings(*rows.T) if len(rows) else None


def _same(cell: Cell, timings: Timings) -> bool:
    speed = cell.speed
    return (
        speed is not None
        and len(timings.latency) == speed.latency.samples
        and math.isclose(float(timings.latency.mean()), speed.latency.mean, rel_tol=1e-6)
    )
