"""A model's config.json as far as a profile depends on it: its shape, and a digest of the fields that attention reads.

Neither torch nor transformers is imported. Both the flat fields of older files (``rope_theta``, ``rope_scaling``) and the
``rope_parameters`` that transformers 5 writes give the same digest, so saving a model again does not orphan its profiles.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import canonical_json, first_error, parse_json, read_limited
from kvtuner_search.profile.schema import ModelInfo

_PLAIN: Final = (  # read as they are; absent and null are the same
    "architectures",
    "attention_bias",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "hidden_size",
    "model_type",
    "query_pre_attn_scalar",
)
_SCALED_ROPE: Final = ("llama3", "longrope", "yarn")  # types that need the pretraining length


def read_config(path: Path, model_id: str | None = None, revision: str | None = None) -> ModelInfo:
    """The shape of the model whose config.json is ``path``, or lies in the folder ``path``.

    ``model_id`` defaults to the folder's name; the file's ``_name_or_path`` is not used, as it may be someone's private path.

    Raises:
        DataError: if the file cannot be read, or lacks a field that the cache's shape needs.
    """
    file = path / "config.json" if os.path.isdir(path) else path  # noqa: PTH112 - unlike Path's, it never raises
    return model_info(load_config(file), str(file), model_id or file.absolute().parent.name, revision)


def load_config(file: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        DataError: if the file cannot be read, or holds no JSON object.
    """
    source = str(file)
    content = parse_json(read_limited(file, "a model's config.json"), source)
    if not isinstance(content, dict):
        raise DataError(f"{source} holds a JSON {type(content).__name__}, not an object: it is no model's config.json")
    return content


def model_info(
    config: dict[str, Any], source: str, model_id: str | None = None, revision: str | None = None
) -> ModelInfo:
    """The same from a parsed config.json; ``source`` is what error messages call it.

    Raises:
        DataError: if a field is missing or out of range.
    """
    text = text_config(config)
    heads = _count(text, "num_attention_heads", source)
    head_dim = text.get("head_dim")
    if head_dim is None:
        hidden = _count(text, "hidden_size", source)
        if hidden % heads:
            raise DataError(
                f"{source}: hidden_size={hidden} does not split over num_attention_heads={heads} and head_dim is missing:"
                " add head_dim"
            )
        head_dim = hidden // heads
    architectures = config.get("architectures") or text.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise DataError(f"{source}: architectures={architectures!r} names no class: it is no model's config.json")
    try:
        return ModelInfo(
            id=model_id or "unnamed",
            revision=revision,
            architecture=architectures[0],
            config_digest=config_digest(config),
            num_layers=_count(text, "num_hidden_layers", source),
            num_attention_heads=heads,
            num_kv_heads=heads if text.get("num_key_value_heads") is None else text["num_key_value_heads"],
            head_dim=head_dim,
        )
    except ValidationError as error:
        raise DataError(f"{source}: {first_error(error)}: this model's cache cannot be described") from error


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the decoder: multimodal models nest it."""
    for name in ("text_config", "llm_config", "language_config"):
        nested = config.get(name)
        if isinstance(nested, dict) and "num_hidden_layers" in nested:
            return nested
    return config


def config_digest(config: dict[str, Any]) -> str:
    """``sha256:...`` over the fields that attention depends on, after bringing old and new spellings to one form.

    Left out, because nothing stored depends on them: ``max_position_embeddings`` (except as the pretraining length of a
    scaled rotary embedding that names none), dtypes, token ids, dropout, and library versions.
    """
    text = text_config(config)
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    content = {name: text.get(name) for name in _PLAIN}
    content |= {
        "architectures": config.get("architectures") or text.get("architectures"),
        "head_dim": text.get("head_dim") or derived,
        "layers": text.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads if text.get("num_key_value_heads") is None else text["num_key_value_heads"],
        "rope": _rope(text),
        "window": _window(text),
    }
    body = canonical_json(_plain_numbers({key: value for key, value in content.items() if value not in (None, False)}))
    return "sha256:" + hashlib.sha256(body.encode()).hexdigest()


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters: one dict, or one a layer type where a model has several."""
    new = text.get("rope_parameters")
    if isinstance(new, dict) and new and all(isinstance(value, dict) for value in new.values()):
        return {layer_type: _one_rope(text, value) for layer_type, value in new.items()}
    local = text.get("rope_local_base_freq")  # Gemma 3's old spelling of a second embedding for windowed layers
    if local is not None:
        windowed = _one_rope({"rope_theta": local}, {})
        return {"full_attention": _one_rope(text, text.get("rope_scaling")), "sliding_attention": windowed}
    return _one_rope(text, new if isinstance(new, dict) else text.get("rope_scaling"))


def _one_rope(text: dict[str, Any], given: Any) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope["rope_type"] = kind
    for name, default in (("rope_theta", 10000), ("partial_rotary_factor", 1)):
        rope.setdefault(name, default if text.get(name) is None else text[name])
    if kind in _SCALED_ROPE:
        length = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = length or text.get("max_position_embeddings")
    return rope


def _window(text: dict[str, Any]) -> dict[str, Any] | None:
    """The sliding window where a layer uses one; None where attention is full everywhere."""
    window = text.get("sliding_window")
    types = text.get("layer_types")
    layers, first = text.get("num_hidden_layers"), text.get("max_window_layers")
    if window is None or text.get("use_sliding_window") is False:
        return None
    if types is None and isinstance(first, int) and isinstance(layers, int) and 0 < layers <= 4096:
        types = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    if isinstance(types, list) and set(map(str, types)) == {"full_attention"}:
        return None
    return {"size": window, "layers": types}


def _plain_numbers(value: Any) -> Any:
    """1000000 and 1000000.0 are one number, but two JSON texts."""
    if isinstance(value, dict):
        return {str(key): _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(text: dict[str, Any], name: str, source: str) -> int:
    value = text.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{source}: {name}={value!r} is no positive integer: it is no decoder's config.json")
    return value
