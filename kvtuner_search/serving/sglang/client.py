"""SGLang's own endpoints. An answer that is missing, short, truncated, for another prompt or with impossible values is an error with a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from pydantic_core import from_json

from kvtuner_search.servers.client import Answer, Load, Request
from kvtuner_search.servers.facts import ServerInfo
from kvtuner_search.servers.transport import BadAnswerError, ServerError, Sink, Transport, cut
from kvtuner_search.serving.sglang.info import read_info

GENERATE: Final = "/generate"
_INFO: Final = 4 << 20  # bytes of /server_info; SGLang's has some 10 KB a rank
_ANSWER: Final = 1 << 20  # bytes of an answer, and for each token of prompt and answer
_TOKEN: Final = 512  # bytes for each token: an id, a log-probability, and text
_LOADS: Final = 1 << 20  # bytes of /get_load; SGLang's has some 100 a rank
_IDS: Final = 2**31  # if the vocabulary is not known
ROUNDING: Final = 1e-5  # nats above 0 that a log-probability may come to; it then counts as 0
_LEAST: Final = -1e6  # nats; 16-bit logits do not differ by this much


def _body(request: Request) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": request.max_new_tokens}
    if request.exact_length:
        sampling["ignore_eos"] = True
    if request.stop:
        sampling["stop"] = list(request.stop)
    body: dict[str, Any] = {"input_ids": list(request.input_ids), "sampling_params": sampling}
    if request.output_logprobs or request.logprob_start is not None or request.asked is not None:
        body["return_logprob"] = True
    if request.logprob_start is not None:
        body["logprob_start_len"] = request.logprob_start
    if request.asked is not None:
        body["token_ids_logprob"] = [request.asked]
    return body


def read_answer(request: Request, content: Any, vocabulary: int | None = None) -> Answer:
    """See :meth:`kvtuner_search.servers.interface.Interface.read_answer`."""
    meta = content.get("meta_info") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        raise BadAnswerError(f"/generate answered {cut(content)}: no meta_info; is it SGLang?")
    finish = meta.get("finish_reason")
    kind = finish.get("type") if isinstance(finish, dict) else None
    if kind not in ("length", "stop"):
        raise BadAnswerError(f"/generate ended with {cut(finish)}: the request was not finished")
    prompt, completion = (_counted(meta, name) for name in ("prompt_tokens", "completion_tokens"))
    if prompt != len(request.input_ids):
        raise BadAnswerError(f"/generate saw {prompt} prompt tokens of {len(request.input_ids)}: the prompt was cut")
    output = content.get("output_ids")
    if not (isinstance(output, list) and output):
        raise BadAnswerError(f"/generate answered output_ids {cut(output)}: the answer is empty")
    if not all(type(token) is int for token in output):
        raise BadAnswerError(f"/generate answered output_ids {cut(output)}: these are not token ids")
    if foreign := [token for token in output if not 0 <= token < (vocabulary or _IDS)]:
        raise BadAnswerError(
            f"/generate answered token {cut(foreign[0])}, and the vocabulary ends at {(vocabulary or _IDS) - 1}: it serves"
            " another model"
        )
    short = len(output) < request.max_new_tokens and (request.exact_length or kind != "stop")
    if short or len(output) > request.max_new_tokens or completion != len(output):
        raise BadAnswerError(
            f"/generate answered {len(output)} tokens (it says {completion}) of"
            f" {request.max_new_tokens} and ended by {kind}: the answer is short"
        )
    cached = meta.get("cached_tokens") or 0
    if type(cached) is not int or not 0 <= cached <= prompt:
        raise BadAnswerError(
            f"/generate took {cut(cached)} of {prompt} tokens from its prefix cache, which is impossible"
        )
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
    return Answer(tuple(output), cached, tuple(inputs), tuple(outputs), asked)


def _counted(meta: dict[str, Any], name: str) -> int:
    """A number of tokens as the server counted them."""
    value = meta.get(name)
    if value is None:
        raise BadAnswerError(
            f"/generate answered without {name}, so prompt and answer cannot be checked for completeness: a proxy drops"
            " counts, or the server is not SGLang"
        )
    if type(value) is not int or value < 0:
        raise BadAnswerError(f"/generate answered {name}={cut(repr(value))}: that is not a number of tokens")
    return value


def _logprobs(meta: dict[str, Any], name: str, tokens: Sequence[int], skip: int = 0) -> list[float]:
    """The log-probabilities in ``meta[name]``, a list of [value, token, text], which must be of exactly these tokens."""
    rows = meta.get(name)
    if not isinstance(rows, list) or len(rows) != len(tokens):
        count = len(rows) if isinstance(rows, list) else "no"
        raise BadAnswerError(f"/generate answered {count} {name} of {len(tokens)}: log-probabilities are missing")
    found = []
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        value: Any
        value, of = row[:2] if isinstance(row, list) and len(row) >= 2 else (None, None)
        if type(of) is not int or of != token:
            raise BadAnswerError(
                f"/generate answered {name}[{index}] of token {cut(of)} instead of {token}: another prompt's"
            )
        if index >= skip:
            if type(value) not in (int, float) or not _LEAST <= value <= ROUNDING:  # NaN fails this too
                kind = (
                    "not a finite log-probability"
                    if not _finite(value)
                    else "not a log-probability, which is at most 0"
                )
                raise BadAnswerError(f"/generate answered {name}[{index}] = {cut(value)}: {kind}")
            found.append(min(float(value), 0.0))
    return found


def _finite(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


class Client(Transport):
    """See :class:`kvtuner_search.servers.client.Client`."""

    def __init__(self, url: str, timeout: float, key: str | None = None, vocabulary: int | None = None) -> None:
        super().__init__(url, timeout, key)
        self.vocabulary = vocabulary

    async def ready(self, within: float) -> bool:
        """Ask ``/health``."""
        return await self.answers("/health", within)

    async def info(self) -> ServerInfo:
        """``/server_info``."""
        content = await self.json("GET", "/server_info", limit=_INFO)
        if not isinstance(content, dict):
            raise BadAnswerError(f"{self.url}/server_info answered {cut(content)}: is it SGLang?")
        return read_info(content, self.url)

    async def flush(self) -> None:
        """Empty the prefix cache, after waiting for a busy server."""
        await self.body("POST", f"/flush_cache?timeout={min(self.timeout / 2, 60.0):g}", limit=1 << 16)

    async def generate(self, request: Request, within: float | None = None) -> tuple[Answer, Any]:
        """The checked answer, and the JSON as it came; ``within`` seconds, or ``timeout``."""
        limit = _ANSWER + _TOKEN * (len(request.input_ids) + request.max_new_tokens)
        content = await self.json("POST", GENERATE, limit=limit, body=_body(request), within=within)
        return read_answer(request, content, self.vocabulary), content

    async def loads(self) -> list[Load]:
        """``/get_load`` of every data-parallel rank."""
        wanted = ("num_reqs", "num_tokens", "num_pending_tokens")
        try:
            loads = await self.json("GET", "/get_load", limit=_LOADS)
        except BadAnswerError:
            raise
        except ServerError:
            return []
        if not isinstance(loads, list) or not all(
            isinstance(load, dict) and all(type(load.get(name)) is int for name in wanted) for load in loads
        ):
            return []
        if not all(0 <= load[name] <= 2**31 for load in loads for name in wanted):
            raise BadAnswerError(
                f"{self.url}/get_load counts requests or tokens below 0 or above 2 billion: is it SGLang?"
            )
        # A request that has not been given slots yet counts as pending, not as used.
        return [Load(load["num_reqs"], load["num_tokens"] - load["num_pending_tokens"]) for load in loads]

    async def metrics(self, sink: Sink) -> None:
        """``/metrics``, which SGLang has with ``--enable-metrics`` alone."""
        await self.read("GET", "/metrics", sink)

    async def hint(self, status: int) -> str:
        """The usual meaning of a status other than 200, and the remedy."""
        if status in (401, 403) and self.key is not None:
            return "; it rejects the given key: use SGLang's --api-key, or --admin-api-key if it has one"
        if status not in (404, 405):
            return await super().hint(status)
        served = await self._openai()
        if served is not None:
            slashes = self.url.endswith("/v1")
            remedy = "leave /v1 off if SGLang answers there, or " if slashes else ""
            return (
                f"; this is an OpenAI-compatible endpoint{served}, and SGLang's own /server_info and /generate are missing: {remedy}give the"
                " address of the SGLang server itself"
            )
        if await self.answers("/health"):
            return "; use the first node's address: this one answers only /health, as a node of rank above 0 does, or another program"
        return "; if this is a node of rank above 0, use the first node's address; otherwise there is no SGLang at this address and path"

    async def _openai(self) -> str | None:
        """The owner of this OpenAI-compatible endpoint, as far as it tells; None if it is not such an endpoint."""
        base = self.url.endswith("/v1")
        content = await self.look("/models" if base else "/v1/models")
        try:
            listed = from_json(content or b"")
            owner = listed["data"][0]["owned_by"]
            return f" of {cut(owner)}" if isinstance(owner, str) and owner else ""
        except (ValueError, TypeError, KeyError, IndexError):
            return "" if base else None
