"""The config.json of the model that a server will load, from a folder or the hub. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvtuner_search.errors import ProfileError, UsageError
from kvtuner_search.models.source import read_source
from kvtuner_search.profile.canonical import parse_json
from kvtuner_search.profile.model_config import model_info, name_of, positions
from kvtuner_search.profile.model_support import unsupported
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.serving.sglang.kinds import refuse_known


def served_model(
    model_path: str, revision: str | None = None, overrides: str | None = None, context: int | None = None
) -> ModelInfo:
    """The shape of the model that SGLang loads for these of its options.

    Args:
        model_path: folder or hub id (``--model-path``).
        revision: branch, tag or commit on the hub (``--revision``).
        overrides: JSON object that replaces fields of config.json (``--json-model-override-args``).
        context: most tokens of a sequence (``--context-length``); a window at least that long is full attention.

    Raises:
        DataError: if config.json cannot be found or read, or does not describe a decoder.
        UsageError: if ``overrides`` is not a JSON object, the context is longer than the model reaches, or its attention cannot be served
            with a profile, also because SGLang's class of the model is known to attend otherwise.
    """
    file, config = read_source(model_path, revision)
    config |= _overrides(overrides)
    context_remark(config, context, model_path)
    reason = unsupported(config, context)
    if reason is not None:
        raise UsageError(f"{model_path} {reason}; or serve it without a profile")
    name, commit = name_of(file.parent)
    found = model_info(config, model_path, name or model_path, revision or commit, context)
    refuse_known(found, context, model_path)
    return found


def served_config(
    model_path: str, revision: str | None = None, overrides: str | None = None, *, fetch: bool = True
) -> dict[str, Any]:
    """The content of config.json with its overrides; arguments and errors as for :func:`served_model`.

    Args:
        fetch: whether a hub id may be fetched; otherwise only what the hub's cache already has is read.
    """
    return read_source(model_path, revision, fetch=fetch)[1] | _overrides(overrides)


def context_remark(config: dict[str, Any], context: int | None, model_path: str) -> str | None:
    """Compare ``--context-length`` with the positions that a model was made for.

    Returns:
        a remark if only the scaling of the rotary embedding reaches that far; None if the positions do.

    Raises:
        UsageError: if the context is longer than both.
    """
    length, reach = positions(config)
    if context is None or length is None or reach is None or context <= length:
        return None
    if context <= reach or os.environ.get("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "").lower() in ("1", "true"):
        return (
            f"--context-length {context} is beyond the {length} positions of {model_path}: nothing was measured there"
        )
    raise UsageError(
        f"--context-length {context}: {model_path} was made for {length} positions (max_position_embeddings): give at most {reach},"
        " or a model whose rope_scaling reaches further"
    )


def weight_bytes(model_path: str) -> int | None:
    """Bytes of a local model's safetensors files; None for a hub id, or if there are none."""
    return sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors")) or None


def _overrides(text: str | None) -> dict[str, Any]:
    try:
        content = parse_json((text or "{}").encode(errors="surrogateescape"), "it", "model's config")
    except ProfileError as error:
        raise UsageError(f"--json-model-override-args {(text or '')[:80]!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"--json-model-override-args {(text or '')[:80]!r} is not a JSON object: write for example '{{\"rope_theta\": 1e6}}'"
        )
    return content
