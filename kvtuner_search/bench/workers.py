"""A cell's load from several processes, because one event loop cannot read tokens faster than one core allows.

The processes share one counter, so that together they send the same requests as a single one, in the same order.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Final

from kvtuner_search.bench import client
from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.pulse import without_gc
from kvtuner_search.bench.sender import Block, Job, Sender
from kvtuner_search.errors import KVTunerError

_FLUSH: Final = 0.05  # seconds between two messages with results; one message each would cost as much as the requests


def run_blocks(
    job: Job, blocks: Sequence[Block], concurrency: int, processes: int, emit: Callable[[RequestResult], None]
) -> None:
    """Send all blocks from ``processes`` processes that share ``concurrency``; results arrive through ``emit``, here.

    Raises:
        KVTunerError: if one of them died.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # fork would copy locks that other threads hold, e.g. of a progress bar
    counter: Synchronized[int] = context.Value("q", 0)
    lanes = [concurrency // processes + (number < concurrency % processes) for number in range(processes)]
    running: dict[Connection, BaseProcess] = {}
    try:
        for share in lanes:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs, counter, job, share), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the process does
            running[ours] = process
        _collect(running, emit)
        for block in blocks:
            counter.value = block.first
            for connection in running:
                connection.send(block)
            _collect(running, emit)
        for connection in running:
            connection.send(None)
        for finished in running.values():
            finished.join()
    finally:
        for ended in running.values():
            ended.terminate()
            ended.join()
        for connection in running:
            _drain(connection, emit)


def _collect(running: dict[Connection, BaseProcess], emit: Callable[[RequestResult], None]) -> None:
    """Pass results on until every process has reported that it is idle."""
    busy = set(running)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                results: list[RequestResult] | None = ready.recv()
            except (EOFError, ConnectionResetError) as error:
                running[ready].join()
                raise KVTunerError(
                    f"a process of the load generator ended with {running[ready].exitcode}: see its message above, and run again"
                ) from error
            if results is None:
                busy.remove(ready)
            else:
                for result in results:
                    emit(result)


def _drain(connection: Connection, emit: Callable[[RequestResult], None]) -> None:
    """Keep the results that a process had sent before the interruption."""
    with suppress(EOFError, OSError):
        while connection.poll():
            for result in connection.recv() or ():
                emit(result)


def _work(connection: Connection, counter: Synchronized[int], job: Job, lanes: int) -> None:
    """One process: waits, then runs blocks until it receives None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    with suppress(EOFError, BrokenPipeError), without_gc():  # of the pipe: the parent has ended
        asyncio.run(_serve(connection, counter, job, lanes))


async def _serve(connection: Connection, counter: Synchronized[int], job: Job, lanes: int) -> None:
    waiting: list[RequestResult] = []

    def flush() -> None:
        if waiting:
            connection.send(waiting)
            waiting.clear()

    async def keep_flushing() -> None:
        while True:
            await asyncio.sleep(_FLUSH)
            flush()

    async with client.session(job.timeout, job.stall, job.key) as http:
        sender = Sender(http, job, lanes, waiting.append)
        connection.send(None)
        while (block := connection.recv()) is not None:

            def take(last: int = block.last) -> int | None:
                with counter.get_lock():
                    number = counter.value
                    counter.value = number + 1
                return number if number < last else None

            flushing = asyncio.create_task(keep_flushing())
            try:
                await sender.send(block, take)
            finally:
                flushing.cancel()
                with suppress(asyncio.CancelledError):
                    await flushing
            flush()
            connection.send(None)
