"""One answer, read from its stream: counting, gaps, and what a result keeps."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_search.bench import client
from kvtuner_search.bench.client import FAILURES, RequestResult, TimedRequest
from kvtuner_search.bench.pulse import EventLoopLag
from kvtuner_search.errors import DataError

WHOLE = RequestResult(
    index=3, round=1, sent=1.7e9, asked=5, prompt_tokens=4, status=200, finish="length", counted_prompt=4, claimed=5, cached_tokens=1,
    tokens=(7, 7, 8, 9, 7), arrivals=((10.0, 1), (12.5, 1), (20.0, 1), (20.0, 2)), lag=0.25, busy=0.125,
)  # fmt: skip


def lines(tokens: list[int], *, incremental: bool, pieces: list[int], ahead: int = 0) -> bytes:
    """SGLang's stream of an answer that comes in pieces of so many tokens; ``ahead``: ids that intermediate cumulative lines hold beyond their claim."""
    found, done = [], 0
    for number, size in enumerate(pieces):
        last = number == len(pieces) - 1
        before, done = done, done + size
        ids = tokens[before:done] if incremental else tokens[: done + (0 if last else ahead)]
        meta = {
            "id": "it",
            "finish_reason": {"type": "length", "length": len(tokens)} if last else None,
            "prompt_tokens": 4,
            "completion_tokens": done,
            "cached_tokens": 0,
        }
        found.append(f"data: {json.dumps({'text': 'x', 'output_ids': ids, 'meta_info': meta})}\n\n")
    return "".join([*found, "data: [DONE]\n\n"]).encode()


def read(stream: bytes, cuts: list[int], asked: int) -> client._Answer:
    """Feed a stream cut at these places, a millisecond a piece."""
    answer = client._Answer(TimedRequest.of(0, "it", [1, 2, 3, 4], asked))
    edges = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    for at, (first, last) in enumerate(itertools.pairwise(edges)):
        answer.take(stream[first:last], float(at))
    answer.take(b"\n", float(len(edges)))
    answer.judge()
    return answer


@settings(max_examples=300, deadline=None)
@given(
    # Two ids only: repeats make cumulative and incremental lines look alike.
    tokens=st.lists(st.integers(1, 2), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 3), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 10**6), max_size=20),
    incremental=st.booleans(),
    ahead=st.integers(0, 2),
)
def test_every_token_is_counted_once(
    tokens: list[int], sizes: list[int], cuts: list[int], incremental: bool, ahead: int
) -> None:
    pieces: list[int] = []
    while sum(pieces) < len(tokens):
        pieces.append(min(sizes[len(pieces)], len(tokens) - sum(pieces)))
    answer = read(
        lines(tokens, incremental=incremental, pieces=pieces, ahead=0 if incremental else ahead), cuts, len(tokens)
    )
    assert answer.tokens == tokens
    assert sum(count for _, count in answer.arrivals) == len(tokens)
    times = [at for at, _ in answer.arrivals]
    assert times == sorted(times)


@pytest.mark.parametrize("incremental", [False, True])
def test_counting_does_not_trust_the_claim(incremental: bool) -> None:
    stream = lines([5, 5, 5], incremental=incremental, pieces=[1, 1, 1]).replace(
        b'"completion_tokens": 3', b'"completion_tokens": 6'
    )
    with pytest.raises(client._Fault) as caught:
        read(stream, [], 6)
    assert (caught.value.kind, caught.value.detail) == ("miscounted", "3 tokens came, 6 claimed, 6 asked for")


@pytest.mark.parametrize("claim", [b"null", b'"3"', b"-3", b"3.0", b"true"])
def test_a_claim_that_is_no_count_is_none(claim: bytes) -> None:
    stream = lines([5, 6, 7], incremental=False, pieces=[3]).replace(
        b'"completion_tokens": 3', b'"completion_tokens": ' + claim
    )
    with pytest.raises(client._Fault) as caught:
        read(stream, [], 3)
    assert caught.value.kind == "miscounted"


@pytest.mark.parametrize(
    "line",
    [
        b"data: {",
        b"data: 3",
        b"data: []",
        b'data: {"text": "x"}',
        b'data: {"output_ids": 3, "meta_info": {}}',
        b"hello",
        b"\xff\xfe",
    ],
)
def test_what_is_no_event_is_malformed(line: bytes) -> None:
    with pytest.raises(client._Fault) as caught:
        read(line + b"\n\n", [], 1)
    assert caught.value.kind == "malformed"
    assert caught.value.detail.isprintable()


def test_a_line_without_end_is_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_EVENT_LIMIT", 100)
    with pytest.raises(client._Fault, match="malformed"):
        read(b"data: " + b"1" * 200, [], 1)


def test_comments_and_fields_of_the_format_are_no_tokens() -> None:
    stream = b": ping\r\n\r\nevent: message\nid: 3\nretry: 10\n" + lines([5, 6], incremental=False, pieces=[1, 1])
    assert read(stream, [], 2).tokens == [5, 6]


def test_times_of_a_result() -> None:
    assert (WHOLE.ttft, WHOLE.latency, WHOLE.per_token) == (10.0, 20.0, 2.5)
    assert WHOLE.gaps == [2.5, 2.5, 2.5, 2.5]  # three came together after 7.5 ms
    assert math.isclose(sum(WHOLE.gaps), WHOLE.latency - WHOLE.ttft)
    one = RequestResult(index=-1, round=0, sent=0.0, asked=1, prompt_tokens=1, tokens=(3,), arrivals=((4.0, 1),))
    assert (one.per_token, one.gaps, one.warmup, one.whole) == (None, [], True, True)


def test_a_result_survives_its_json() -> None:
    failed = RequestResult(index=0, round=0, sent=1.5, asked=2, prompt_tokens=1, failure="refused", detail="no")
    for result in (WHOLE, failed):
        assert RequestResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    "content", [{}, {"tokens": 3}, WHOLE.to_json() | {"more": 1}, WHOLE.to_json() | {"arrivals": [[1]]}]
)
def test_a_foreign_result_is_an_error_with_a_remedy(content: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"not the result of a request .+: delete the file and run again"):
        RequestResult.from_json(content)


def test_the_request_asks_for_exactly_its_tokens() -> None:
    request = TimedRequest.of(-2, "name", (5, 6), 7)
    assert json.loads(request.body) == {
        "rid": "name", "input_ids": [5, 6], "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 7, "ignore_eos": True},
    }  # fmt: skip
    assert (request.index, request.prompt_tokens, request.asked) == (-2, 2, 7)


def test_every_failure_says_what_usually_causes_it() -> None:
    assert all(kind.replace("-", "").isalpha() and len(cause) > 20 for kind, cause in FAILURES.items())


def test_a_blocked_loop_shows_in_its_pulse() -> None:
    """The loop is kept from running for 0.2 s of processor time, so its tick must be late, and its thread must have been busy."""

    async def work() -> tuple[float, float]:
        async with EventLoopLag() as pulse:
            start = time.perf_counter()
            await asyncio.sleep(0.02)
            used = time.thread_time()
            while time.thread_time() - used < 0.2:
                pass
            blocked = pulse.since(start)
            await asyncio.sleep(0.02)
            assert pulse.since(start)[0] > 0
            return blocked

    lag, busy = asyncio.run(work())
    assert lag > 0.01  # at least 0.19 s late once, of a handful of ticks
    assert 0 <= busy <= 1.5
