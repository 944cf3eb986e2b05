"""A profile together with what SGLang does on its own: prefix cache, chunks, batches, overlap, retraction."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from offline_packed import COUNT, Greedy
from servers import Server, running

TOKENS = 1024  # the small pool's
LONG = 200  # tokens; six such answers and their common prompt do not fit it


@pytest.fixture(scope="module")
def expected(offline: Callable[..., list[Greedy]], mixed_profile: Path) -> list[list[int]]:
    return [greedy.tokens for greedy in offline(mixed_profile, "float32")]


@pytest.fixture(scope="module")
def expected_of_bases(offline: Callable[..., list[Greedy]], banded_profile: Path) -> list[list[int]]:
    return [greedy.tokens for greedy in offline(banded_profile, "float32")]


@pytest.fixture(scope="module")
def roomy(mixed_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Page size 1, prefix cache and overlap scheduling on, as by default."""
    arguments = ["--kvtuner-profile", str(mixed_profile), "--dtype", "float32", "--enable-cache-report"]
    with running(tmp_path_factory.mktemp("logs"), *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def tight(banded_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Chunks of 64 tokens, which go together with decode, no overlap, fitted bases, and a pool so small that requests are retracted."""
    arguments = [
        "--kvtuner-profile", str(banded_profile), "--dtype", "float32", "--chunked-prefill-size", "64",
        "--max-total-tokens", str(TOKENS), "--disable-overlap-schedule", "--schedule-conservativeness", "0.1",
        "--enable-metrics", "--enable-cache-report", "--enable-mixed-chunk",
    ]  # fmt: skip
    with running(tmp_path_factory.mktemp("logs"), *arguments) as server:
        yield server


def test_a_prefix_that_was_cached_changes_nothing(
    roomy: Server, prompts: Sequence[Sequence[int]], expected: list[list[int]]
) -> None:
    """A prompt is read as stored on the CPU, so it does not matter who computed its prefix."""
    assert roomy.info()["disable_overlap_schedule"] is False
    roomy.post("/flush_cache?timeout=60", {})
    first, second = (roomy.generate(prompts[-1], COUNT) for _ in range(2))
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] >= len(prompts[-1]) - 1
    assert first["output_ids"] == second["output_ids"] == expected[-1]


def test_requests_in_one_batch_get_what_they_get_alone(
    roomy: Server, prompts: Sequence[Sequence[int]], expected: list[list[int]]
) -> None:
    roomy.post("/flush_cache?timeout=60", {})
    found = roomy.generate(list(prompts), COUNT)
    assert [one["output_ids"] for one in found] == expected
    assert re.search(rf"Decode batch, #running-req: {len(prompts)}|#new-seq: [2-9]", roomy.log())


def test_requests_that_come_and_go(roomy: Server, prompts: Sequence[Sequence[int]], expected: list[list[int]]) -> None:
    """Continuous batching: requests join while others decode."""
    roomy.post("/flush_cache?timeout=60", {})

    def ask(index: int) -> Any:
        time.sleep(index * 0.15)
        return roomy.generate(prompts[index], COUNT)["output_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == expected


def test_chunks_change_nothing(
    tight: Server, prompts: Sequence[Sequence[int]], expected_of_bases: list[list[int]]
) -> None:
    info = tight.info()
    assert (info["disable_overlap_schedule"], info["kvtuner"]["tokens"]) == (True, TOKENS)
    assert [tight.generate(prompt, COUNT)["output_ids"] for prompt in prompts] == expected_of_bases
    log = tight.log()
    assert max(int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", log)) <= 64


def test_first_tokens_in_the_prefix_cache_and_in_mixed_batches_stay_first_tokens(
    tight: Server, prompts: Sequence[Sequence[int]], expected_of_bases: list[list[int]]
) -> None:
    """A prefix from the cache brings its first token along, and a chunk that is read with decode marks nothing but first tokens."""
    for prompt, right in list(zip(prompts, expected_of_bases, strict=True))[
        1:5
    ]:  # short ones, which the first token matters to
        again = tight.generate(prompt, COUNT)
        assert again["meta_info"]["cached_tokens"] >= len(prompt) - 1
        assert again["output_ids"] == right
    tight.post("/flush_cache?timeout=60", {})

    def ask(index: int) -> Any:
        time.sleep(index * 0.15)
        return tight.generate(prompts[index], COUNT)["output_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, range(len(prompts)))) == expected_of_bases
    assert re.search(r"Prefill batch.*#running-req: [1-9]", tight.log())


def test_retracted_requests_are_finished_and_their_slots_come_back(
    tight: Server, prompts: Sequence[Sequence[int]], expected_of_bases: list[list[int]]
) -> None:
    long, right = prompts[-1], expected_of_bases[-1]
    alone = tight.generate(long, LONG)["output_ids"]
    assert alone[:COUNT] == right
    tight.post("/flush_cache?timeout=60", {})

    def ask(index: int) -> list[int]:
        time.sleep(index * 0.4)  # one at a time, or SGLang would admit only as many as can be finished
        output: list[int] = tight.generate(long, LONG)["output_ids"]
        return output

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    assert [len(one) for one in found] == [LONG] * 6
    assert all(one[:COUNT] == right for one in found)
    assert "KV cache pool is full. Retract requests" in tight.log()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # SGLang's own count of leaks would have ended the server
        tight.post("/flush_cache?timeout=60", {})
        used = re.search(r"^sglang:num_used_tokens\{.*\} ([0-9.]+)", tight.get("/metrics").decode(), re.MULTILINE)
        if used is not None and float(used[1]) == 0:
            return
        time.sleep(1)
    pytest.fail(f"slots are still in use: {used}")
