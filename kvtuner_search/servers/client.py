"""What is asked of a server, whichever engine it runs: requests, checked answers, and the client that an engine offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from kvtuner_search.servers.facts import ServerInfo
from kvtuner_search.servers.transport import Sink


@dataclass(frozen=True)
class Request:
    """One request with greedy sampling."""

    input_ids: tuple[int, ...]
    max_new_tokens: int = 1
    exact_length: bool = True  # the end-of-text token does not end it: exactly ``max_new_tokens`` must come back
    stop: tuple[str, ...] = ()  # texts that end it
    output_logprobs: bool = False  # log-probabilities of the generated tokens
    logprob_start: int | None = None  # log-probabilities of the prompt's tokens after this position
    asked: int | None = None  # log-probability of this token at the first generated position


@dataclass(frozen=True)
class Answer:
    """An answer, checked against the request."""

    output_ids: tuple[int, ...]
    cached_tokens: int  # tokens of the prompt that were found in the prefix cache
    input_logprobs: tuple[float, ...]  # of the prompt's tokens from position ``logprob_start + 1`` on
    output_logprobs: tuple[float, ...]
    asked: float | None  # log-probability of the requested token


class Load(NamedTuple):
    """What one copy of the model is doing."""

    requests: int  # running or waiting
    tokens: int  # of them, whose slots of the cache are in use


class Client(Protocol):
    """A connection to one server, which is not trusted: all errors of transport, status and content are ServerError."""

    timeout: float  # seconds for a whole answer

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def ready(self, within: float) -> bool:
        """Whether the server says within so many seconds that it can take requests; nothing is raised."""

    async def info(self) -> ServerInfo:
        """What the server says of itself, every field checked."""

    async def flush(self) -> None:
        """Empty the prefix cache, after waiting for a busy server."""

    async def generate(self, request: Request, within: float | None = None) -> tuple[Answer, Any]:
        """The checked answer, and the JSON as it came, which :meth:`Interface.read_answer` reads again; ``within`` seconds, or ``timeout``."""

    async def loads(self) -> list[Load]:
        """What each copy of the model is doing; empty if the server does not tell."""

    async def metrics(self, sink: Sink) -> None:
        """Pass the server's metrics, in Prometheus' text format, to ``sink`` as they come."""
