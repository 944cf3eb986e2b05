"""The config.json of the model that a server will load, from a folder or the hub. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.model_config import load_config, model_info
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.serving.sglang.refusals import check_config

_REMEDY: Final = "give a local folder with a config.json, or a hub id while online"


def served_model(model_path: str, revision: str | None = None, overrides: str | None = None) -> ModelInfo:
    """The shape of the model that SGLang loads for these of its options.

    Args:
        model_path: folder or hub id (``--model-path``).
        revision: branch, tag or commit on the hub (``--revision``).
        overrides: JSON object that replaces fields of config.json (``--json-model-override-args``).

    Raises:
        DataError: if config.json cannot be found or read, or describes no decoder.
        UsageError: if ``overrides`` is no JSON object, or the model's attention cannot be served with a profile.
    """
    config = served_config(model_path, revision, overrides)
    check_config(config, model_path)
    return model_info(config, model_path, Path(model_path).name or "unnamed", revision)


def served_config(model_path: str, revision: str | None = None, overrides: str | None = None) -> dict[str, Any]:
    """The content of config.json with its overrides; arguments and errors as for :func:`served_model`."""
    file = _local(model_path)
    return load_config(_from_hub(model_path, revision) if file is None else file) | _overrides(overrides)


def weight_bytes(model_path: str) -> int | None:
    """Bytes of a local model's safetensors files; None for a hub id, or where there are none."""
    return sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors")) or None


def _local(model_path: str) -> Path | None:
    """The config.json in a folder, or None if the path is a hub id."""
    path = Path(model_path)
    if path.is_dir():
        return path / "config.json"
    if path.exists() or path.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1:
        raise DataError(f"model {model_path} {'is a file' if path.exists() else 'does not exist'}: {_REMEDY}")
    return None


def _from_hub(model_path: str, revision: str | None) -> Path:
    """The hub's config.json, through transformers' loader: its cache, token, mirror and offline mode hold here too."""
    try:
        from transformers.utils.hub import cached_file

        found = cached_file(model_path, "config.json", revision=revision)
    except (OSError, ValueError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"cannot read the config.json of {model_path}: {first.rstrip('.')}: {_REMEDY}") from error
    if found is None:
        raise DataError(f"the hub has no config.json for {model_path}: {_REMEDY}")
    return Path(found)


def _overrides(text: str | None) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"--json-model-override-args {text!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"--json-model-override-args {text!r} is no JSON object: write for example '{{\"rope_theta\": 1e6}}'"
        )
    return content
