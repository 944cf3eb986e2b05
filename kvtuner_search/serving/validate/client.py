"""A server over HTTP, distrusted: an answer that is missing, short, cut or for another prompt is an error with a reason.

httpx2 because current releases of huggingface_hub bring it with every installation, it is maintained, and cancelling its
asynchronous requests closes their connections, so that Ctrl-C need not wait for a server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import httpx2

from kvtuner_search.errors import ServingError
from kvtuner_search.profile.text import printable

_BODY: Final = 200  # characters of an error's body that are shown


class ServerError(ServingError):
    """A server did not answer, or answered something that cannot be used."""


@dataclass(frozen=True)
class Request:
    """One call of ``/generate`` with greedy sampling."""

    input_ids: tuple[int, ...]
    max_new_tokens: int = 1
    exact_length: bool = True  # the end-of-text token does not end it: exactly ``max_new_tokens`` must come back
    stop: tuple[str, ...] = ()  # texts that end it
    output_logprobs: bool = False  # log-probabilities of the generated tokens
    logprob_start: int | None = None  # log-probabilities of the prompt's tokens after this position
    asked: int | None = None  # log-probability of this token at the first generated position

    def body(self) -> dict[str, Any]:
        """What is posted."""
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": self.max_new_tokens}
        if self.exact_length:
            sampling["ignore_eos"] = True
        if self.stop:
            sampling["stop"] = list(self.stop)
        body: dict[str, Any] = {"input_ids": list(self.input_ids), "sampling_params": sampling}
        if self.output_logprobs or self.logprob_start is not None or self.asked is not None:
            body["return_logprob"] = True
        if self.logprob_start is not None:
            body["logprob_start_len"] = self.logprob_start
        if self.asked is not None:
            body["token_ids_logprob"] = [self.asked]
        return body


@dataclass(frozen=True)
class Answer:
    """What came back, checked against the request."""

    output_ids: tuple[int, ...]
    cached_tokens: int  # tokens of the prompt that were found in the prefix cache
    input_logprobs: tuple[float, ...]  # of the prompt's tokens from position ``logprob_start + 1`` on
    output_logprobs: tuple[float, ...]
    asked: float | None  # log-probability of the token that was asked about

    @classmethod
    def of(cls, request: Request, content: Any) -> Self:
        """Check the JSON that ``/generate`` answered.

        Raises:
            ServerError: says what is missing or does not fit the request.
        """
        meta = content.get("meta_info") if isinstance(content, dict) else None
        if not isinstance(meta, dict):
            raise ServerError(f"/generate answered {_cut(content)}: no meta_info; is it SGLang?")
        finish = meta.get("finish_reason")
        kind = finish.get("type") if isinstance(finish, dict) else None
        if kind not in ("length", "stop"):
            raise ServerError(f"/generate ended with {_cut(finish)}: the request was not finished")
        if meta.get("prompt_tokens") != len(request.input_ids):
            raise ServerError(
                f"/generate saw {meta.get('prompt_tokens')} prompt tokens of {len(request.input_ids)}: the prompt was cut"
            )
        output = content.get("output_ids")
        if not (isinstance(output, list) and output and all(type(token) is int for token in output)):
            raise ServerError(f"/generate answered output_ids {_cut(output)}: the answer is empty")
        short = len(output) < request.max_new_tokens and (request.exact_length or kind != "stop")
        if short or len(output) > request.max_new_tokens or meta.get("completion_tokens") != len(output):
            raise ServerError(
                f"/generate answered {len(output)} tokens (it says {meta.get('completion_tokens')}) of"
                f" {request.max_new_tokens} and ended by {kind}: the answer is short"
            )
        cached = meta.get("cached_tokens", 0)
        inputs: list[float] = []
        if request.logprob_start is not None:
            wanted = request.input_ids[request.logprob_start :]
            # The first position's own prediction is not returned: it has no value.
            inputs = _logprobs(meta, "input_token_logprobs", wanted, skip=1)
        outputs = _logprobs(meta, "output_token_logprobs", output) if request.output_logprobs else []
        asked = None
        if request.asked is not None:
            rows = meta.get("output_token_ids_logprobs")
            asked = _logprobs({"it": rows[0] if isinstance(rows, list) and rows else None}, "it", [request.asked])[0]
        return cls(tuple(output), cached if type(cached) is int else 0, tuple(inputs), tuple(outputs), asked)


def _logprobs(meta: dict[str, Any], name: str, tokens: Sequence[int], skip: int = 0) -> list[float]:
    """The log-probabilities in ``meta[name]``, a list of [value, token, text], which must be of exactly these tokens."""
    rows = meta.get(name)
    if not isinstance(rows, list) or len(rows) != len(tokens):
        count = len(rows) if isinstance(rows, list) else "no"
        raise ServerError(f"/generate answered {count} {name} of {len(tokens)}: log-probabilities are missing")
    found = []
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        value, of = row[:2] if isinstance(row, list) and len(row) >= 2 else (None, None)
        if of != token:
            raise ServerError(f"/generate answered {name}[{index}] of token {of}, asked was {token}: another prompt's")
        if index >= skip:
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise ServerError(f"/generate answered {name}[{index}] = {value}: no finite log-probability")
            found.append(float(value))
    return found


class Client:
    """One server. All errors of transport, status and content are ServerError.

    Args:
        url: ``http://host:port``.
        timeout: seconds without a byte after which a request counts as stalled. Answers are not streamed, so it bounds a request.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        # trust_env off: a proxy of the environment must not stand between this client and a local server.
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0)),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def info(self) -> dict[str, Any]:
        """``/server_info``."""
        content = _json(await self._send("GET", "/server_info"), "/server_info")
        if not isinstance(content, dict):
            raise ServerError(f"{self.url}/server_info answered {_cut(content)}: is it SGLang?")
        return content

    async def flush(self) -> None:
        """Empty the prefix cache; a server that is still busy is waited for."""
        await self._send("POST", f"/flush_cache?timeout={min(self.timeout, 60.0):g}")

    async def generate(self, request: Request) -> tuple[Answer, dict[str, Any]]:
        """The checked answer, and the JSON as it came."""
        response = await self._send("POST", "/generate", request.body())
        content = _json(response, "/generate")
        return Answer.of(request, content), content

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            response = await self._http.request(method, path, json=body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ServerError(f"{self.url} is no URL ({error}): write http://host:port") from error
        except httpx2.TimeoutException as error:
            raise ServerError(f"{self.url}{path} did not answer within {self.timeout:g} s: it stalled") from error
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"{self.url}{path} cannot be reached ({reason}): is the server up?") from error
        if response.status_code != 200:
            hint = "; the first node answers, ask that one" if response.status_code == 404 else ""
            raise ServerError(f"{self.url}{path} answered {response.status_code}: {_cut(response.text)}{hint}")
        return response


def _json(response: httpx2.Response, path: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ServerError(f"{path} answered no JSON: {_cut(response.text)}") from error


def _cut(value: object) -> str:
    text = printable(" ".join(str(value).split()))
    return (text if len(text) <= _BODY else text[: _BODY - 1] + "…") or "nothing"
