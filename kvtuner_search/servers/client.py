"""An untrusted server over HTTP: an answer that is missing, short, truncated, for another prompt or with impossible values is an error with a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from kvtuner_search.servers.transport import BadAnswerError as BadAnswerError
from kvtuner_search.servers.transport import OutOfTimeError as OutOfTimeError
from kvtuner_search.servers.transport import ServerError as ServerError
from kvtuner_search.servers.transport import Transport, cut

_INFO: Final = 4 << 20  # bytes of /server_info; SGLang's has some 10 KB a rank
_ANSWER: Final = 1 << 20  # bytes of an answer, and for each token of prompt and answer
_TOKEN: Final = 512  # bytes for each token: an id, a log-probability, and text
_IDS: Final = 2**31  # if the vocabulary is not known
ROUNDING: Final = 1e-5  # nats above 0 that a log-probability may come to; it then counts as 0
_LEAST: Final = -1e6  # nats; 16-bit logits do not differ by this much


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
        """The body of the request."""
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
    """An answer, checked against the request."""

    output_ids: tuple[int, ...]
    cached_tokens: int  # tokens of the prompt that were found in the prefix cache
    input_logprobs: tuple[float, ...]  # of the prompt's tokens from position ``logprob_start + 1`` on
    output_logprobs: tuple[float, ...]
    asked: float | None  # log-probability of the requested token

    @classmethod
    def of(cls, request: Request, content: Any, vocabulary: int | None = None) -> Self:
        """Check the JSON that ``/generate`` answered. This is the only check: later code trusts what passes.

        Args:
            vocabulary: ids of the model's embedding; None: not known.

        Raises:
            ServerError: says what is missing, impossible, or does not fit the request.
        """
        meta = content.get("meta_info") if isinstance(content, dict) else None
        if not isinstance(meta, dict):
            raise BadAnswerError(f"/generate answered {cut(content)}: no meta_info; is it SGLang?")
        finish = meta.get("finish_reason")
        kind = finish.get("type") if isinstance(finish, dict) else None
        if kind not in ("length", "stop"):
            raise BadAnswerError(f"/generate ended with {cut(finish)}: the request was not finished")
        prompt, completion = (_counted(meta, name) for name in ("prompt_tokens", "completion_tokens"))
        if prompt != len(request.input_ids):
            raise BadAnswerError(
                f"/generate saw {prompt} prompt tokens of {len(request.input_ids)}: the prompt was cut"
            )
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
        return cls(tuple(output), cached, tuple(inputs), tuple(outputs), asked)


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
    """SGLang's own endpoints. All errors of transport, status and content are ServerError.

    Args:
        url: ``http://host:port``.
        timeout: seconds for a whole answer. Answers are not streamed, so it bounds a request.
        key: sent as bearer token.
        vocabulary: ids of the model's embedding; None: not known.
    """

    def __init__(self, url: str, timeout: float, key: str | None = None, vocabulary: int | None = None) -> None:
        super().__init__(url, timeout, key)
        self.vocabulary = vocabulary

    async def info(self) -> dict[str, Any]:
        """``/server_info``."""
        content = await self.json("GET", "/server_info", limit=_INFO)
        if not isinstance(content, dict):
            raise BadAnswerError(f"{self.url}/server_info answered {cut(content)}: is it SGLang?")
        return content

    async def flush(self) -> None:
        """Empty the prefix cache, after waiting for a busy server."""
        await self.body("POST", f"/flush_cache?timeout={min(self.timeout / 2, 60.0):g}", limit=1 << 16)

    async def generate(self, request: Request, within: float | None = None) -> tuple[Answer, dict[str, Any]]:
        """The checked answer, and the JSON as it came; ``within`` seconds, or ``timeout``."""
        limit = _ANSWER + _TOKEN * (len(request.input_ids) + request.max_new_tokens)
        content = await self.json("POST", "/generate", limit=limit, body=request.body(), within=within)
        return Answer.of(request, content, self.vocabulary), content
