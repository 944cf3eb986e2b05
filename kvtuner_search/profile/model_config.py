"""A model's config.json as far as a profile depends on it: its shape, and one normal form of the fields that attention reads.

Neither torch nor transformers is imported. A published file, the same file without the fields that have a default, and
what transformers 4 or 5 writes when the model is saved again all have the same normal form, and so the same digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Final, TypeGuard

from pydantic import ValidationError

from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import canonical_json, first_error, parse_json, read_limited
from kvtuner_search.profile.kinds import LayerKind
from kvtuner_search.profile.model_families import family_of, plain_numbers, spelled_out
from kvtuner_search.profile.model_kinds import kinds_of, names_of
from kvtuner_search.profile.schema import MAX_CONFIG_FIELDS, ModelInfo
from kvtuner_search.profile.text import printable

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
_EXTENDING_ROPE: Final = ("dynamic", "linear", "llama3", "longrope", "yarn")  # types that reach beyond it
_FULL: Final = ("full_attention", "attention")
_SHOWN: Final = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "layers": "num_hidden_layers"}
_SNAPSHOT: Final = re.compile(r"models--([A-Za-z0-9._-]+)/snapshots/([0-9a-f]{40})")
_MAX_SHOWN: Final = 120  # characters of a field's value in a profile or a message


def read_config(path: Path, model_id: str | None = None, revision: str | None = None) -> ModelInfo:
    """The shape of the model whose config.json is ``path``, or lies in the folder ``path``.

    Id and revision default to those in a path of the hub's cache, otherwise the id defaults to the folder's name; the file's ``_name_or_path`` is
    not used, because it may be someone's private path.

    Raises:
        DataError: if the file cannot be read, or lacks a field that the cache's shape needs.
    """
    file = config_file(path)
    found = name_of(file.parent)
    return model_info(load_config(file), str(file), model_id or found[0], revision or found[1])


def config_file(path: Path) -> Path:
    """The config.json that ``path`` is, or that lies in the folder ``path``."""
    return path / "config.json" if os.path.isdir(path) else path  # noqa: PTH112 - unlike Path's, it never raises


def name_of(folder: Path) -> tuple[str, str | None]:
    """Id and revision of the model in a folder: the hub's if the path is a snapshot in its cache, otherwise the folder's name.

    Example:
        ``name_of(Path("hub/models--Qwen--Qwen2.5-7B/snapshots/" + "a" * 40))`` is ``("Qwen/Qwen2.5-7B", "aaa...")``.
    """
    place = Path(os.path.abspath(folder))  # noqa: PTH100 - resolves "..", but neither fails nor follows links of the cache
    found = _SNAPSHOT.fullmatch("/".join(place.parts[-3:]))
    if found is None:  # a link to a snapshot
        found = _SNAPSHOT.fullmatch("/".join(Path(os.path.realpath(place)).parts[-3:]))
    if found:
        return found[1].replace("--", "/"), found[2]
    return place.name, None


def load_config(file: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        DataError: if the file cannot be read, or holds no JSON object.
    """
    source = str(file)
    if not os.path.lexists(file) and os.path.isfile(file.parent / "adapter_config.json"):  # noqa: PTH113
        raise DataError(adapter_message(file.parent))
    content = parse_json(read_limited(file, "a model's config.json"), source, "model's config.json")
    if not isinstance(content, dict):
        raise DataError(
            f"{source} holds a JSON {type(content).__name__}, not an object: it is not a model's config.json"
        )
    return content


def adapter_message(folder: Path) -> str:
    """Why a folder with an adapter is not a model, and which model the adapter is for."""
    file = folder / "adapter_config.json"
    try:
        content = parse_json(read_limited(file, "an adapter's config"), str(file), "adapter's config")
    except DataError:
        content = None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    name = f" of {printable(base[:200])}" if isinstance(base, str) and base else ""
    return (
        f"{folder} has an adapter{name} (adapter_config.json), which is not a whole model: merge it into its base model"
        " (peft: merge_and_unload, then save_pretrained) and name the merged folder"
    )


def model_info(
    config: dict[str, Any],
    source: str,
    model_id: str | None = None,
    revision: str | None = None,
    most: int | None = None,
) -> ModelInfo:
    """The same from a parsed config.json.

    Args:
        config: the content of config.json.
        source: what error messages call it.
        model_id: of the model.
        revision: on the hub.
        most: most tokens of a sequence, if known: kinds are compared as sequences of that length can tell them apart.

    Raises:
        DataError: if a field is missing or out of range.
    """
    text = decoder(config)
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
    architectures = _architectures(config)
    if not (isinstance(architectures, list) and architectures and _is_class(architectures[0])):
        raise DataError(
            f"{source}: architectures={_shown(architectures)} names no class, and model_type={_shown(text.get('model_type'))} is"
            " not known here: it is not a model's config.json, or lacks architectures"
        )
    try:
        content = normal_form(config)
        info = ModelInfo(
            id=model_id or "unnamed",
            revision=revision,
            architecture=architectures[0],
            config_digest=digest_of_form(content),
            config=fields_of(content),
            num_layers=_count(text, "num_hidden_layers", source),
            num_attention_heads=heads,
            num_kv_heads=heads if text.get("num_key_value_heads") is None else text["num_key_value_heads"],
            head_dim=head_dim,
            layer_kinds=_kind_texts(layer_kinds(config)),
        )
    except ValidationError as error:
        raise DataError(f"{source}: {first_error(error)}: this model's cache cannot be described") from error
    if heads % info.num_kv_heads:
        raise DataError(
            f"{source}: num_attention_heads={heads} do not share num_key_value_heads={info.num_kv_heads} evenly: this model's cache"
            " cannot be described"
        )
    written = text_config(config)
    info.remember(content, digest_of_form(_content(config, written, _window_before(written))), most)
    return info


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the decoder: multimodal models nest it."""
    for name in ("text_config", "llm_config", "language_config"):
        nested = config.get(name)
        if isinstance(nested, dict) and ("num_hidden_layers" in nested or "n_layer" in nested):
            return nested
    return config


def decoder(config: dict[str, Any]) -> dict[str, Any]:
    """That part under today's names, with defaults filled in."""
    whole = config.get("model_type")
    return spelled_out(text_config(config), whole if isinstance(whole, str) else "")


def positions(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Positions that a model was made for, and how far the scaling of its rotary embedding reaches; None if they are not said."""
    text = decoder(config)
    length = text.get("max_position_embeddings")
    if not _is_count(length):
        return None, None
    reach = length
    ropes = _rope(text)
    for rope in ropes.values() if all(isinstance(value, dict) for value in ropes.values()) else [ropes]:
        start, factor = rope.get("original_max_position_embeddings") or length, rope.get("factor")
        if rope["rope_type"] in _EXTENDING_ROPE and _is_count(start) and isinstance(factor, (int, float)):
            reach = max(reach, int(start * min(factor, 2.0**20)))
    return length, reach


def layer_kinds(config: dict[str, Any]) -> tuple[LayerKind, ...] | None:
    """The kind of every layer (:func:`~kvtuner_search.profile.model_kinds.kinds_of`)."""
    return kinds_of(decoder(config), positions(config)[1])


def _kind_texts(kinds: tuple[LayerKind, ...] | None) -> list[str] | None:
    return None if kinds is None or not any(kind.window for kind in kinds) else list(map(str, kinds))


def config_digest(config: dict[str, Any]) -> str:
    """``sha256:...`` over the normal form."""
    return digest_of_form(normal_form(config))


def normal_form(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that attention depends on, under one name each, with defaults filled in; fields that are null or false are left out.

    Left out too, because nothing stored depends on them: ``max_position_embeddings`` (except as the pretraining length of a
    scaled rotary embedding that names none), dtypes, token ids, dropout, and library versions. A window that is at least as long
    as the positions is full attention.
    """
    text = decoder(config)
    return _content(config, text, _window(kinds_of(text, positions(config)[1])))


def _content(config: dict[str, Any], text: dict[str, Any], window: dict[str, Any] | None) -> dict[str, Any]:
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    content = {name: text.get(name) for name in _PLAIN}
    if text.get("model_type") in ("gptj", "codegen"):
        content["rotary_dim"] = text.get("rotary_dim")
    thetas = text.get("layer_rope_theta")  # Granite's, one a layer, 0 for none
    if isinstance(thetas, list) and set(map(str, thetas)) != {str(_rope(text).get("rope_theta"))}:
        content["layer_rope_theta"] = thetas
    content |= {
        "architectures": _architectures(config),
        "head_dim": text.get("head_dim") or derived,
        "layers": text.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads if text.get("num_key_value_heads") is None else text["num_key_value_heads"],
        "rope": _rope(text),
        "window": window,
        "other_layers": _other_layers(text),
    }
    plain = plain_numbers({key: value for key, value in content.items() if value not in (None, False)})
    assert isinstance(plain, dict)
    return plain


def digest_of_form(content: dict[str, Any]) -> str:
    """``sha256:...`` over a normal form."""
    return "sha256:" + hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _architectures(config: dict[str, Any]) -> Any:
    """The classes that the file names, or the one that its ``model_type`` means."""
    text = text_config(config)
    named = config.get("architectures") or text.get("architectures")
    family = family_of(text)
    return [family.architecture] if not named and family is not None else named


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters: one dict, or one a layer type where a model has several."""
    new = text.get("rope_scaling") or text.get("rope_parameters")  # as transformers reads them
    if isinstance(new, dict) and new and all(isinstance(value, dict) for value in new.values()):
        return {layer_type: _one_rope(text, value) for layer_type, value in new.items()}
    local = text.get("rope_local_base_freq")  # Gemma 3's old spelling of a second embedding for windowed layers
    if local is not None:
        windowed = _one_rope({"rope_theta": local}, {})
        return {"full_attention": _one_rope(text, text.get("rope_scaling")), "sliding_attention": windowed}
    return _one_rope(text, new)


def _one_rope(text: dict[str, Any], given: Any) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope.pop("max_position_embeddings", None)
    rope["rope_type"] = "longrope" if kind == "su" else kind  # the first Phi-3 called it so
    for name, default in (("rope_theta", 10000), ("partial_rotary_factor", 1)):
        rope.setdefault(name, default if text.get(name) is None else text[name])
    if rope["rope_type"] in _SCALED_ROPE:
        length = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = length or text.get("max_position_embeddings")
    return rope


def _window(kinds: tuple[LayerKind, ...] | None) -> dict[str, Any] | None:
    """The window and each layer's kind, by transformers' names; None if all are full, or are not known, as in models that are refused."""
    if kinds is None or not any(kind.window for kind in kinds):
        return None
    return {"size": next(kind.window for kind in kinds if kind.window), "layers": names_of(kinds)}


def _window_before(text: dict[str, Any]) -> dict[str, Any] | None:
    """The same as earlier releases took it from the file as it is."""
    window, types = text.get("sliding_window"), text.get("layer_types")
    layers, first = text.get("num_hidden_layers"), text.get("max_window_layers")
    if window is None or text.get("use_sliding_window") is False:
        return None
    if types is None and isinstance(first, int) and isinstance(layers, int) and 0 < layers <= 4096:
        types = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    if isinstance(types, list) and types and set(map(str, types)) <= set(_FULL):
        return None
    return {"size": window, "layers": types}


def _other_layers(text: dict[str, Any]) -> dict[str, Any] | None:
    """Fields that mark layers other than standard attention; None for models that are served. Windows: see :func:`_window`."""
    types = text.get("layer_types")
    windows = ("sliding_attention", "chunked_attention")
    kinds = types if isinstance(types, list) and set(map(str, types)) - {*_FULL, *windows} else None
    marks = {name: text[name] for name in ("kv_lora_rank", "alibi", "is_encoder_decoder") if text.get(name)}
    return {**marks, "kinds": kinds} if kinds or marks else None


def fields_of(content: dict[str, Any]) -> dict[str, str]:
    """The normal form as config.json's names and short texts, for a profile and for messages."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key == "rope" and isinstance(value, dict):
            nested = all(isinstance(item, dict) for item in value.values())
            for part, rope in value.items() if nested else [("", value)]:
                start = f"{part}." if part else ""
                for name, item in rope.items():
                    plain = name in ("rope_theta", "partial_rotary_factor")
                    flat[f"{start}{name}" if plain else f"rope_scaling.{start}{name}"] = item
        elif key == "window" and isinstance(value, dict):
            if "chunked_attention" not in value["layers"]:  # whose size is a field of its own
                flat["sliding_window"] = value["size"]
            flat["layer_types"] = value["layers"]
        else:
            flat[_SHOWN.get(key, key)] = value
    shown = {json.dumps(name)[1:-1][:_MAX_SHOWN] or "?": shorten(value) for name, value in flat.items()}
    return {name: shown[name] for name in sorted(shown)[:MAX_CONFIG_FIELDS]}


def shorten(value: Any) -> str:
    """A value as JSON; a long one is cut and ends with a digest of the whole."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    if len(text) <= _MAX_SHOWN:
        return text
    return f"{text[: _MAX_SHOWN - 20]}… {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _is_class(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w{0,127}", name, re.ASCII) is not None


def _shown(value: Any) -> str:
    """A value as Python writes it, cut to what fits in a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**53


def _count(text: dict[str, Any], name: str, source: str) -> int:
    value = text.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(
            f"{source}: {name}={_shown(value)} is not a positive integer: it is not a decoder's config.json"
        )
    return value
