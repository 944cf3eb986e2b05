"""Which kind of attention each layer of a model has, from config.json alone. Neither torch nor transformers is imported.

A layer sees all earlier tokens (full), the latest ones (sliding), or those of its own chunk (chunked). transformers and SGLang
count a window differently; here it is the number of tokens that a query sees at most, its own included.

Where a file does not name its layers' kinds, the rule is that of the family's class in transformers 5; tests compare them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, TypeGuard

from kvtuner_search.profile.kinds import FULL_KIND, LayerKind
from kvtuner_search.profile.model_families import family_of

FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"
_CHUNKED: Final = "chunked_attention"
_WINDOWS: Final = {_SLIDING: ("sliding", "sliding_window"), _CHUNKED: ("chunked", "attention_chunk_size")}
_FULL_NAMES: Final = (FULL, "attention")
_MAX_LAYERS: Final = 4096
_MAX_WINDOW: Final = 10**9 - 1
# Every so manyth layer is full and the others slide: the number, and the field that may change it.
_LAST_FULL: Final[dict[str, tuple[int, str | None]]] = {
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma"), (2, None)),
    "afmoe": (4, "global_attn_every_n_layers"),
    **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe"), (4, "sliding_window_pattern")),
    "gemma3_text": (6, "sliding_window_pattern"),
    "kolibri1": (5, None),
    "olmo3": (4, None),
}
_FIRST_FULL: Final[dict[str, tuple[int, str | None]]] = {  # the same, and the full layer comes first
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), (4, None)),
    "modernbert-decoder": (3, "global_attn_every_n_layers"),
}
_ALL_SLIDE: Final = (  # in all layers, if there is a window; their classes do not read layer_types
    "mistral", "ministral3", "mixtral", "phi3", "phi4_multimodal", "phimoe", "qwen3_moe", "starcoder2",
)  # fmt: skip
_NAMED_ONLY: Final = ("cohere_compass_text", "laguna", "mellum")  # no layer, unless layer_types names it
_BY_RULE: Final = ("dots1", "flint", "llama4_text", "ministral", "qwen2", "qwen2_moe", "qwen3", "smollm3")
_SWITCHED: Final = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")  # whose classes read use_sliding_window
_READERS: Final = frozenset((*_LAST_FULL, *_FIRST_FULL, *_ALL_SLIDE, *_NAMED_ONLY, *_BY_RULE))


def kinds_of(text: dict[str, Any], reach: int | None) -> tuple[LayerKind, ...] | None:
    """The kind of every layer, or None if :func:`trouble` has a reason.

    Args:
        text: the decoder's part of config.json, spelled out (:func:`~kvtuner_search.profile.model_config.decoder`).
        reach: most positions, if known; a window at least that long is full attention.

    Example:
        ``kinds_of({"model_type": "gemma2", "num_hidden_layers": 2, "sliding_window": 4096}, 8192)`` is a sliding layer and a full one.
    """
    try:
        return tuple(_kinds(text, reach))
    except ValueError:
        return None


def trouble(text: dict[str, Any], reach: int | None) -> str | None:
    """Why there are no kinds, as a text that follows the model's name; None if there are. Arguments as for :func:`kinds_of`."""
    count, types, known = text.get("num_hidden_layers"), text.get("layer_types"), family_of(text)
    if not _is_count(count):  # which others refuse; the kinds that the file names anyway are judged here
        other = known.other[0] + 1 if known is not None and known.other is not None else 0
        text = {**text, "num_hidden_layers": len(types) if isinstance(types, list) and types else other or 1}
    try:
        kinds = list(_kinds(text, reach))
    except ValueError as error:
        return str(error)
    family = text.get("model_type")
    if known is not None and family not in _READERS and any(kind.window for kind in kinds):
        field = next(name for kind, name in _WINDOWS.values() if any(each.kind == kind for each in kinds))
        return (
            f"sets {field}={_shown(text.get(field))}, which the class of model type {family!r} does not apply in its layers: set it to"
            " null in a copy of the folder"
        )
    return None


def _kinds(text: dict[str, Any], reach: int | None) -> Iterator[LayerKind]:
    count = text.get("num_hidden_layers")
    if not _is_count(count):
        raise ValueError(f"has num_hidden_layers={_shown(count)}: from 1 to {_MAX_LAYERS:,} layers are supported")
    for layer, name in enumerate(_layer_names(text, count)):
        if name in _FULL_NAMES:
            yield FULL_KIND
            continue
        if name not in _WINDOWS:
            raise ValueError(
                f"has layers of several kinds: layer {layer} of model type {_family(text)!r} is {_shown(name)[1:-1]}; only layers of"
                " full, sliding-window or chunked attention are supported"
            )
        kind, field = _WINDOWS[name]
        window = _window(text) if kind == "sliding" else text.get(field)
        if _is_int(window) and window > 0 and reach is not None and window >= reach:
            yield FULL_KIND
        elif _is_int(window) and 0 < window <= _MAX_WINDOW:
            yield LayerKind("sliding" if kind == "sliding" else "chunked", window)
        else:
            raise ValueError(
                f"has {field}={_shown(window)}, but layer {layer} of model type {_family(text)!r} is {name}: its window must be"
                f" from 1 to {_MAX_WINDOW:,} tokens"
            )


def names_of(kinds: tuple[LayerKind, ...]) -> list[str]:
    """The same as transformers' ``layer_types``."""
    names = {kind: name for name, (kind, _) in _WINDOWS.items()}
    return [names.get(kind.kind, FULL) for kind in kinds]


def _layer_names(text: dict[str, Any], count: int) -> list[str]:
    """What transformers' ``layer_types`` are, or would be if the file spelled them out.

    Raises:
        ValueError: if the file contradicts itself.
    """
    family = _family(text)
    given = text.get("layer_types")
    if given and family not in _ALL_SLIDE:
        if not isinstance(given, list) or len(given) < count:
            entries = len(given) if isinstance(given, list) else 0
            raise ValueError(f"has {entries} layer_types for {count} layers: name the kind of each layer")
        return [name if isinstance(name, str) else json.dumps(name) for name in given[:count]]
    known = family_of(text)
    if known is not None and known.other is not None:
        return [FULL] * known.other[0] + [known.other[1]] * (count - known.other[0])
    if family in _LAST_FULL:
        return _last_full(text, family, count)
    if family in _FIRST_FULL:
        every = _every(text, *_FIRST_FULL[family])
        return _names(layer % every != 0 for layer in range(count))
    if family in _NAMED_ONLY:
        return [FULL] * count
    if family == "flint":
        return _names(layer >= 2 and layer % 4 != 1 and layer != count - 1 for layer in range(count))
    if family == "llama4_text":
        rotary = _rotary(text, count, 4)
        return [_CHUNKED if text.get("attention_chunk_size") is not None and rope else FULL for rope in rotary]
    return _by_fields(text, family, count)


def _by_fields(text: dict[str, Any], family: str, count: int) -> list[str]:
    """Layers of families, known or not, whose files say by fields of their own which layers slide."""
    window, first = _window(text), text.get("max_window_layers")
    if window is None:
        # as transformers' masks and caches take a file of a class that does not say more
        chunked = family not in _READERS and text.get("attention_chunk_size") is not None
        return [_CHUNKED if chunked else FULL] * count
    if family == "qwen2_moe":
        return _names(layer % 2 == 0 and layer < _whole(first, count) for layer in range(count))
    if family == "smollm3":
        return _names(not rope for rope in _rotary(text, count, 4))
    begin = 0 if family in (*_ALL_SLIDE, "ministral") else _whole(first, 0)
    return _names(layer >= begin for layer in range(count))


def _last_full(text: dict[str, Any], family: str, count: int) -> list[str]:
    field = _LAST_FULL[family][1]
    pattern = text.get(field) if field else None
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:  # EXAONE 4 has it in letters
        return _names(pattern[layer % len(pattern)] == "L" and layer != count - 1 for layer in range(count))
    every = _every(text, *_LAST_FULL[family])
    dense = min(_whole(text.get("first_k_dense_replace"), 0), count) if family == "cohere2_moe" else 0
    start = _every(text, 1, "prefix_dense_sliding_window_pattern") if dense else 1
    prefix = [(layer + 1) % start != 0 for layer in range(dense)]
    return _names([*prefix, *((layer + 1) % every != 0 for layer in range(count - dense))])


def _every(text: dict[str, Any], usual: int, field: str | None) -> int:
    number = text.get(field) if field else None
    if number is None:
        return usual
    if not _is_int(number) or number < 1:
        raise ValueError(f"has {field}={_shown(number)}: of how many layers one is full must be a number from 1 on")
    return number


def _rotary(text: dict[str, Any], count: int, usual: int) -> list[Any]:
    """Which layers have a rotary embedding; those that have none are full in Llama 4, and slide in SmolLM 3."""
    given = text.get("no_rope_layers")
    if not given:
        every = _every(text, usual, "no_rope_layer_interval")
        return [(layer + 1) % every != 0 for layer in range(count)]
    if not isinstance(given, list) or len(given) < count:
        raise ValueError(f"has no_rope_layers={_shown(given)} for {count} layers: it needs an entry a layer")
    return given[:count]


def _window(text: dict[str, Any]) -> Any:
    """The window of sliding layers, as the family's class reads it; None if there is none."""
    family = _family(text)
    if text.get("use_sliding_window") is False and (family in _SWITCHED or family not in _READERS):
        return None
    return text.get("sliding_window")


def _names(slides: Any) -> list[str]:
    return [_SLIDING if each else FULL for each in slides]


def _whole(value: Any, usual: int) -> int:
    return value if _is_int(value) else usual


def _family(text: dict[str, Any]) -> str:
    kind = text.get("model_type")
    return kind[:60] if isinstance(kind, str) else "unknown"


def _is_count(value: Any) -> TypeGuard[int]:
    return _is_int(value) and 0 < value <= _MAX_LAYERS


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as config.json has it, cut to what fits in a line."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
