"""A small truthful stand-in for ``python -m sglang.launch_server``: it streams, counts and caches as SGLang does. Nothing is computed.

The next greedy token is a fixed function of the tokens before it, and is the only likely one. Environment variables, for faults:
``FAKE_GARBLED`` makes decoding write other tokens than the likely ones, ``FAKE_CANNED`` answers every prompt alike, ``FAKE_LEAK`` loses so many
slots a request, ``FAKE_DIE_AFTER`` ends the process after so many streams, ``FAKE_UNCOUNTED`` leaves the metrics' token counter at 0,
``FAKE_TOKEN_SECONDS`` is the time of a token, ``FAKE_LOG`` is a file that gets a line for every stream, ``FAKE_PID`` one with the process' id.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3]))  # scripts outside of pytest import this file alone

from tests.search.servers.fake_base import FakeBase, HandlerBase

VOCABULARY = 8192  # the reference model's


def likely(prefix: list[int]) -> int:
    return (sum(prefix) * 7 + prefix[0] * 13 + len(prefix)) % VOCABULARY


def logprob(prefix: list[int], token: int) -> float:
    base = -(0.5 + (sum(prefix) * 31 + len(prefix) * 17) % 97 / 970)
    return base if token == likely(prefix) else base - 12


class Fake(FakeBase):
    """Serves until it is shut down."""

    def __init__(self, port: int = 0, profile: str | None = None, **info: Any) -> None:
        own = {"attention_backend": "torch_native", "nnodes": 1, "load_format": "auto", "kv_cache_dtype": "auto", "context_length": None,
               "json_model_override_args": "{}", "revision": None, "speculative_algorithm": None}  # fmt: skip
        super().__init__(Handler, port, profile, True, own | info)
        if profile and "kvtuner" not in info:
            self.info["kvtuner"]["bytes_per_token"] = self.bytes_per_token
        self.prompts: dict[int, list[int]] = {}  # the prefix cache: by first token
        self.running = self.streams = self.generated = self.lost = self.prompt_tokens = 0
        self.token_seconds = float(os.environ.get("FAKE_TOKEN_SECONDS", "0.002"))
        self.garbled, self.canned = bool(os.environ.get("FAKE_GARBLED")), bool(os.environ.get("FAKE_CANNED"))
        self.leak, self.die_after = int(os.environ.get("FAKE_LEAK", "0")), int(os.environ.get("FAKE_DIE_AFTER", "0"))
        self.lie = ""  # of streamed answers: 404, no-tokens, drops or stalls; of all: 404-always
        self.uncounted = bool(os.environ.get("FAKE_UNCOUNTED"))

    def forget(self) -> None:
        self.prompts.clear()

    def answer(self, prompt: list[int], count: int) -> list[int]:
        prefix = [11, 12, 13] if self.canned else list(prompt)
        found: list[int] = []
        for _ in range(count):
            token = likely(prefix + found)
            found.append((token + 1) % VOCABULARY if self.garbled else token)
        return found

    def cached(self, prompt: list[int]) -> int:
        """Tokens of the prompt that an earlier one began with; the prompt is remembered."""
        with self.lock:
            self.prompt_tokens += len(prompt)
            before = self.prompts.get(prompt[0], [])
            self.prompts[prompt[0]] = prompt
        same = next(
            (n for n, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt))
        )
        return 0 if self.info["disable_radix_cache"] else min(same, len(prompt) - 1)

    def metrics(self) -> str:
        labels = '{engine_type="unified",model_name="/a/folder",tp_rank="0"}'
        return "".join(
            f"# TYPE {name} {kind}\n{name}{labels} {value}\n"
            for name, kind, value in (
                ("sglang:token_usage", "gauge", 0.25),
                ("sglang:num_running_reqs", "gauge", self.running),
                ("sglang:fwd_occupancy", "gauge", "NaN"),
                ("sglang:generation_tokens_total", "counter", 0 if self.uncounted else self.generated),
                ("sglang:prompt_tokens_total", "counter", self.prompt_tokens),
            )
        )


class Handler(HandlerBase):
    server: Fake

    def do_GET(self) -> None:
        server = self.server
        if server.lie == "404-always":
            self.reply(404, b'{"detail":"Not Found"}')
        elif self.path == "/metrics":
            self.reply(200, server.metrics().encode())
        elif self.path == "/get_load":
            load = {
                "num_reqs": server.running,
                "num_tokens": 30 * server.running + server.lost,
                "num_pending_tokens": 0,
            }
            self.reply(200, [load])
        else:
            super().do_GET()

    def generate(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.running += 1
            server.generated += body["sampling_params"]["max_new_tokens"]
        try:
            prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
            tokens, cached = server.answer(prompt, count), server.cached(prompt)
            time.sleep(server.token_seconds * (1 + len(prompt) / 40))  # well above what two cores could do
            if body.get("stream"):
                self.stream(body, prompt, tokens, cached)
            else:
                meta = self.meta(body, prompt, count, count, cached) | self.logprobs(body, prompt, tokens)
                self.reply(200, {"output_ids": tokens, "meta_info": meta})
        finally:
            with server.lock:
                server.running -= 1
                server.lost += server.leak

    def meta(self, body: dict[str, Any], prompt: list[int], done: int, count: int, cached: int) -> dict[str, Any]:
        return {
            "id": body.get("rid", "made up"), "prompt_tokens": len(prompt), "completion_tokens": done, "cached_tokens": cached,
            "finish_reason": {"type": "length", "length": count} if done == count else None,
        }  # fmt: skip

    def logprobs(self, body: dict[str, Any], prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        if not body.get("return_logprob"):
            return {}
        whole, start = prompt + tokens, body.get("logprob_start_len", len(prompt))
        rows = [[logprob(whole[:n], whole[n]) if n else None, whole[n], None] for n in range(start, len(whole))]
        inputs = rows[: max(0, len(prompt) - start)]
        if self.server.canned:
            rows[len(inputs) :] = [[-0.5, token, None] for token in tokens]
        if inputs:
            inputs[0][0] = None
        return {"input_token_logprobs": inputs, "output_token_logprobs": rows[len(inputs) :]}

    def stream(self, body: dict[str, Any], prompt: list[int], tokens: list[int], cached: int) -> None:
        server = self.server
        with server.lock:
            server.streams += 1
            if "FAKE_LOG" in os.environ:
                with Path(os.environ["FAKE_LOG"]).open("a") as log:
                    log.write(f"{len(prompt)} {len(tokens)}\n")
            if server.die_after and server.streams > server.die_after:
                os._exit(3)
        if server.lie == "404":
            return self.reply(404, b'{"detail":"Not Found"}')
        if server.lie == "no-tokens":
            tokens = []
        self.begin_stream()
        for done in range(1, len(tokens) + 1):
            if done > 1:
                time.sleep(server.token_seconds)
            event = {"output_ids": tokens[:done], "meta_info": self.meta(body, prompt, done, len(tokens), cached)}
            self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            if server.lie == "drops":
                return self.drop()
            if server.lie == "stalls":
                return time.sleep(5)
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kvtuner-profile")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--page-size", type=int, default=1)
    arguments = parser.parse_args()
    if "FAKE_PID" in os.environ:
        Path(os.environ["FAKE_PID"]).write_text(str(os.getpid()))
    Fake(
        arguments.port, arguments.kvtuner_profile, model_path=arguments.model_path, page_size=arguments.page_size
    ).serve_forever()
