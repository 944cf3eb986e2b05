"""Checks of ``/server_info``: every field that this program uses must have the right type and a plausible value. All others are ignored.

What passes becomes :class:`kvtuner_search.servers.facts.ServerInfo`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kvtuner_search.profile.fields import Digest, Positive
from kvtuner_search.profile.text import printable
from kvtuner_search.secrets import mask
from kvtuner_search.servers.facts import Facts, ServerInfo
from kvtuner_search.servers.transport import BadAnswerError, cut

_RESERVED: Final = 4  # tokens of an answer beyond the longest prompt (managers/tp_worker.py and scheduler.py)
_OBJECT: Final = re.compile(r"dictionary or instance of \w+")  # pydantic's words for a JSON object


def _harmless(text: str) -> str:
    if printable(text) != text:
        raise ValueError("control characters are in it")
    return text


def _object(text: str) -> str:
    """JSON that replaces fields of config.json."""
    try:
        found = from_json(text or "{}")
    except ValueError as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return text


Word = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_harmless), AfterValidator(mask)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # ranks, nodes, tokens of a page
Steps = Annotated[int, Field(ge=0, le=2**16)]
Gib = Annotated[float, Field(ge=0, le=2**30, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())


class MemoryUsage(_Read):
    """Of the first rank."""

    kvcache: Gib | None = None


class SchedulerState(_Read):
    """Of the first scheduler."""

    memory_usage: MemoryUsage | None = None


class Plugin(_Read):
    """The plugin's report; a stock server has none."""

    profile_digest: Digest
    as_stored: bool | None = None
    tool: Word | None = None
    bytes_per_token: Positive | None = None


class _Fields(_Read):
    """The fields, by SGLang's names."""

    version: Word
    model_path: Word
    dtype: Word
    attention_backend: Word
    tp_size: Size
    pp_size: Size
    page_size: Size
    max_total_num_tokens: Positive
    quantization: Word | None = None
    device: Word | None = None
    disable_radix_cache: bool | None = None
    mem_fraction_static: Share | None = None
    max_total_tokens: Positive | None = None
    internal_states: list[SchedulerState] | None = None
    kvtuner: Plugin | None = None
    revision: Word | None = None
    json_model_override_args: Annotated[str, Field(max_length=2**16), AfterValidator(_object)] | None = None
    load_format: Word | None = None
    kv_cache_dtype: Word | None = None
    context_length: Positive | None = None
    max_req_input_len: Positive | None = None
    nnodes: Size = 1
    dp_size: Size = 1
    enable_dp_attention: bool | None = None
    base_gpu_id: Annotated[int, Field(ge=0, le=2**16)] | None = None
    speculative_algorithm: Word | None = None
    speculative_num_steps: Steps | None = None
    speculative_num_draft_tokens: Steps | None = None

    @classmethod
    def of(cls, content: dict[str, Any], url: str) -> Self:
        """Check the answer of ``/server_info``.

        Raises:
            ServerError: names the first field that is missing or impossible.
        """
        if content.get("kvtuner") == {}:  # a plugin without a profile
            content = {**content, "kvtuner": None}
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise BadAnswerError(f"{url}/server_info has no {name}: is it SGLang 0.5?") from error
            said, reason = cut(repr(first["input"])), _OBJECT.sub("object", first["msg"])
            raise BadAnswerError(f"{url}/server_info says {name}={said}: {reason}; is it SGLang 0.5?") from error


def read_info(content: dict[str, Any], url: str) -> ServerInfo:
    """Check the answer of ``/server_info``.

    Raises:
        ServerError: names the first field that is missing or impossible.
    """
    info = _Fields.of(content, url)
    plugin, states = info.kvtuner, info.internal_states
    facts = Facts(
        version=info.version,
        model=info.model_path,
        dtype=info.dtype,
        quantization=info.quantization,
        attention_backend=info.attention_backend,
        device=str(info.device),
        tensor_parallel=info.tp_size,
        pipeline_parallel=info.pp_size,
        page_size=info.page_size,
        prefix_cache=not info.disable_radix_cache,
        memory_fraction=info.mem_fraction_static,
        token_cap=info.max_total_tokens,
        tokens=info.max_total_num_tokens,
        cache_gib=states[0].memory_usage.kvcache if states and states[0].memory_usage else None,
        profile_digest=None if plugin is None else plugin.profile_digest,
        as_stored=plugin is not None and bool(plugin.as_stored),
        tool=None if plugin is None else plugin.tool,
    )
    steps, drafts = info.speculative_num_steps or 0, info.speculative_num_draft_tokens or 0
    return ServerInfo(
        facts=facts,
        revision=info.revision,
        overrides=info.json_model_override_args,
        dummy_weights=info.load_format == "dummy",
        cache_dtype=info.kv_cache_dtype or "auto",
        profile_bytes=None if plugin is None else plugin.bytes_per_token,
        # SGLang 0.5 reserves some of the context, and reports how many tokens are left for a prompt.
        longest=None if info.max_req_input_len is None else info.max_req_input_len + _RESERVED,
        context=info.context_length,
        nodes=info.nnodes,
        copies=1 if info.enable_dp_attention else info.dp_size,
        first_gpu=info.base_gpu_id or 0,
        speculative=info.speculative_algorithm,
        # The greater of the two, because the floors must stay below the possible: a chain of n steps yields up to n + 1 tokens.
        draft_tokens=max(1, drafts, steps + 1) if info.speculative_algorithm else 1,
    )


def resolve_dtype(stated: str, config_dtype: str) -> str:
    """The dtype that SGLang computes in: ``auto`` is the config's, with float16 for float32."""
    if stated == "auto":
        return "float16" if config_dtype == "float32" else config_dtype
    return {"half": "float16", "float": "float32"}.get(stated, stated)
