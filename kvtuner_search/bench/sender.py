"""One process's part of a cell's load: the requests of a block, with a limit on requests in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from kvtuner_search.bench import client
from kvtuner_search.bench.client import RequestResult, TimedRequest
from kvtuner_search.bench.pulse import EventLoopLag

GIVE_UP: Final = 8  # failures in a row, in one process, after which the rest is not sent (two if nothing comes): a dead server is not queried for hours


@dataclass(frozen=True)
class Block:
    """Consecutive requests that share one clock: the warm-up, or a round. The next block starts when all have been answered."""

    first: int
    last: int  # exclusive
    round: int
    due: tuple[float, ...] | None  # seconds after the start at which each is to be sent; None: closed loop


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to send its part of a cell."""

    url: str  # that takes the requests
    requests: tuple[TimedRequest, ...]  # warm-up first
    timeout: float
    stall: float
    epoch: float  # seconds since 1970 when the performance counter was 0
    key: str | None = field(default=None, repr=False)  # sent as bearer token


class Sender:
    """One process's part of a cell.

    Args:
        http: session for all its requests.
        job: the cell.
        lanes: most requests in flight.
        emit: gets every result as it comes.
    """

    def __init__(
        self, http: aiohttp.ClientSession, job: Job, lanes: int, emit: Callable[[RequestResult], None]
    ) -> None:
        self._http, self._job, self._lanes, self._emit = http, job, lanes, emit
        self._failures = 0  # in a row

    async def send(self, block: Block, take: Callable[[], int | None]) -> None:
        """Send requests as ``take`` gives their numbers until it gives None; nothing once too many have failed."""
        start = time.perf_counter()
        try:
            async with EventLoopLag() as pulse, asyncio.TaskGroup() as group:
                for _ in range(min(self._lanes, block.last - block.first)):
                    group.create_task(self._lane(block, take, pulse, start))
        except BaseExceptionGroup as group_error:  # of ``emit``, e.g. a full disk; one is enough to say so
            raise group_error.exceptions[0] from None

    async def _lane(self, block: Block, take: Callable[[], int | None], pulse: EventLoopLag, start: float) -> None:
        job = self._job
        while self._failures < GIVE_UP and (number := take()) is not None:
            due = None
            if block.due is not None:
                due = start + block.due[number - block.first]
                await asyncio.sleep(due - time.perf_counter())
            result = await client.ask(self._http, job.url, job.requests[number], pulse, job.epoch, block.round, due)
            cost = GIVE_UP // 2 if result.failure in ("stalled", "timeout") else 1  # each of these costs minutes
            self._failures = 0 if result.whole else self._failures + cost
            self._emit(result)
