"""One streaming request, untrusted: returned tokens are counted one by one and compared with the request and with the server's claim.

aiohttp is what SGLang's own load generator sends with. Nothing is retried, no redirect is followed, no proxy of the environment is used. The engine's
interface knows the body of a request and the events of a stream (``servers.stream``); what they may say is judged here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import aiohttp

from kvtuner_search.addresses import authorization
from kvtuner_search.bench.pulse import EventLoopLag
from kvtuner_search.errors import DataError
from kvtuner_search.profile.text import printable
from kvtuner_search.secrets import mask, remember
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.stream import StreamFault

# Kinds of failure, with their usual causes. The names are stable: records contain them.
FAILURES: Final = {
    "refused": "no connection: the server is down, or the address is wrong",
    "http-status": "the server answered, but generated nothing: a wrong path, or a node of rank > 0, which answers 404 to everything but its health check",
    "dropped": "the connection ended before the answer did: the server crashed or restarted, or a proxy closed it",
    "stalled": "no byte arrived within the time allowed: the server hangs, or its queue is longer than that",
    "timeout": "the whole answer took longer than allowed",
    "malformed": "the answer is not an event stream of this engine: another server, or one that does not stream",
    "server-error": "the stream carried an error instead of an answer",
    "aborted": "the server aborted the request",
    "wrong-request": "the answer has another request's id: it was swapped, or replayed from a cache in between",
    "wrong-prompt": "the server counted a different number of prompt tokens than were sent: it cut or replaced the prompt",
    "no-tokens": "the answer has no tokens: its latency is not that of a generation",
    "too-few-tokens": "the answer ended before the requested number of tokens: counting requested tokens would inflate throughput",
    "too-many-tokens": "more tokens came than were requested",
    "miscounted": "the server claims a different number of tokens than came",
    "uncounted": "the answer lacks the server's own counts, so prompt and answer cannot be checked for completeness: a proxy or another server drops them",
    "wrong-finish": "all tokens came, but the answer did not end by its length",
    "not-sent": "given up after too many failures in a row",
}
KEEP_ALIVE: Final = (
    2.0  # seconds; SGLang closes idle connections after 5, and a request sent into that would be dropped
)
_HEADERS: Final = {
    "Content-Type": "application/json",
    "Accept": "text/event-stream",
    "Accept-Encoding": "identity",  # compression collects tokens, in a proxy if not in the server
}
_EVENT_LIMIT: Final = 1 << 20  # bytes of one line, and for each requested token
_TOKEN_LIMIT: Final = 1 << 10  # more for each token; anything longer is not an answer
_READ_BUFFER: Final = 10 << 20  # bytes, as in SGLang's own load generator
_DETAIL: Final = 200  # characters of a failure's detail that are kept
_EXCERPT: Final = 4096  # bytes of an error's body that are read; masked before they are cut
_IDS: Final = 2**31  # if the vocabulary is not known


@dataclass(frozen=True)
class TimedRequest:
    """One request, made before the clock starts."""

    index: int  # position among the cell's measured prompts; negative: warm-up
    id: str  # travels with the request and must come back with its answer
    prompt_tokens: int
    asked: int  # tokens, exactly: the end-of-text token does not end the answer
    body: bytes
    vocabulary: int = _IDS  # ids of the model's embedding

    @classmethod
    def of(cls, index: int, identifier: str, prompt: Sequence[int], asked: int, vocabulary: int | None = None) -> Self:
        """Greedy, streaming, of exactly ``asked`` tokens."""
        body = json.dumps(interface().stream_body(identifier, prompt, asked), separators=(",", ":")).encode()
        return cls(index, identifier, len(prompt), asked, body, vocabulary or _IDS)


@dataclass(frozen=True)
class RequestResult:
    """The outcome of one request."""

    index: int  # position among the cell's measured prompts; negative: warm-up
    round: int  # of the cell, from 0
    sent: float  # seconds since 1970, by a clock that does not jump during a cell; in an open loop: when it was due
    asked: int  # tokens
    prompt_tokens: int  # that were sent
    status: int | None = None  # of HTTP; None: no answer
    failure: str = ""  # one of FAILURES; empty: the answer is complete
    detail: str = ""  # description of the failure
    finish: str | None = None  # reason, as the server gave it
    counted_prompt: int | None = None  # tokens of the prompt, as the server counted
    claimed: int | None = None  # tokens of the answer, as the server counted
    cached_tokens: int = 0  # tokens of the prompt that the prefix cache had
    tokens: tuple[int, ...] = ()  # ids that came
    arrivals: tuple[tuple[float, int], ...] = ()  # (ms since ``sent``, tokens that came then)
    lag: float = 0.0  # ms by which the client's own event loop was late on average while this request was under way
    busy: float = 0.0  # share of a core that the client's event loop used meanwhile

    @property
    def warmup(self) -> bool:
        """Whether the request is not measured."""
        return self.index < 0

    @property
    def whole(self) -> bool:
        """Status 200, as many tokens as asked and claimed, of this prompt and request, ended by length."""
        return not self.failure

    @property
    def ttft(self) -> float:
        """Milliseconds to the first token; for complete answers only."""
        return self.arrivals[0][0]

    @property
    def latency(self) -> float:
        """Milliseconds to the last token; for complete answers only."""
        return self.arrivals[-1][0]

    @property
    def per_token(self) -> float | None:
        """Milliseconds a token after the first; None for one token."""
        count = len(self.tokens)
        return (self.latency - self.ttft) / (count - 1) if count > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between tokens. Tokens that came together share the wait evenly, as in SGLang's own load generator."""
        together: dict[float, int] = {}
        for at, count in self.arrivals:
            together[at] = together.get(at, 0) + count
        found: list[float] = []
        for before, (now, count) in zip(together, list(together.items())[1:], strict=False):
            found += [(now - before) / count] * count
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` gives the same result back."""
        return {
            name: getattr(self, name) for name in _FIELDS
        }  # asdict copies deeply, which costs more than the request

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The result that ``to_json`` wrote.

        Raises:
            DataError: if it is not a result.
        """
        try:
            tokens = tuple(content["tokens"])
            arrivals = tuple((float(at), int(count)) for at, count in content["arrivals"])
            return cls(**(content | {"tokens": tokens, "arrivals": arrivals}))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"not the result of a request ({type(error).__name__}: {error}): delete the file and run again"
            ) from error


_FIELDS: Final = tuple(field.name for field in fields(RequestResult))


class _Fault(Exception):
    """A failure by one of the names in FAILURES."""

    def __init__(self, kind: str, detail: object) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, printable(mask(detail))[:_DETAIL]


class _Answer:
    """One answer as it comes in."""

    def __init__(self, request: TimedRequest) -> None:
        self.request = request
        self.status: int | None = None
        self.tokens: list[int] = []
        self.arrivals: list[tuple[float, int]] = []
        self.finish: str | None = None
        self.message = ""
        self._rest = b""
        self._events = 0
        self._limit = _EVENT_LIMIT + _TOKEN_LIMIT * request.asked
        self._reader = interface().stream_reader()
        self._counts: Mapping[str, Any] = {}  # of the latest event

    def count(self, name: str) -> int | None:
        """A number of tokens as the server's latest event has it."""
        value = self._counts.get(name)
        return value if type(value) is int and 0 <= value <= _IDS else None

    def take(self, data: bytes, at: float) -> None:
        """Read the lines that are complete with this data, which came ``at`` ms."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self._limit:
            raise _Fault("malformed", f"a line of more than {self._limit:,} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                content = line[5:].strip()
                if content != b"[DONE]":
                    self._event(content, at)
            elif line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise _Fault("malformed", f"no event: {line[:_DETAIL]!r}")

    def _event(self, content: bytes, at: float) -> None:
        self._events += 1
        try:
            event = self._reader.read(content, self.tokens)
        except StreamFault as fault:
            raise _Fault(fault.kind, fault.detail) from fault
        if event.id != self.request.id:
            raise _Fault("wrong-request", f"sent as {self.request.id}, answered as {event.id}")
        self._counts = event.counts
        if event.tokens is None:
            raise _Fault("malformed", "ids that had been sent before have changed")
        if new := event.tokens:
            if set(map(type, new)) != {int}:
                raise _Fault("malformed", f"ids {new[:8]}")
            if not 0 <= min(new) <= max(new) < self.request.vocabulary:
                raise _Fault("malformed", f"ids {new[:8]} of a vocabulary of {self.request.vocabulary}")
            if (
                len(self.tokens) + len(new) > 2 * self.request.asked + 8
            ):  # far beyond what judge() counts: it may never end
                raise _Fault(
                    "too-many-tokens", f"over {len(self.tokens) + len(new) - 1} of {self.request.asked} tokens"
                )
            self.tokens += new
            self.arrivals.append((round(at, 3), len(new)))
        if event.finish is not None:
            self.finish, self.message = _word(event.finish), _word(event.message)

    def judge(self) -> None:
        """Raise _Fault unless the answer is complete."""
        count, asked = len(self.tokens), self.request.asked
        prompt, claimed = self.count("prompt_tokens"), self.count("completion_tokens")
        if self.finish is None:
            if not self._events:
                raise _Fault("no-tokens", "status 200 and nothing else")
            raise _Fault("dropped", f"the stream ended after {count} of {asked} tokens without a finish reason")
        if self.finish == "abort":
            raise _Fault("aborted", self.message)
        missing = [name for name in ("prompt_tokens", "completion_tokens") if name not in self._counts]
        if missing or self._counts["prompt_tokens"] is None:
            raise _Fault("uncounted", f"the last event has no {' and no '.join(missing or ['prompt_tokens'])}")
        if prompt != self.request.prompt_tokens:
            raise _Fault("wrong-prompt", f"{prompt} tokens of {self.request.prompt_tokens}")
        if not count:
            raise _Fault("no-tokens", f"0 of {asked} tokens came, {claimed} claimed")
        if claimed != count:
            raise _Fault("miscounted", f"{count} tokens came, {claimed} claimed, {asked} asked for")
        if count != asked:
            kind = "too-few-tokens" if count < asked else "too-many-tokens"
            raise _Fault(kind, f"{count} of {asked} tokens, ended by {self.finish}")
        if self.finish != "length":
            raise _Fault("wrong-finish", self.finish)
        if (self.count("cached_tokens") or 0) > self.request.prompt_tokens:
            raise _Fault("miscounted", f"{self.count('cached_tokens')} of {prompt} prompt tokens were cached")


def _word(value: object) -> str:
    return printable(mask(value))[:_DETAIL]


def session(timeout: float, stall: float, key: str | None = None) -> aiohttp.ClientSession:
    """A session without limits on connections.

    Args:
        timeout: seconds that a whole request may take.
        stall: seconds without a byte after which it is given up.
        key: sent as bearer token, and masked in what is kept of answers.
    """
    remember(key)
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=min(stall, 30.0), sock_read=stall),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
        read_bufsize=_READ_BUFFER,
        headers=authorization(key),
        auto_decompress=False,  # what unpacks to gigabytes is not a stream of tokens
        trust_env=False,
    )


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    request: TimedRequest,
    pulse: EventLoopLag,
    epoch: float,
    round_: int,
    due: float | None = None,
) -> RequestResult:
    """Send one request and read its answer to the end. Never raises for what a server does.

    Args:
        url: that takes the body and answers with a stream.
        epoch: seconds since 1970 when the performance counter was 0.
        round_: of the cell.
        due: when an open loop was to send it, on the performance counter; the clock runs from there, so that a generator that
            is late does not hide waiting. None: now.
    """
    answer = _Answer(request)
    fault: _Fault | None = None
    called = time.perf_counter()
    began = called if due is None else due
    try:
        async with http.post(url, data=request.body, headers=_HEADERS, allow_redirects=False) as response:
            answer.status = response.status
            coding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if coding not in ("identity", ""):
                raise _Fault("malformed", f"it is compressed ({coding}), which was not requested")
            if response.status != 200:
                raise _Fault("http-status", f"{response.status}: {await _excerpt(response)}")
            while data := await response.content.readany():
                answer.take(data, (time.perf_counter() - began) * 1e3)
            answer.take(b"\n", (time.perf_counter() - began) * 1e3)  # the text after the last line's end
        answer.judge()
    except _Fault as error:
        fault = error
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
        fault = _Fault("refused", error)
    except aiohttp.SocketTimeoutError:
        fault = _Fault("stalled", f"after {len(answer.tokens)} of {request.asked} tokens")
    except TimeoutError:
        fault = _Fault("timeout", f"after {len(answer.tokens)} of {request.asked} tokens")
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, OSError) as error:
        came = f"after {len(answer.tokens)} of {request.asked} tokens"
        fault = _Fault("dropped", f"{came}: {error or type(error).__name__}")
    except aiohttp.ClientError as error:
        fault = _Fault("malformed", f"{type(error).__name__}: {error}")
    lag, busy = pulse.since(called)
    return RequestResult(
        index=request.index,
        round=round_,
        sent=round(epoch + began, 6),
        asked=request.asked,
        prompt_tokens=request.prompt_tokens,
        status=answer.status,
        failure=fault.kind if fault else "",
        detail=fault.detail if fault else "",
        finish=answer.finish,
        counted_prompt=answer.count("prompt_tokens"),
        claimed=answer.count("completion_tokens"),
        cached_tokens=min(answer.count("cached_tokens") or 0, request.prompt_tokens),
        tokens=tuple(answer.tokens),
        arrivals=tuple(answer.arrivals),
        lag=round(lag * 1e3, 3),
        busy=round(busy, 3),
    )


async def _excerpt(response: aiohttp.ClientResponse) -> str:
    """The beginning of an error's body, if it comes."""
    try:
        return (await response.content.read(_EXCERPT)).decode(errors="replace")
    except (TimeoutError, aiohttp.ClientError, OSError):
        return "(no body)"
