"""Load on a server: many requests at once, by one process or several. Errors are failures of the request, and nothing is retried.

A closed loop keeps a fixed number of requests in flight and sends the next when one has ended. An open loop sends at random times whatever the server does;
there the clock of a request runs from when it was due, so that a busy client or server does not hide waiting (coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from kvtuner_search.addresses import check_url
from kvtuner_search.bench import client
from kvtuner_search.bench.client import RequestResult, TimedRequest
from kvtuner_search.bench.pulse import without_gc
from kvtuner_search.bench.record import Shape
from kvtuner_search.bench.sender import Block, Job, Sender
from kvtuner_search.bench.summary import elapsed as elapsed
from kvtuner_search.bench.summary import remarks as remarks
from kvtuner_search.bench.summary import summarise as summarise
from kvtuner_search.bench.summary import violations as violations
from kvtuner_search.bench.workers import run_blocks
from kvtuner_search.errors import UsageError
from kvtuner_search.servers.interface import interface

REQUESTS_A_WORKER: Final = 32  # in flight, above which another process helps


def run_cell(
    url: str,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    *,
    concurrency: int,
    rate: float | None = None,
    warmup: int = 0,
    rounds: int = 1,
    timeout: float = 600.0,
    stall: float = 120.0,
    journal: Callable[[RequestResult], None] | None = None,
    advance: Callable[[], None] | None = None,
    workers: int | None = None,
    seed: int = 0,
    key: str | None = None,
    vocabulary: int | None = None,
) -> list[RequestResult]:
    """Send the requests of one cell and wait for all answers.

    Args:
        url: ``http://host:port``.
        prompts: token ids, ``warmup + shape.requests`` of them, the warm-up's first.
        shape: number of measured requests, and tokens requested by each.
        concurrency: most requests in flight. An open loop that reaches it sends late, which counts as latency.
        rate: requests a second of an open loop (Poisson arrivals); None: closed loop.
        warmup: requests that are sent first and not returned; they open the connections that the others use.
        rounds: number of equal blocks of requests; each is sent when the previous one has been answered.
        timeout: seconds that one request may take.
        stall: seconds without a byte after which a request is given up.
        journal: gets every result as it comes, the warm-up's too.
        advance: called once for every measured request.
        workers: processes; None: one, or more at high concurrency if there are cores.
        seed: of the arrival times of an open loop.
        key: sent as bearer token.
        vocabulary: ids of the model's embedding; None: not known.

    Returns:
        One result for each measured request, in the order of ``prompts``.

    Raises:
        UsageError: if an argument cannot be used.
        KVTunerError: if a process of the generator died.
    """
    count = shape.requests
    if len(prompts) != warmup + count or not 1 <= rounds <= count or count % rounds or concurrency < 1:
        raise UsageError(
            f"{len(prompts)} prompts for {warmup} + {count} requests in {rounds} rounds, {concurrency} at a time: there must be one"
            " prompt a request, and as many requests in each round"
        )
    if rate is not None and not 0 < rate < float("inf"):
        raise UsageError(f"a rate of {rate} requests/s: give a positive number, or none for a closed loop")
    url = check_url(url, key)
    name = secrets.token_hex(8)  # an answer to an earlier request with the same prompt must not count as this one's
    requests = tuple(
        TimedRequest.of(index - warmup, f"{name}-{index}", prompt, shape.output_tokens, vocabulary)
        for index, prompt in enumerate(prompts)
    )
    job = Job(url + interface().STREAM, requests, timeout, stall, time.time() - time.perf_counter(), key)
    blocks = list(_blocks(count, warmup, rounds, rate, seed))
    found: dict[int, RequestResult] = {}

    def emit(result: RequestResult) -> None:
        if journal is not None:
            journal(result)
        if not result.warmup:
            found[result.index] = result
            if advance is not None:
                advance()

    processes = min(workers or _workers(concurrency), concurrency)
    with without_gc():
        if processes == 1:
            asyncio.run(_alone(job, blocks, concurrency, emit))
        else:
            run_blocks(job, blocks, concurrency, processes, emit)
    per_round = count // rounds
    for request in requests[warmup:]:
        if request.index not in found:
            emit(_not_sent(request, request.index // per_round, job.epoch))
    return [found[index] for index in range(count)]


def _workers(concurrency: int) -> int:
    """Processes for ``concurrency`` requests in flight, leaving most cores to a server on the same machine."""
    return max(1, min(concurrency // REQUESTS_A_WORKER, len(os.sched_getaffinity(0)) // 4, 4))


def _blocks(count: int, warmup: int, rounds: int, rate: float | None, seed: int) -> Iterator[Block]:
    if warmup:
        yield Block(0, warmup, 0, None)
    source, size = random.Random(seed), count // rounds
    for number in range(rounds):
        first = warmup + number * size
        due = None
        if rate is not None:
            due = tuple(itertools.accumulate(source.expovariate(rate) for _ in range(size)))
        yield Block(first, first + size, number, due)


async def _alone(job: Job, blocks: Sequence[Block], concurrency: int, emit: Callable[[RequestResult], None]) -> None:
    async with client.session(job.timeout, job.stall, job.key) as http:
        sender = Sender(http, job, concurrency, emit)
        for block in blocks:
            await sender.send(block, partial(next, iter(range(block.first, block.last)), None))


def _not_sent(request: TimedRequest, round_: int, epoch: float) -> RequestResult:
    return RequestResult(
        index=request.index,
        round=round_,
        sent=round(epoch + time.perf_counter(), 6),
        asked=request.asked,
        prompt_tokens=request.prompt_tokens,
        failure="not-sent",
        detail="after too many failures in a row",
    )
