"""A server that loses no time: floors must hold for it, and it must reach them. And records of what it would be measured at.

It reads and multiplies at the rates of the setup without a gap, its chips keep from step to step as much as fits, a prefix in the cache is read once
for all requests of a step, prompts and decode steps share a forward, and pipeline stages work on different batches at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvtuner_search.bench.floors import Setup
from kvtuner_search.bench.hardware import find
from kvtuner_search.bench.record import (
    Cache,
    Cell,
    Check,
    Environment,
    Hardware,
    Model,
    Record,
    Served,
    Shape,
    Speed,
    Summary,
)


@dataclass
class Request:
    """One request as it runs; seconds since the run began."""

    cached: int
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass
class _Batch:
    """Requests that pass the stages together."""

    room: int
    running: list[Request] = field(default_factory=list)


def serve(setup: Setup, shape: Shape, cached: Sequence[int] = ()) -> list[Request]:
    """The requests of a cell, answered as fast as can be by one copy of the model; ``cached`` tokens of each prompt are hits."""
    stages = setup.pipeline_parallel
    waiting = [Request(hits) for hits in (cached or [0] * shape.requests)][::-1]
    done: list[Request] = []
    groups = min(stages, shape.concurrency)
    batches = [_Batch((shape.concurrency + index) // groups) for index in range(groups)]
    free = [0.0] * stages
    ready = [(0.0, index) for index in range(groups)]
    while ready:
        now, index = heapq.heappop(ready)
        batch = batches[index]
        while waiting and len(batch.running) < batch.room:
            request = waiting.pop()
            request.sent = now
            batch.running.append(request)
        if not batch.running:
            continue
        seconds = _forward(setup, shape, batch.running) / stages
        for stage in range(stages):
            now = free[stage] = max(now, free[stage]) + seconds
        for request in batch.running:
            if not request.tokens:
                request.first, request.tokens = now, 1
            else:
                request.tokens = min(shape.output_tokens, request.tokens + setup.draft_tokens)
            request.last = now
        done += [request for request in batch.running if request.tokens == shape.output_tokens]
        batch.running = [request for request in batch.running if request.tokens < shape.output_tokens]
        heapq.heappush(ready, (now, index))
    return done


def _forward(setup: Setup, shape: Shape, running: Sequence[Request]) -> float:
    """Seconds of one pass over all stages."""
    operations, rows, shared, n = 0.0, 0, 0, shape.input_tokens
    for request in running:
        if not request.tokens:
            new = n - request.cached
            operations += setup.prompt_operations(new, new * request.cached + new * (new + 1) / 2)
            continue
        before = n + request.tokens - 1
        rows += before - request.cached
        shared = max(shared, request.cached)
        for step in range(min(setup.draft_tokens, shape.output_tokens - request.tokens)):
            operations += 2 * setup.model.multiplications + setup.attention(before + step + 1)
    return max(setup.pass_seconds(rows + shared), operations / (setup.tensor_parallel * setup.operations))


H200, RTX_4090 = find("NVIDIA H200"), find("NVIDIA GeForce RTX 4090")
QWEN = Model(
    name="Qwen2.5-7B",
    layers=28,
    hidden_size=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocabulary=152064,
    weight_bytes=14_140_571_648,
    multiplications=7_070_285_824,
    dummy_weights=True,
)
BF16 = Cache(profile="16-bit", digest=None, effective_bits=16.0, bytes_per_token=57344)


def setup(hardware: Hardware | None = H200, tp: int = 1, pp: int = 1, **changes: Any) -> Setup:
    """Qwen2.5-7B with a 16-bit cache."""
    assert hardware is not None
    return replace(Setup(QWEN, hardware.model_copy(update={"count": tp * pp}), tp, pp, BF16.bytes_per_token), **changes)


def summary(values: Sequence[float]) -> Summary:
    """Of seconds, in ms; percentiles are the order statistics below."""
    ranked = sorted(1e3 * value for value in values)
    p50, p90, p99 = (ranked[int(share * (len(ranked) - 1))] for share in (0.5, 0.9, 0.99))
    mean = sum(ranked) / len(ranked)
    return Summary(samples=len(ranked), mean=mean, minimum=ranked[0], p50=p50, p90=p90, p99=p99, maximum=ranked[-1])


def cell(setup: Setup, shape: Shape, slower: float = 1.0, **changes: Any) -> Cell:
    """A cell of the ideal server, all times multiplied by ``slower``."""
    done = serve(setup, shape)
    seconds, later = slower * max(request.last for request in done), shape.output_tokens - 1
    first = [slower * (request.first - request.sent) for request in done]
    latency = [slower * (request.last - request.sent) for request in done]
    gaps = [(whole - start) / later for start, whole in zip(first, latency, strict=True)] if later else None
    content: dict[str, Any] = {
        "section": "throughput",
        "shape": shape,
        "succeeded": len(done),
        "failures": {},
        "finish_reasons": {"length": len(done)},
        "prompt_tokens": len(done) * shape.input_tokens,
        "returned_tokens": len(done) * shape.output_tokens,
        "cached_tokens": 0,
        "speed": Speed(
            seconds=seconds,
            ttft=summary(first),
            per_token=summary(gaps) if gaps else None,
            latency=summary(latency),
            requests_per_second=len(done) / seconds,
            input_tokens_per_second=len(done) * shape.input_tokens / seconds,
            output_tokens_per_second=len(done) * shape.output_tokens / seconds,
        ),
        "floor": None,
    }
    return Cell(**content | changes)


def record(cells: Sequence[Cell], setup: Setup, **changes: Any) -> Record:
    """A record of these cells, without violations."""
    content: dict[str, Any] = {
        "created": "2026-11-22T12:00:00Z",
        "command": "kvtuner-search bench",
        "preset": "custom",
        "environment": Environment(
            hardware=setup.hardware, client="a test", versions={"sglang": "0.5.14", "kvtuner-search": "0.1.0"}
        ),
        "model": setup.model,
        "served": Served(
            version="0.5.14",
            arguments=[],
            started=True,
            attention_backend="fa3",
            dtype="bfloat16",
            quantization=None,
            tensor_parallel=setup.tensor_parallel,
            pipeline_parallel=setup.pipeline_parallel,
            nodes=1,
            page_size=1,
            prefix_cache=True,
            speculative="EAGLE" if setup.draft_tokens > 1 else None,
            draft_tokens=setup.draft_tokens,
            token_capacity=100_000,
        ),
        "cache": BF16,
        "correctness": [Check(name="answers", passed=True, detail="pretended")],
        "cells": list(cells),
    }
    return Record(**content | changes)
