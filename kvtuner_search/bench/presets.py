"""The cells of each preset. Data only.

The number of requests in a cell follows from its statistics. A percentile p needs 100 / (100 - p) requests until it lies between two of them
rather than beyond the greatest: 2 for the median, 10 for p90, 100 for p99. ``full`` therefore sends at least 100 to every cell of short requests. Requests
that run alone for seconds hardly vary, so the long grid settles for p90 in ``full`` and ``legacy``. ``quick`` is there to show that everything works in
minutes on two cores: it supports medians, and p90 in its throughput table. Every summary carries its number of samples.

The first requests of a cell open connections and make the server compile or capture what that shape needs: the warm-up, which does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvtuner_search.bench.record import Section, Shape


@dataclass(frozen=True)
class CellPlan:
    """One cell."""

    section: Section
    shape: Shape  # requests of all rounds together
    rounds: int = 1  # equal parts of the requests; each is sent when the previous one has been answered
    warmup: int = 1  # requests before, not measured


# The adapter's report of 13 February 2026 (report-2026-02-13.json). It gives no number of requests, and prompt and answer lengths only in its long grid:
# its shortest prompt and answer there, 100 and 50 tokens, stand in for throughput and batches, and short answers for the time to the first token.
LEGACY_TTFT: Final = (10, 50, 100, 500, 1000)  # prompt tokens
LEGACY_CONCURRENCY: Final = (1, 2, 4, 8)
LEGACY_LONG_INPUT: Final = (100, 500, 1000, 2000, 4000)
LEGACY_LONG_OUTPUT: Final = (50, 200, 500)
LEGACY_BATCH: Final = (1, 2, 4, 8, 16)
LEGACY_ROUNDS: Final = 20  # of memory stress
LEGACY_SHORT: Final = (100, 50)  # prompt and answer tokens

FULL_TTFT: Final = (*LEGACY_TTFT, 2000, 4000, 8000, 16000)
FULL_CONCURRENCY: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FULL_LONG_INPUT: Final = (*LEGACY_LONG_INPUT, 16000)
FULL_BATCH: Final = (*LEGACY_BATCH, 32, 64)

FIRST_TOKENS: Final = (
    8  # of an answer whose first token is timed: more than one, so that the first is streamed before the end
)


def _ttft(prompts: Iterable[int], requests: int, output: int = FIRST_TOKENS) -> list[CellPlan]:
    return [CellPlan("ttft", _shape(requests, 1, length, output)) for length in prompts]


def _throughput(levels: Iterable[int], least: int, each: int, prompt: int, output: int) -> list[CellPlan]:
    """A closed loop of at least ``each`` requests a lane: its ramp and its tail, with idle lanes, are then a small part."""
    return [
        CellPlan("throughput", _shape(max(least, each * level), level, prompt, output), warmup=level)
        for level in levels
    ]


def _long(prompts: Iterable[int], outputs: tuple[int, ...], requests: int) -> list[CellPlan]:
    return [CellPlan("long", _shape(requests, 1, length, output)) for length in prompts for output in outputs]


def _batch(sizes: Iterable[int], rounds: int, prompt: int, output: int) -> list[CellPlan]:
    """Each round is one batch, sent at once."""
    return [CellPlan("batch", _shape(size * rounds, size, prompt, output), rounds, warmup=size) for size in sizes]


def _memory(rounds: int, size: int, prompt: int, output: int) -> list[CellPlan]:
    return [CellPlan("memory", _shape(rounds * size, size, prompt, output), rounds)]


def _shape(requests: int, concurrency: int, input_tokens: int, output_tokens: int) -> Shape:
    return Shape(requests=requests, concurrency=concurrency, input_tokens=input_tokens, output_tokens=output_tokens)


PRESETS: Final[dict[str, list[CellPlan]]] = {
    # For the 13.9 M reference model on two cores: about a minute of load, at most 1,032 tokens a request.
    "quick": [
        *_ttft((10, 100, 500, 1000), requests=5, output=4),
        *_throughput((1, 2, 4, 8), least=10, each=2, prompt=32, output=8),
        *_long((100, 1000), (8, 32), requests=3),
        *_batch((1, 2, 4, 8), rounds=2, prompt=32, output=8),
        *_memory(rounds=3, size=4, prompt=1000, output=4),
    ],
    "legacy": [
        *_ttft(LEGACY_TTFT, requests=100),
        *_throughput(LEGACY_CONCURRENCY, least=100, each=20, prompt=LEGACY_SHORT[0], output=LEGACY_SHORT[1]),
        *_long(LEGACY_LONG_INPUT, LEGACY_LONG_OUTPUT, requests=10),
        *_batch(LEGACY_BATCH, rounds=10, prompt=LEGACY_SHORT[0], output=LEGACY_SHORT[1]),
        *_memory(LEGACY_ROUNDS, size=8, prompt=LEGACY_LONG_INPUT[-1], output=LEGACY_SHORT[1]),
    ],
    "full": [
        *_ttft(FULL_TTFT, requests=100),
        *_throughput(FULL_CONCURRENCY, least=100, each=20, prompt=1000, output=200),
        *_long(FULL_LONG_INPUT, LEGACY_LONG_OUTPUT, requests=20),
        *_batch(FULL_BATCH, rounds=20, prompt=LEGACY_SHORT[0], output=LEGACY_SHORT[1]),
        *_memory(LEGACY_ROUNDS, size=16, prompt=16000, output=LEGACY_SHORT[1]),
    ],
}
