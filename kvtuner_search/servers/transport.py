"""HTTP to a server that may misbehave: a deadline for the whole answer, a bound on its bytes, no compression, no redirects, no retries.

httpx2 because current releases of huggingface_hub bring it with every installation, it is maintained, and cancelling its
asynchronous requests closes their connections, so that Ctrl-C need not wait for a server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, Self

import httpx2
from pydantic_core import from_json  # its depth is bounded, and it is about three times as fast as json

from kvtuner_search.addresses import KEY_OPTION, authorization
from kvtuner_search.errors import ServingError
from kvtuner_search.profile.text import printable
from kvtuner_search.secrets import mask

EXCERPT: Final = 200  # characters of an answer that are shown
_READ: Final = 4096  # bytes read from a refusal; masked before they are cut to the excerpt
_PROBE: Final = 5.0  # seconds for a probe of another path
_CONNECT: Final = 30.0  # seconds for a connection, if the answer may take longer


class ServerError(ServingError):
    """A server did not answer, or its answer cannot be used."""


class BadAnswerError(ServerError):
    """An answer that no working server sends."""


class OutOfTimeError(ServerError):
    """A whole answer did not come in the time allowed; to ask again would only take as long again."""


class DrippingError(OutOfTimeError, BadAnswerError):
    """An answer had begun and was not done in the time allowed."""


def cut(value: object) -> str:
    """A server's text, safe for a message."""
    text = printable(" ".join(mask(value).split()))
    return (text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…") or "nothing"


def _seconds(count: float) -> str:
    return f"{round(count, 2):g}"


class Sink(Protocol):
    """Consumes a body piece by piece."""

    def take(self, data: bytes) -> None:
        """The next piece; raises BadAnswerError, without the address, if it is too long, and _EnoughError if the rest is not needed."""


class _EnoughError(Exception):
    """The rest of a body is not needed."""


class Body:
    """A body that is kept whole, up to ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.content = limit, bytearray()

    def take(self, data: bytes) -> None:
        """Keep it."""
        self.content += data
        if len(self.content) > self.limit:
            raise BadAnswerError(f"more than {self.limit:,} bytes came, too many for this answer")


class Start(Body):
    """The first bytes of a body; the rest is not read."""

    def take(self, data: bytes) -> None:
        """Keep what fits."""
        self.content += data[: self.limit - len(self.content)]
        if len(self.content) == self.limit:
            raise _EnoughError


class Transport:
    """One server. All errors of transport and status are ServerError.

    Args:
        url: ``http://host:port``.
        timeout: seconds for a whole answer, from the request to its last byte; of a refusal, what is found out about it included.
        key: sent as bearer token.
    """

    def __init__(self, url: str, timeout: float, key: str | None = None) -> None:
        self.url, self.timeout, self.key = url.rstrip("/"), timeout, key
        try:
            # trust_env off: a proxy of the environment must not come between this client and a local server.
            self._http = httpx2.AsyncClient(
                base_url=self.url,
                timeout=httpx2.Timeout(timeout, connect=_CONNECT),
                limits=httpx2.Limits(max_connections=None),
                headers={"Accept-Encoding": "identity", **authorization(key)},
                trust_env=False,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise ServerError(f"{url} is not a URL ({error}): write http://host:port") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def json(
        self, method: str, path: str, *, limit: int, body: dict[str, Any] | None = None, within: float | None = None
    ) -> Any:
        """The JSON of an answer of at most ``limit`` bytes.

        Args:
            within: seconds that it may take; ``timeout`` if not given.

        Raises:
            ServerError: if there is none.
        """
        content = await self.body(method, path, limit=limit, body=body, within=within)
        try:
            return from_json(content)
        except ValueError as error:
            start = content[:_READ].decode(errors="replace")
            raise BadAnswerError(f"{self.url}{path} did not answer with JSON: {cut(start)} ({error})") from error

    async def body(
        self, method: str, path: str, *, limit: int, body: dict[str, Any] | None = None, within: float | None = None
    ) -> bytes:
        """An answer of at most ``limit`` bytes with status 200; arguments and errors as for :meth:`json`."""
        sink = Body(limit)
        await self.read(method, path, sink, body, within)
        return bytes(sink.content)

    async def read(
        self, method: str, path: str, sink: Sink, body: dict[str, Any] | None = None, within: float | None = None
    ) -> None:
        """Pass an answer with status 200 to ``sink``; arguments and errors as for :meth:`json`."""
        refusal, within = Start(_READ), self.timeout if within is None else within
        deadline = asyncio.get_running_loop().time() + within
        status = await self._exchange(method, path, lambda status: sink if status == 200 else refusal, body, within)
        if status == 200:
            return
        hint = ""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                hint = await self.hint(status)
        text = cut(bytes(refusal.content).decode(errors="replace"))
        raise ServerError(f"{self.url}{path} answered {status}: {text}{hint}")

    async def answers(self, path: str, within: float = _PROBE) -> bool:
        """Whether a GET is answered with status 200 within ``within`` seconds."""
        return await self.look(path, within) is not None

    async def _exchange(
        self, method: str, path: str, sink_of: Callable[[int], Sink], body: dict[str, Any] | None, within: float
    ) -> int:
        """Send a request and read the answer to its end; returns the status."""
        came = 0
        try:
            async with asyncio.timeout(within), self._http.stream(method, path, json=body) as response:
                coding = response.headers.get("content-encoding", "identity").strip().lower()
                if coding not in ("identity", ""):
                    raise BadAnswerError(
                        f"it is compressed ({cut(coding)}), which was not requested: use the server's address, not a proxy's"
                    )
                sink = sink_of(response.status_code)
                with suppress(_EnoughError):
                    async for data in response.aiter_raw():
                        came += len(data)
                        sink.take(data)
                return response.status_code
        except BadAnswerError as error:
            raise BadAnswerError(f"{self.url}{path} gave no answer that can be used: {error}") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ServerError(f"{self.url} is not a URL ({error}): write http://host:port") from error
        except httpx2.ConnectTimeout as error:
            raise ServerError(
                f"{self.url}{path} cannot be reached (no connection within {_CONNECT:g} s): is the server up?"
            ) from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            if came:
                raise DrippingError(
                    f"{self.url}{path} had sent {came:,} bytes after {_seconds(within)} s and was not done: it drips, or does not end"
                ) from error
            raise OutOfTimeError(f"{self.url}{path} did not answer within {_seconds(within)} s: it stalled") from error
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            reason = cut(error) if str(error) else type(error).__name__
            raise ServerError(f"{self.url}{path} cannot be reached ({reason}): is the server up?") from error

    async def look(self, path: str, within: float = _PROBE) -> bytes | None:
        """The beginning of the answer to a GET if its status is 200 within ``within`` seconds, otherwise None."""
        start = Start(1 << 16)
        probe = Transport(self.url, min(self.timeout, within), self.key)
        try:
            async with probe:
                status = await probe._exchange("GET", path, lambda _: start, None, probe.timeout)
                return bytes(start.content) if status == 200 else None
        except ServerError:
            return None

    async def hint(self, status: int) -> str:
        """The usual meaning of a status other than 200, and the remedy, as the end of a sentence; an engine's client knows more."""
        if status in (401, 403):
            return f"; it requires an API key: {KEY_OPTION}" if self.key is None else "; it rejects the given key"
        if 300 <= status < 400:
            return "; redirects are not followed, because a key or a figure would go to another address: give the target's address"
        return ""
