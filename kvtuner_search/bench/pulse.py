"""The load generator's own health: how late its event loop is, and how much of a core it uses."""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

TICK: Final = 0.010  # seconds


@contextmanager
def without_gc() -> Iterator[None]:
    """Keep Python's cyclic collector from running in the block: with the results of 20,000 requests it pauses everything for 0.2 s now and then.

    Reference counting still frees objects; requests leave few cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class EventLoopLag:
    """A task that tries to wake every 10 ms and records how late it is, and the processor time of its thread: time lost to requests."""

    def __init__(self) -> None:
        self._times, self._lags, self._used = (
            array("d"),
            array("d"),
            array("d"),
        )  # all in seconds; performance counter, late by, used
        self._beaten(0.0)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._times[-1] + TICK - time.perf_counter())
            self._beaten(max(0.0, time.perf_counter() - self._times[-1] - TICK))

    def _beaten(self, lag: float) -> None:
        self._times.append(time.perf_counter())
        self._lags.append(lag)
        self._used.append(time.thread_time())

    def since(self, start: float) -> tuple[float, float]:
        """From a time on the performance counter until now: mean lag in seconds (the average delay in noticing a token), and the
        share of a core that the loop's thread used. To the nearest tick outside.
        """
        first = min(bisect_right(self._times, start), len(self._times) - 1)
        lags = self._lags[first:]
        overdue = time.perf_counter() - self._times[-1] - TICK
        if overdue > 0:
            lags.append(overdue)
        before = max(first - 1, 0)
        wall = self._times[-1] - self._times[before]
        return sum(lags) / len(lags), (self._used[-1] - self._used[before]) / wall if wall else 0.0
