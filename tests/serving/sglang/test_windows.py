"""Real servers of models whose layers have windows: contexts far beyond them, over packed rows.

Gemma 2 and 3 and OLMo 3 keep all rows of all layers in one pool, and attention alone has windows. AFMoE (here without experts, and told
so in its config.json) keeps rows of windows in a pool of their own, as SGLang does for gpt-oss.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from offline_packed import COUNT, Greedy, OfflinePacked
from servers import Server, running
from serving_checks.bases import example_profile
from window_models import WINDOW, write_window_model

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.capacity import heads_per_rank
from kvtuner_search.serving.sglang.model import served_model

TIE = 1e-3  # logits; fp32 sums in other orders differ by less
TOKENS = 420  # of the pool: few, so that requests are retracted
LONG = 200  # tokens of an answer; two and their prompts do not fit
SURE = 8  # of them that are compared
LAYERS = [
    LayerSpec.parse(text)
    for text in ("b87665544/b76655443", "8-g64-asym-c/4-g64-asym", "8-g32-sym/b65554433", "4-g32-asym/8-g64-sym")
]
DRAWN = random.Random(3)
PROMPTS = [[DRAWN.randrange(5, 8000) for _ in range(length)] for length in (2, WINDOW, 40, 75, 130)]


@dataclass(frozen=True)
class Case:
    model: str
    tp: int = 1
    two_pools: bool = False
    more: tuple[str, ...] = ()


CASES = [
    Case("gemma2", more=("--chunked-prefill-size", "64")),
    Case("gemma3", tp=2),
    Case("olmo3", more=("--disable-overlap-schedule",)),
    # One request alone must fit: SGLang takes a window's slots back every 128 tokens only, and ends a request for which it has none.
    Case("afmoe", two_pools=True, more=("--swa-full-tokens-ratio", "0.7")),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_window_model(tmp_path_factory.mktemp("models") / case.model, case.model)


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_profile(tmp_path_factory.mktemp("profiles") / "windows.json", served_model(str(model)), LAYERS)


@pytest.fixture(scope="module")
def expected(model: Path, profile: Path) -> list[Greedy]:
    reference = OfflinePacked(profile, torch.float32, model)
    found = [reference.greedy(prompt, COUNT) for prompt in PROMPTS]
    reference.forget_windows()
    assert reference.greedy(PROMPTS[-1], COUNT).tokens != found[-1].tokens
    return found


@pytest.fixture(scope="module")
def server(
    case: Case, model: Path, profile: Path, expected: list[Greedy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running(
        tmp_path_factory.mktemp("server"), "--kvtuner-profile", str(profile), "--dtype", "float32", "--max-total-tokens",
        str(TOKENS), "--tp-size", str(case.tp), "--schedule-conservativeness", "0.1", *case.more, model=model,
        variables={"SGLANG_CPU_OMP_THREADS_BIND": "0|1" if case.tp == 2 else "0-1"},
    ) as started:  # fmt: skip
        yield started


def test_greedy_tokens_are_the_offline_packed_references(server: Server, expected: list[Greedy]) -> None:
    clear = [index for index, one in enumerate(expected) if min(one.margins) > TIE]
    assert len(clear) >= len(PROMPTS) - 1
    prompts, right = [PROMPTS[index] for index in clear], [expected[index].tokens for index in clear]
    assert [server.generate(prompt, COUNT)["output_ids"] for prompt in prompts] == right
    again = [server.generate(prompt, COUNT) for prompt in reversed(prompts)]
    assert [one["output_ids"] for one in reversed(again)] == right
    assert again[0]["meta_info"]["cached_tokens"] > len(prompts[-1]) - WINDOW
    server.post("/flush_cache?timeout=60", {})
    assert [one["output_ids"] for one in server.generate(prompts[:3], COUNT)] == right[:3]


def test_bytes_and_tokens_are_what_the_layout_gives(server: Server, case: Case, profile: Path) -> None:
    loaded, info = load(profile), server.info()
    heads, report = heads_per_rank(loaded.model.num_kv_heads, case.tp), info["kvtuner"]
    each = [bytes_per_token([layer], heads, loaded.model.head_dim) for layer in LAYERS]
    windows = sum(n for n, kind in zip(each, loaded.model.kinds, strict=True) if kind.window)
    assert report["tokens"] == info["max_total_num_tokens"] == TOKENS
    assert report["bytes_per_token"] == sum(each)
    if case.two_pools:
        slots = TOKENS * 7 // 10
        assert (report["window_tokens"], report["window_bytes_per_token"]) == (slots, windows)
        assert report["pool_bytes"] == (TOKENS + 1) * (sum(each) - windows) + (slots + 1) * windows
    else:
        assert (report["window_tokens"], report["window_bytes_per_token"]) == (None, 0)
        assert report["pool_bytes"] == (TOKENS + 1) * sum(each)


def test_retracted_requests_are_finished_and_their_slots_come_back(server: Server) -> None:
    server.post("/flush_cache?timeout=60", {})
    long = PROMPTS[2]

    def ask(index: int, gap: float) -> list[int]:
        time.sleep(index * gap)
        output: list[int] = server.generate([index + 5, *long], LONG)["output_ids"]
        return output

    for gap in (0.2, 0.1, 0.4, 0.05):  # what is admitted while others run depends on how quick the machine is
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(ask, range(4), [gap] * 4))
        if "KV cache pool is full. Retract requests" in server.log():
            break
    assert "KV cache pool is full. Retract requests" in server.log()
    assert [len(one) for one in together] == [LONG] * 4
    server.post("/flush_cache?timeout=60", {})
    # Sums of other batches round differently, which changes a code of few bits now and then: later tokens may differ.
    assert [one[:SURE] for one in together] == [
        server.generate([index + 5, *long], SURE)["output_ids"] for index in range(4)
    ]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # SGLang's own count of leaks would have ended the server
        server.post("/flush_cache?timeout=60", {})
        used = [load["num_tokens"] for load in json.loads(server.get("/get_load"))]
        if not any(used):
            return
        time.sleep(1)
    pytest.fail(f"slots are still in use: {used}")
