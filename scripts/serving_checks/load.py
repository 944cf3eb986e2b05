"""Many requests at once: what was really returned, and when. Errors are failures, nothing is retried."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

LIMIT = 1 << 26  # bytes of a streamed event: the last one holds all tokens


@dataclass(frozen=True)
class Request:
    """One greedy request of exactly ``output`` tokens."""

    prompt: tuple[int, ...]
    output: int
    stream: bool = False
    abort_after: int | None = None  # close the connection after so many streamed tokens


@dataclass(frozen=True)
class Outcome:
    """What came of a request."""

    tokens: tuple[int, ...] = ()
    seconds: float = 0.0  # until all was there
    first: float | None = None  # until the first token, if streamed
    cached: int = 0  # tokens of the prompt that the prefix cache had
    error: str = ""
    aborted: bool = False  # by us
    cut: bool = False  # not finished when time was up


@dataclass(frozen=True)
class Traffic:
    """All requests of a measurement."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def returned(self) -> int:
        """Tokens of the requests that were finished."""
        return sum(len(outcome.tokens) for outcome in self.finished)

    @property
    def finished(self) -> list[Outcome]:
        return [one for one in self.outcomes if not (one.error or one.aborted or one.cut)]

    @property
    def errors(self) -> list[str]:
        return [one.error for one in self.outcomes if one.error]

    @property
    def rate(self) -> float:
        """Returned tokens a second."""
        return self.returned / self.seconds


def send(url: str, requests: Sequence[Request], concurrency: int, seconds: float) -> Traffic:
    """Send requests in their order, at most ``concurrency`` at a time; what is unfinished after ``seconds`` is cut off."""
    return asyncio.run(_send_all(url, requests, concurrency, seconds))


async def _send_all(url: str, requests: Sequence[Request], concurrency: int, seconds: float) -> Traffic:
    outcomes = [Outcome(cut=True)] * len(requests)
    waiting = iter(enumerate(requests))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(
        url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=LIMIT
    ) as session:

        async def work() -> None:
            for index, request in waiting:
                outcomes[index] = await _one(session, request)

        began = time.monotonic()
        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(requests)))]
        done, pending = await asyncio.wait(workers, timeout=seconds)
        taken = time.monotonic() - began
        for worker in pending:
            worker.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for worker in done:
            worker.result()
    return Traffic(outcomes, taken)


async def _one(session: aiohttp.ClientSession, request: Request) -> Outcome:
    began = time.monotonic()
    sampling = {"temperature": 0, "max_new_tokens": request.output, "ignore_eos": True}
    body = {"input_ids": request.prompt, "sampling_params": sampling, "stream": request.stream}
    first: float | None = None
    answer: dict[str, Any] = {}
    try:
        async with session.post("/generate", json=body) as response:
            if response.status != 200:
                return Outcome(error=f"status {response.status}: {(await response.text())[:200]}")
            if not request.stream:
                answer = await response.json()
            else:
                async for line in response.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    answer = json.loads(line[6:])
                    if "error" in answer:
                        return Outcome(error=str(answer["error"])[:200])
                    if first is None and answer.get("output_ids"):
                        first = time.monotonic() - began
                    if request.abort_after is not None and len(answer["output_ids"]) >= request.abort_after:
                        response.close()
                        return Outcome(aborted=True)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Outcome(error=f"{type(error).__name__}: {error}"[:200])
    return judge(request, answer, time.monotonic() - began, first)


def judge(request: Request, answer: dict[str, Any], seconds: float, first: float | None) -> Outcome:
    """An answer counts if it is whole: every token that was asked for, of this prompt, ended by its length."""
    meta = answer.get("meta_info") or {}
    tokens, finish = answer.get("output_ids") or [], meta.get("finish_reason") or {}
    if meta.get("prompt_tokens") != len(request.prompt):
        return Outcome(error=f"{meta.get('prompt_tokens')} prompt tokens of {len(request.prompt)}: the prompt was cut")
    if len(tokens) != request.output or finish.get("type") != "length" or meta.get("completion_tokens") != len(tokens):
        return Outcome(error=f"{len(tokens)} of {request.output} tokens, ended by {str(finish)[:100]}")
    return Outcome(tuple(tokens), seconds, first, int(meta.get("cached_tokens", 0)))


def random_prompt(draw: random.Random, length: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids, each as likely as any other: no two prompts share a prefix of more than a token or two."""
    return tuple(draw.choices(range(10, vocabulary), k=length))
