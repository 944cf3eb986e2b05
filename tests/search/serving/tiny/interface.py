"""How the small engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json

from kvtuner_search.errors import UsageError
from kvtuner_search.servers.client import Answer, Load, Request
from kvtuner_search.servers.facts import Facts, ServerInfo
from kvtuner_search.servers.stream import StreamEvent, StreamFault
from kvtuner_search.servers.transport import BadAnswerError, Sink, Transport, cut

if TYPE_CHECKING:
    from kvtuner_search.serving.tiny import interface

    from kvtuner_search.servers.interface import Interface

    _: Interface = interface

STREAM: Final = "/stream"
GENERATED: Final = "tiny_said_total"
TOKEN_USAGE: Final = "tiny_fill"
METRICS: Final = (GENERATED, TOKEN_USAGE)
_LIMIT: Final = 1 << 22  # bytes


class client(Transport):
    def __init__(self, url: str, timeout: float, key: str | None = None, vocabulary: int | None = None) -> None:
        super().__init__(url, timeout, key)
        self.vocabulary = vocabulary

    async def ready(self, within: float) -> bool:
        return await self.answers("/up", within)

    async def info(self) -> ServerInfo:
        said = await self.json("GET", "/about", limit=_LIMIT)
        facts = Facts(
            version=said["release"],
            model=said["weights"],
            dtype="bfloat16",
            quantization=None,
            attention_backend="none",
            device="cpu",
            tensor_parallel=1,
            pipeline_parallel=1,
            page_size=1,
            prefix_cache=True,
            memory_fraction=None,
            token_cap=None,
            tokens=said["slots"],
            cache_gib=None,
            profile_digest=said["profile"],
            as_stored=said["read_stored"],
            tool=None,
        )
        return ServerInfo(
            facts=facts,
            revision=None,
            overrides=None,
            dummy_weights=False,
            cache_dtype="auto",
            profile_bytes=None,
            longest=None,
            context=None,
            nodes=1,
            copies=1,
            first_gpu=0,
            speculative=None,
            draft_tokens=1,
        )

    async def flush(self) -> None:
        await self.body("POST", "/forget", limit=_LIMIT)

    async def generate(self, request: Request, within: float | None = None) -> tuple[Answer, Any]:
        body = {
            "prompt": request.input_ids,
            "say": request.max_new_tokens,
            "may_stop": not request.exact_length,
            "score_from": request.logprob_start,
        }
        content = await self.json("POST", "/say", limit=_LIMIT, body=body, within=within)
        return read_answer(request, content, self.vocabulary), content

    async def loads(self) -> list[Load]:
        return [Load(await self.json("GET", "/busy", limit=_LIMIT), 0)]

    async def metrics(self, sink: Sink) -> None:
        await self.read("GET", "/gauges", sink)


def read_answer(request: Request, content: Any, vocabulary: int | None = None) -> Answer:
    said = content.get("said") if isinstance(content, dict) else None
    if not isinstance(said, list) or len(said) != request.max_new_tokens:
        raise BadAnswerError(f"/say answered {cut(content)}: {request.max_new_tokens} tokens were asked for")
    return Answer(tuple(said), 0, tuple(content["read_scores"]), tuple(content["said_scores"]), None)


def resolve_dtype(stated: str, config_dtype: str) -> str:
    return stated


def stream_body(identifier: str, prompt: Sequence[int], asked: int) -> dict[str, Any]:
    return {"name": identifier, "prompt": list(prompt), "say": asked}


class stream_reader:
    def read(self, content: bytes, seen: list[int]) -> StreamEvent:
        event = from_json(content)
        if not isinstance(event, dict):
            raise StreamFault("malformed", content[:80])
        counts = {"prompt_tokens": event["read"], "completion_tokens": len(seen) + 1, "cached_tokens": 0}
        return StreamEvent(event["name"], [event["token"]], counts, "length" if event["done"] else None)


def own_client(
    python: str,
    url: str,
    tokenizer: str,
    prompts: Sequence[Sequence[int]],
    *,
    output_tokens: int,
    concurrency: int,
    timeout: float,
    key: str | None = None,
) -> dict[str, float]:
    raise UsageError("--cross-check: Tiny has no client of its own: leave it out")
