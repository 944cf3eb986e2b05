"""Synthetic records: a server of known speed, so that what is computed from a record has a known answer. No figure here was measured.

The pretended server serves Qwen2.5-7B on H200s: a step reads the weights at 70% of the bandwidth, a prompt runs at half of the dense rate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.journal import RequestJournal, cell_key
from kvtuner_search.bench.record import (
    Cache,
    Cell,
    Check,
    Environment,
    Floor,
    Hardware,
    Model,
    Record,
    Scrape,
    Section,
    Served,
    Shape,
    Speed,
    Summary,
)

DIGEST = "sha256:" + "4d" * 32
BYTES_16BIT = 57344  # of a token of Qwen2.5-7B
H200 = Hardware(
    name="NVIDIA H200", count=1, bandwidth=4.8e12, flops=989e12, memory=150_000_000_000, source="made for a test"
)
QWEN = Model(
    name="Qwen2.5-7B",
    layers=28,
    hidden_size=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocabulary=152064,
    weight_bytes=14_140_000_000,
    multiplications=7_070_000_000,
    dummy_weights=True,
)
STOCK = Cache(profile="16-bit", digest=None, effective_bits=16.0, bytes_per_token=BYTES_16BIT)
KV4 = Cache(profile="qwen2.5-7b-kv4", digest=DIGEST, effective_bits=4.25, bytes_per_token=15232)


def hardware(count: int = 1) -> Hardware:
    """So many of the pretended devices."""
    return H200.model_copy(update={"count": count})


def floor(shape: Shape, on: Hardware = H200) -> Floor:
    """A floor in the record's units, simpler than kvtuner_search.bench.floors: weights once a step, two operations a multiply-add."""
    alone = 1e3 * QWEN.weight_bytes / (on.bandwidth * on.count)
    ttft = max(alone, 1e3 * 2 * QWEN.multiplications * shape.input_tokens / (on.flops * on.count))
    latency = ttft + (shape.output_tokens - 1) * alone
    rate = 1e3 * shape.concurrency / latency
    return Floor(
        ttft=ttft,
        per_token=alone,
        latency=latency,
        output_tokens_per_second=rate * shape.output_tokens,
        requests_per_second=rate,
        bound="reading 14.1 GB of weights at 4.8 TB/s",
    )


def summary(values: Sequence[float]) -> Summary:
    """Of these values, linear interpolation between order statistics."""
    ranked = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ranked) - 1)
        low = int(place)
        high = min(low + 1, len(ranked) - 1)
        return ranked[low] + (place - low) * (ranked[high] - ranked[low])

    return Summary(
        samples=len(ranked),
        mean=sum(ranked) / len(ranked),
        minimum=ranked[0],
        p50=at(0.5),
        p90=at(0.9),
        p99=at(0.99),
        maximum=ranked[-1],
    )


def times(shape: Shape, slower: float = 1.0, seed: int = 0, on: Hardware = H200) -> list[tuple[float, float]]:
    """(ttft, latency) in ms of each request that the pretended server answers; ``slower`` multiplies all of them."""
    rng = random.Random(repr((seed, shape)))
    least = floor(shape, on)
    return [
        (
            1.9 * least.ttft * spread * slower,
            (1.9 * least.ttft + (shape.output_tokens - 1) * least.per_token / 0.7) * spread * slower,
        )
        for spread in (1 + rng.expovariate(20) for _ in range(shape.requests))
    ]


def cell(
    section: Section,
    input_tokens: int,
    output_tokens: int,
    concurrency: int = 1,
    requests: int | None = None,
    *,
    failed: int = 0,
    slower: float = 1.0,
    seed: int = 0,
    on: Hardware = H200,
    believed: bool = True,
    **changes: Any,
) -> Cell:
    """One cell; ``failed`` requests were dropped, ``believed=False`` leaves speed out as a run with a failed check does."""
    shape = Shape(
        requests=requests or 16 * concurrency,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    good = times(shape, slower, seed, on)[: shape.requests - failed]
    speed = None
    if good and believed:
        latency = [total for _, total in good]
        seconds = sum(latency) / 1e3 / concurrency
        speed = Speed(
            seconds=seconds,
            ttft=summary([first for first, _ in good]),
            per_token=summary([(total - first) / (output_tokens - 1) for first, total in good])
            if output_tokens > 1
            else None,
            latency=summary(latency),
            requests_per_second=len(good) / seconds,
            input_tokens_per_second=len(good) * input_tokens / seconds,
            output_tokens_per_second=len(good) * output_tokens / seconds,
        )
    content: dict[str, Any] = {
        "section": section,
        "shape": shape,
        "succeeded": len(good),
        "failures": {"dropped": failed} if failed else {},
        "finish_reasons": {"length": len(good)} if good else {},
        "prompt_tokens": len(good) * input_tokens,
        "returned_tokens": len(good) * output_tokens,
        "cached_tokens": 0,
        "speed": speed,
        "floor": floor(shape, on),
    }
    return Cell(**content | changes)


def cells(small: bool = False, **options: Any) -> list[Cell]:
    """The grid of the adapter's report, or one cell of each table."""
    ttft, concurrency, inputs = (10, 50, 100, 500, 1000), (1, 2, 4, 8), (100, 500, 1000, 2000, 4000)
    outputs, batches = (50, 200, 500), (1, 2, 4, 8, 16)
    if small:
        ttft, concurrency, inputs, outputs, batches = ttft[:1], concurrency[1:2], inputs[:1], outputs[:1], batches[1:2]
    memory = {"free_tokens": (1_900_000, 1_900_000), "device_bytes": (120_000_000_000, 120_000_000_000)}
    return [
        *(cell("ttft", length, 1, **options) for length in ttft),
        *(cell("throughput", 100, 64, count, **options) for count in concurrency),
        *(cell("long", length, wanted, requests=8, **options) for length in inputs for wanted in outputs),
        *(cell("batch", 100, 64, count, **options) for count in batches),
        cell("memory", 4000, 64, 4, 20, **options, **memory),
    ]


def record(
    cache: Cache = STOCK,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    nodes: int = 1,
    small: bool = False,
    correct: bool = True,
    slower: float = 1.0,
    seed: int = 0,
    **changes: Any,
) -> Record:
    """A record of the pretended server; ``changes`` replace fields of it. ``correct=False`` fails a check and so has no speed."""
    on = hardware(tensor_parallel * pipeline_parallel)
    content: dict[str, Any] = {
        "created": "2026-11-22T12:00:00Z",
        "command": "kvtuner-search bench --profile qwen2.5-7b-kv4.json --model-path qwen2.5-7b --preset legacy",
        "preset": "legacy",
        "environment": Environment(
            hardware=on,
            client="a processor, 16 cores",
            versions={"sglang": "0.5.14", "kvtuner-search": "0.1.0", "torch": "2.11.0"},
        ),
        "model": QWEN,
        "served": Served(
            version="0.5.14",
            arguments=["--model-path", "qwen2.5-7b", "--load-format", "dummy"],
            started=True,
            attention_backend="fa3" if cache.digest is None else "kvtuner",
            dtype="bfloat16",
            quantization=None,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            nodes=nodes,
            page_size=1,
            prefix_cache=False,
            speculative=None,
            draft_tokens=1,
            token_capacity=110_000_000_000 // cache.bytes_per_token,
            cache_gib=102.4,
        ),
        "cache": cache,
        "correctness": [
            Check(name="answers", passed=True, detail="3 prompts, asked twice"),
            Check(name="profile", passed=correct, detail="digest of the server"),
        ],
        "cells": cells(small, slower=slower, seed=seed, on=on, believed=correct),
        "scrapes": [
            Scrape(name="sglang:token_usage", samples=40, minimum=0.0, maximum=0.42, last=0.0),
            Scrape(name="sglang:num_running_reqs", samples=40, minimum=0.0, maximum=16.0, last=0.0),
        ],
        "cross_check": {"output_tokens_per_second": 1.01},
    }
    return Record(**content | changes)


def write_requests(made: Record, path: Path, *, slower: float = 1.0, seed: int = 0) -> None:
    """The journal of a record that was made with the same ``slower`` and ``seed``, with a warm-up and a failure that must not count."""
    assert made.environment.hardware is not None
    journal = RequestJournal(path)
    for one in made.cells:
        key, asked = cell_key(one.section, one.shape), one.shape.output_tokens
        journal.begin(key, one.section, one.shape)
        odd = {"round": 0, "sent": 0.0, "asked": asked, "prompt_tokens": one.shape.input_tokens, "status": 200}
        journal.result(key, RequestResult(index=-1, **odd, tokens=(7,), arrivals=((1e6, 1),)))
        journal.result(key, RequestResult(index=0, **odd, failure="dropped"))
        for index, (first, total) in enumerate(times(one.shape, slower, seed, made.environment.hardware)):
            arrivals = ((first, 1), (total, asked - 1)) if asked > 1 else ((total, 1),)
            odd["sent"] = 1.0 + index
            journal.result(
                key, RequestResult(index=index, **odd, finish="length", tokens=(7,) * asked, arrivals=arrivals)
            )
        journal.end(key)
    journal.close()
