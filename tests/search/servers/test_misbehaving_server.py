"""Servers that drip, never end, compress, nest, or send impossible values: named, within the time allowed and in bounded memory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.addresses import check_key, check_url
from kvtuner_search.bench.client import TimedRequest as Streamed
from kvtuner_search.bench.load import run_cell
from kvtuner_search.bench.record import Shape
from kvtuner_search.bench.watch import Watch
from kvtuner_search.errors import UsageError
from kvtuner_search.servers.client import Request
from kvtuner_search.servers.facts import Facts
from kvtuner_search.servers.transport import ServerError
from kvtuner_search.serving.sglang.client import Client, read_answer
from kvtuner_search.serving.sglang.info import read_info
from tests.search.servers.fake_sglang import Fake
from tests.search.servers.misbehaving import FAULTS, misbehaving

ROOT = Path(__file__).parents[3]
PROMPT = tuple(range(5, 15))
Start = Callable[..., Fake]
SAID = {
    "silent": r"did not answer within 1\.5 s: it stalled",
    "drip": r"had sent \d+ bytes after 1\.5 s and was not done",
    "drip-head": r"did not answer within 1\.5 s",
    "drip-chunks": r"had sent \d+ bytes after 1\.5 s and was not done",
    "endless": r"more than [\d,]+ bytes came",
    "endless-line": r"more than [\d,]+ bytes came",
    "huge-json": r"more than [\d,]+ bytes came",
    "bomb": r"it is compressed \(gzip\)",
    "small-gzip": r"it is compressed \(gzip\)",
    "deep": "did not answer with JSON",
    "deep-objects": "did not answer with JSON",
    "short": "cannot be reached",
    "negative": "cannot be reached",
    "noise": "cannot be reached",
    "utf-16": "did not answer with JSON",
    "switch": "cannot be reached|answered 101",
    "redirect": "redirects are not followed",
    "series": r"more than [\d,]+ bytes came|did not answer with JSON",
    "odd-ranks": "did not answer with JSON",
    "sum": "did not answer with JSON",
}


PATIENT = 20.0  # seconds for faults that show at once, on a machine that is busy too


def patience(fault: str) -> float:
    return 1.5 if fault.startswith(("silent", "drip")) else PATIENT


def asked(url: str, question: Callable[[Client], Any], **more: Any) -> Any:
    async def main() -> Any:
        async with Client(url, **{"timeout": 1.5, **more}) as client:
            return await question(client)

    return asyncio.run(main())


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(fault: str) -> None:
    with misbehaving(fault) as url:
        for question in (lambda client: client.info(), lambda client: client.generate(Request(PROMPT))):
            with pytest.raises(ServerError, match=SAID[fault]) as caught:
                asked(url, question, timeout=patience(fault))
            assert url in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 700


@pytest.mark.parametrize("fault", ["endless", "huge-json", "bomb", "deep", "series", "endless-line"])
def test_memory_stays_bounded(fault: str) -> None:
    """A process of its own asks for everything, metrics too; the greatest memory that it had is its own count."""
    code = """
import asyncio, sys
from kvtuner_search.bench.watch import Watch
from kvtuner_search.servers.client import Request
from kvtuner_search.servers.transport import ServerError
from kvtuner_search.serving.sglang.client import Client
from tests.search.servers.misbehaving import misbehaving
async def ask(url, question):
    async with Client(url, 20.0) as client:
        await question(client)
with misbehaving("silent"): pass
url = sys.argv[1]
for question in (lambda c: c.info(), lambda c: c.flush(), lambda c: c.generate(Request((1, 2, 3)))):
    try:
        asyncio.run(ask(url, question))
    except ServerError as error:
        print(error)
Watch(url, None, local=False, first_device="0", timeout=20.0).scrape()
# Not ru_maxrss, which begins with that of the process that started this one.
print("peak", next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with misbehaving(fault) as url:
        done = subprocess.run([sys.executable, "-c", code, url], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert 20 < int(last.removeprefix("peak ")) < 300, done.stdout


def facts() -> Facts:
    return read_info(Fake(port=0).info, "here").facts


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("series", "known lines: that is more than any server's ranks need"),
        ("endless-line", "the metrics do not end after"),
        ("odd-ranks", "a rank is a number"),
        ("sum", "implausibly large"),
        ("drip", "and was not done"),
        ("bomb", "it is compressed"),
    ],
)
def test_metrics_that_cannot_be_are_a_fault(fault: str, said: str) -> None:
    with misbehaving(fault) as url:
        watch = Watch(url, facts(), local=False, first_device="0", timeout=patience(fault))
        assert watch.scrape() == {}
    assert watch.fault is not None
    assert re.search(said, str(watch.fault))
    assert watch.scrapes() == []


def test_a_server_without_metrics_or_that_is_busy_has_no_fault(fake: Start) -> None:
    watch = Watch(fake().url, facts(), local=False, first_device="0")
    with misbehaving("silent") as url:
        silent = Watch(url, facts(), local=False, first_device="0", timeout=0.3)
        assert (watch.generated(), silent.generated()) == (None, None)
    assert watch.fault is silent.fault is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_that_misbehaves_is_a_named_failure(fault: str) -> None:
    shape = Shape(requests=1, concurrency=1, input_tokens=3, output_tokens=2)
    with misbehaving(fault) as url:
        (result,) = run_cell(
            url, [[1, 2, 3]], shape, concurrency=1, timeout=patience(fault), stall=min(patience(fault), 10.0) - 0.5
        )
    kinds = {
        "silent": {"stalled"},
        "drip": {"timeout"},
        "drip-head": {"stalled", "timeout"},
        "drip-chunks": {"timeout"},
    }
    wanted = {"malformed", "dropped", "http-status", "no-tokens", "timeout"}
    assert result.failure in kinds.get(fault, wanted), (result.failure, result.detail)
    if "gzip" in fault or fault == "bomb":
        assert "compressed (gzip)" in result.detail


ROW = [[-0.5, 1, None], [-0.5, 2, None]]
GOOD: dict[str, Any] = {
    "output_ids": [1, 2],
    "meta_info": {
        "finish_reason": {"type": "length"}, "prompt_tokens": 10, "completion_tokens": 2, "cached_tokens": 3, "output_token_logprobs": ROW,
    },
}  # fmt: skip
HUGE = 10**400


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_ids": [1, 8192]}, "answered token 8192, and the vocabulary ends at 8191: it serves another model"),
        ({"output_ids": [-1, 2]}, "answered token -1"),
        ({"output_ids": [1, HUGE]}, "answered token 1000"),
        ({"output_ids": [True, 2]}, "these are not token ids"),
        ({"output_ids": ["1", 2]}, "these are not token ids"),
        ({"output_ids": [1.0, 2]}, "these are not token ids"),
        ({"output_ids": {"0": 1}}, "the answer is empty"),
        ({"cached_tokens": 11}, "took 11 of 10 tokens from its prefix cache"),
        ({"cached_tokens": -1}, "took -1 of 10"),
        ({"cached_tokens": HUGE}, "took 1000"),
        ({"cached_tokens": "3"}, "took 3 of 10"),
        ({"prompt_tokens": None}, "without prompt_tokens"),
        ({"completion_tokens": None}, "without completion_tokens"),
        ({"prompt_tokens": 10.0}, r"prompt_tokens=10\.0: that is not a number of tokens"),
        ({"prompt_tokens": True}, "prompt_tokens=True: that is not a number"),
        ({"completion_tokens": "2"}, "completion_tokens='2': that is not a number"),
        ({"completion_tokens": HUGE}, "the answer is short"),
        ({"finish_reason": {"type": ["length"]}}, "not finished"),
        ({"finish_reason": "length"}, "not finished"),
        *(
            ({"output_token_logprobs": [[value, 1, None], ROW[1]]}, said)
            for value, said in (
                (0.5, r"= 0\.5: not a log-probability, which is at most 0"),
                (1, "= 1: not a log-probability"),
                (1e-4, "not a log-probability"),
                (HUGE, "not a log-probability"),
                (-1e300, "not a log-probability"),
                (float("inf"), "not a finite log-probability"),
                (float("-inf"), "not a finite log-probability"),
                (float("nan"), "not a finite log-probability"),
                (None, "not a finite log-probability"),
                ("-0.5", "not a finite log-probability"),
                (True, "not a finite log-probability"),
                ([-0.5], "not a finite log-probability"),
            )
        ),
        ({"output_token_logprobs": [[-0.5, True, None], ROW[1]]}, "of token True instead of 1"),
        ({"output_token_logprobs": [[-0.5], ROW[1]]}, "of token None"),
        ({"output_token_logprobs": ["row", ROW[1]]}, "of token None"),
        ({"output_token_logprobs": {}}, "no output_token_logprobs of 2"),
    ],
)
def test_values_are_checked_at_the_door(changes: dict[str, Any], said: str) -> None:
    request = Request(PROMPT, 2, output_logprobs=True)
    good = read_answer(request, GOOD, 8192)
    assert (good.output_ids, good.cached_tokens, good.output_logprobs) == ((1, 2), 3, (-0.5, -0.5))
    content = json.loads(json.dumps(GOOD))
    for name, value in changes.items():
        (content if name == "output_ids" else content["meta_info"])[name] = value
    with pytest.raises(ServerError, match=said) as caught:
        read_answer(request, content, 8192)
    assert len(str(caught.value)) < 500


def test_what_rounding_lifts_above_zero_counts_as_zero() -> None:
    rows = [[1.2e-7, 1, None], [0, 2, None]]
    content = GOOD | {"meta_info": GOOD["meta_info"] | {"output_token_logprobs": rows, "cached_tokens": None}}
    answer = read_answer(Request(PROMPT, 2, output_logprobs=True), content, 8192)
    assert (answer.output_logprobs, answer.cached_tokens) == ((0.0, 0.0), 0)


WRONG: list[tuple[str, Any]] = [
    ("version", 5), ("version", None), ("version", ""), ("version", "x" * 513), ("version", "0.5\x1b[31m"), ("model_path", ["m"]), ("dtype", 16),
    ("attention_backend", None), ("tp_size", 0), ("tp_size", "2"), ("tp_size", True), ("tp_size", HUGE), ("pp_size", -1), ("page_size", 1.0),
    ("max_total_num_tokens", 0), ("max_total_num_tokens", HUGE), ("max_total_num_tokens", float("inf")), ("quantization", {}), ("device", 3),
    ("disable_radix_cache", "no"), ("mem_fraction_static", float("nan")), ("mem_fraction_static", 1.5), ("mem_fraction_static", "0.5"),
    ("max_total_tokens", -1), ("internal_states", {}), ("internal_states", [None]), ("internal_states", [{"memory_usage": {"kvcache": -1.0}}]),
    ("internal_states", [{"memory_usage": {"kvcache": float("inf")}}]), ("kvtuner", []), ("kvtuner", "yes"), ("kvtuner", {"as_stored": True}),
    ("kvtuner", {"profile_digest": "sha256:"}), ("kvtuner", {"profile_digest": 3}), ("revision", ["main"]), ("json_model_override_args", {}),
    ("json_model_override_args", "["), ("json_model_override_args", "[]"), ("json_model_override_args", "[" * 60_000), ("context_length", "8k"),
    ("max_req_input_len", -1), ("nnodes", 0), ("dp_size", None), ("base_gpu_id", -1), ("speculative_num_steps", "3"), ("speculative_algorithm", 1),
    ("load_format", 0), ("kv_cache_dtype", 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{index}" for index, (name, _) in enumerate(WRONG)])
def test_server_info_is_checked_at_the_door(name: str, value: Any) -> None:
    with pytest.raises(
        ServerError, match=rf"^http://h:1/server_info says {name}[\w.]*=.+; is it SGLang 0\.5\?$|has no {name}"
    ) as caught:
        read_info({**Fake().info, name: value}, "http://h:1")
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


def test_fields_that_nobody_reads_and_null_where_sglang_has_null_are_no_fault() -> None:
    info = Fake().info | {"kvtuner": {}, "extra": HUGE, "revision": None, "internal_states": [], "device": None}
    assert read_info(info, "here").facts.profile_digest is None
    del info["attention_backend"]
    with pytest.raises(ServerError, match="here/server_info has no attention_backend: is it SGLang"):
        read_info(info, "here")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:30000",
        "ftp://h",
        "http://",
        "http://[::1",
        "http://h:x",
        "http://h:0",
        "http://h:99999",
        "http://h/?a=b",
        "http://h#f",
        "http://h h",
        "http://h\n",
        "",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(UsageError, match=r"is not a URL of a server: write http://host:port"):
        check_url(url)


def test_addresses_of_every_form_are_taken() -> None:
    for url in ("http://h:1", "https://h", "http://[::1]:30000", "http://u:pw@h:1/llm"):
        assert check_url(url + "/") == url
    with pytest.raises(UsageError, match=r"http://u:\*\*\*@h has credentials and there is an API key") as caught:
        check_url("http://u:hunter2@h", "key")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel", "tab\t", "\x00"])
def test_a_key_that_no_header_carries_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(UsageError, match="the API key cannot be sent, because") as caught:
        check_key(key)
    assert not key or key not in str(caught.value)
    assert check_key("sk-1.x_/~") == "sk-1.x_/~"
    assert check_key(None) is None


def test_the_streams_door_has_the_vocabulary_too() -> None:
    assert Streamed.of(0, "it", [1], 2).vocabulary == 2**31
    assert Streamed.of(0, "it", [1], 2, 8192).vocabulary == 8192
