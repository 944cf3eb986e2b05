"""A stand-in for ``python -m sglang.launch_server`` that speaks its HTTP surface, with faults on demand. Nothing is computed.

The log-probability of a token and the next greedy token are fixed functions of the tokens before them. Environment variables:
``FAKE_LOSS`` is taken off every log-probability with a profile, ``FAKE_FLIP`` makes greedy tokens differ at positions that it
divides, ``FAKE_PLAIN`` ignores --kvtuner-as-stored, ``FAKE_DIE`` ends it at once, ``FAKE_SLOW`` is seconds a request,
``FAKE_LOG`` is a file that gets one line for every /generate, ``FAKE_PIDS`` one with the ids of its processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.search.servers.fake_base import FakeBase, HandlerBase

VOCABULARY = 200


def logprob(prefix: list[int], token: int) -> float:
    return -(1 + (sum(prefix) * 31 + len(prefix) * 17 + token) % 97 / 97)


class Fake(FakeBase):
    """Serves until it is shut down."""

    def __init__(self, port: int = 0, profile: str | None = None, as_stored: bool = False, **info: Any) -> None:
        super().__init__(Handler, port, profile, as_stored, info)
        self.loss = float(os.environ.get("FAKE_LOSS", "0.01")) if profile else 0.0
        self.flip = int(os.environ.get("FAKE_FLIP", "0")) if profile else 0
        self.prefixes: set[tuple[int, ...]] = set()
        self.fault: dict[
            str, Any
        ] = {}  # replaces fields of every answer of /generate; "status" and "stall" are special
        # Answers requests that may stop early, by their prompt; None: as any other.
        self.reply: Callable[[list[int]], list[int] | None] = lambda prompt: None
        self.asked: list[dict[str, Any]] = []

    def forget(self) -> None:
        self.prefixes.clear()

    def next(self, prefix: list[int]) -> int:
        token = (sum(prefix) * 7 + len(prefix)) % VOCABULARY
        return (token + 1) % VOCABULARY if self.flip and len(prefix) % self.flip == 0 else token


class Handler(HandlerBase):
    server: Fake

    def generate(self, body: dict[str, Any]) -> None:
        server = self.server
        time.sleep(float(os.environ.get("FAKE_SLOW", "0")) + server.fault.get("stall", 0))
        if "FAKE_LOG" in os.environ:
            with server.lock, Path(os.environ["FAKE_LOG"]).open("a") as stream:
                stream.write(f"{len(body['input_ids'])}\n")
        server.asked.append(body)
        if "status" in server.fault:
            return self.reply(server.fault["status"], server.fault.get("body", b"Not Found"))
        tokens, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        output: list[int] = []
        for _ in range(count):
            output.append(server.next(tokens + output))
        early = None if "ignore_eos" in body["sampling_params"] else server.reply(tokens)
        output = output if early is None else early
        meta = {
            "finish_reason": {"type": "length", "length": count} if early is None else {"type": "stop", "matched": 0},
            "prompt_tokens": len(tokens),
            "completion_tokens": len(output),
            "cached_tokens": self.cached(tokens),
        }
        if body.get("return_logprob"):
            rows = [
                [logprob((tokens + output)[: len(tokens) + i], t) - server.loss, t, None] for i, t in enumerate(output)
            ]
            meta["output_token_logprobs"] = rows
            start = body.get("logprob_start_len", len(tokens))
            inputs = [
                [logprob(tokens[:i], tokens[i]) - server.loss, tokens[i], None] for i in range(start, len(tokens))
            ]
            if inputs:
                inputs[0][0] = None
            meta["input_token_logprobs"] = inputs
            asked = body.get("token_ids_logprob") or []
            meta["output_token_ids_logprobs"] = [[[logprob(tokens, t) - server.loss, t, None] for t in asked]]
        content: dict[str, Any] = {"output_ids": output, "meta_info": meta}
        for name, value in server.fault.items():
            if name in ("output_ids", "meta_info"):
                content[name] = value
            elif name != "stall":
                meta[name] = value
        return self.reply(200, server.fault.get("raw", content))

    def cached(self, tokens: list[int]) -> int:
        """Tokens of the prompt that an earlier request has stored, and this one's are stored."""
        if self.server.info["disable_radix_cache"]:
            return 0
        found = next((n for n in range(len(tokens) - 1, 0, -1) if tuple(tokens[:n]) in self.server.prefixes), 0)
        self.server.prefixes.update(tuple(tokens[:n]) for n in range(1, len(tokens) + 1))
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kvtuner-profile")
    parser.add_argument("--kvtuner-as-stored", action="store_true")
    parser.add_argument("--page-size", type=int, default=1)
    arguments, _ = parser.parse_known_args()
    if os.environ.get("FAKE_DIE"):
        sys.exit("ValueError: this server cannot start")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # SGLang has children too
    if "FAKE_PIDS" in os.environ:
        Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    as_stored = arguments.kvtuner_as_stored and not os.environ.get("FAKE_PLAIN")
    server = Fake(
        arguments.port,
        arguments.kvtuner_profile,
        as_stored,
        model_path=arguments.model_path,
        page_size=arguments.page_size,
    )
    server.serve_forever()
