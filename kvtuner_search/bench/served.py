"""The parts of a record that describe a server, from what it says of itself, config.json and the profile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_search.bench.floors import model_facts
from kvtuner_search.bench.record import Cache, Model, Served
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.schema import Profile
from kvtuner_search.secrets import mask_arguments
from kvtuner_search.servers.facts import Facts, ServerInfo
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.transport import BadAnswerError
from kvtuner_search.serving.engine import engine

STOCK: Final = "16-bit"
_PATHS: Final = ("/", "~", "./", "../")
_HALF: Final = ("auto", "bfloat16", "bf16", "float16", "fp16")


@dataclass(frozen=True)
class ServerDescription:
    """One server, as the record describes it."""

    facts: Facts
    served: Served
    cache: Cache
    model: Model
    longest: int  # most tokens of prompt and answer together
    devices: int  # that it uses, all copies of the model together
    first_device: str  # of them, as nvidia-smi calls it


def describe(
    info: ServerInfo,
    url: str,
    *,
    model: str | None,
    profile: Profile | None,
    started: bool,
    arguments: Sequence[str],
) -> ServerDescription:
    """Everything that the record says about a server.

    Args:
        info: what it says of itself.
        url: for messages.
        model: folder or hub id with the config.json; None: the path that the server names.
        profile: the profile that it should serve; None: any.
        started: by this run.
        arguments: its arguments.

    Raises:
        ServerError: if a field is impossible for its model.
        UsageError: if the model's config.json or the stored bytes are unknown.
        NotComparableError: if a server with several ranks has another profile, whose stored bytes it does not report.
    """
    facts = info.facts
    try:
        config = engine().served_config(model or facts.model, info.revision, info.overrides, fetch=model is not None)
    except DataError as error:
        if model is not None:
            raise
        raise UsageError(
            f"{url} serves {facts.model}, whose config.json cannot be read here ({error}): name the model with --model-path,"
            " because a path or id that a server names is not fetched"
        ) from error
    dtype = interface().resolve_dtype(facts.dtype, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    try:
        facts_of_model = model_facts(
            config,
            name=_last(facts.model),
            dtype=dtype,
            quantization=facts.quantization,
            dummy=info.dummy_weights,
        )
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise BadAnswerError(
            f"{url} serves a model whose config.json, with the fields that it replaces, describes none ({type(error).__name__}): see both"
        ) from error
    return ServerDescription(
        facts=facts,
        served=_served(info, facts, dtype, started, arguments),
        cache=_cache(info, facts, profile, facts_of_model, dtype, url),
        model=facts_of_model,
        longest=_longest(info, config),
        devices=facts.tensor_parallel * facts.pipeline_parallel * info.copies,
        first_device=first_device(info.first_gpu),
    )


def public_arguments(arguments: Sequence[str]) -> list[str]:
    """Server arguments without passwords and keys, and with paths cut to their last part: a record contains no paths of a machine."""
    shown = []
    for argument in mask_arguments(arguments):
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (_last(value) if value.startswith(_PATHS) else value))
    return shown


def _last(path: str) -> str:
    return Path(path).name or path


def _served(info: ServerInfo, facts: Facts, dtype: str, started: bool, arguments: Sequence[str]) -> Served:
    return Served(
        version=facts.version,
        arguments=public_arguments(arguments),
        started=started,
        attention_backend=facts.attention_backend,
        dtype=dtype,
        quantization=facts.quantization,
        tensor_parallel=facts.tensor_parallel,
        pipeline_parallel=facts.pipeline_parallel,
        nodes=info.nodes,
        page_size=facts.page_size,
        prefix_cache=facts.prefix_cache,
        speculative=info.speculative,
        draft_tokens=info.draft_tokens,
        token_capacity=facts.tokens,
        cache_gib=facts.cache_gib,
    )


def _cache(info: ServerInfo, facts: Facts, profile: Profile | None, model: Model, dtype: str, url: str) -> Cache:
    numbers = 2 * model.layers * model.kv_heads * model.head_dim  # that one token stores
    if facts.profile_digest is None:
        stored = info.cache_dtype
        if stored not in _HALF:
            raise UsageError(
                f"{url} stores its cache as {stored}: only 16-bit caches and profiles are recorded; start it without"
                " --kv-cache-dtype"
            )
        bits = 32 if dtype == "float32" and stored == "auto" else 16
        return Cache(profile=STOCK, digest=None, effective_bits=bits, bytes_per_token=numbers * bits // 8)
    if profile is not None and profile.digest == facts.profile_digest:
        return Cache(
            profile=profile.name,
            digest=profile.digest,
            effective_bits=profile.storage.effective_bits,
            bytes_per_token=profile.storage.bytes_per_token,
        )
    if facts.tensor_parallel * facts.pipeline_parallel > 1:
        if profile is not None:
            facts.check_profile(profile, url)
        raise UsageError(
            f"{url} serves profile {facts.profile_digest[:19]}… on several ranks and reports the bytes of the first only: name"
            " that profile with --profile"
        )
    stored_bytes = info.profile_bytes
    if stored_bytes is None or stored_bytes * 8 > 32 * numbers:
        raise BadAnswerError(
            f"{url} says that a token of its profile takes {stored_bytes} bytes, and one of this model has {numbers} numbers of at most"
            " 32 bits: is it this plugin?"
        )
    return Cache(
        profile=f"profile {facts.profile_digest[7:19]}",
        digest=facts.profile_digest,
        effective_bits=stored_bytes * 8 / numbers,
        bytes_per_token=stored_bytes,
    )


def first_device(index: int) -> str:
    """What ``nvidia-smi`` calls the first GPU of a server that inherits this process's environment.

    Args:
        index: of it, among the GPUs that the server sees.
    """
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return visible[index] if index < len(visible) else str(index)


def _longest(info: ServerInfo, config: dict[str, Any]) -> int:
    """Most tokens of a sequence."""
    if info.longest is not None:
        return info.longest
    positions = config.get("max_position_embeddings")
    known = positions if type(positions) is int and positions > 0 else 2**31 - 1
    return min(info.context or known, info.facts.tokens)
