"""Which kind of attention each layer of a model has, from config.json alone. Neither torch nor transformers is imported.

A layer sees all earlier tokens (full), the latest ones (sliding), or those of its own chunk (chunked). transformers and SGLang
count a window differently; here it is the number of tokens that a query sees at most, its own included.
"""

from __future__ import annotations

from typing import Any, Final

from kvtuner_search.profile.kinds import FULL_KIND, LayerKind

_KINDS: Final = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
KNOWN: Final = tuple(_KINDS)
_SLIDING: Final = "sliding_attention"
_PERIODS: Final = {  # without layer_types: the layers of one period, s with a window, c in chunks, f full
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma"), "sf"),
    **dict.fromkeys(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "olmo3"), "sssf"),
    "cwm": "fsss",
    "gemma3_text": "sssssf",
    "llama4_text": "cccf",
    "modernbert-decoder": "fss",
    **dict.fromkeys(("ministral", "ministral3", "mistral", "mixtral", "moshi", "phi3", "phimoe", "starcoder2"), "s"),
}
_LETTERS: Final = {"s": _SLIDING, "c": "chunked_attention", "f": "full_attention"}


def kinds_of(text: dict[str, Any], reach: int | None) -> tuple[LayerKind, ...] | None:
    """The kind of every layer, or None if the file describes a layer of a kind that is not known here.

    Args:
        text: the decoder's part of config.json, spelled out (:func:`~kvtuner_search.profile.model_config.decoder`).
        reach: most positions, if known; a window at least that long is full attention.

    Example:
        ``kinds_of({"model_type": "gemma2", "num_hidden_layers": 2, "sliding_window": 4096}, 8192)`` is a sliding layer and a full one.
    """
    count = text.get("num_hidden_layers")
    if not isinstance(count, int) or not 0 < count <= 4096:
        return None
    names = layer_names(text, count)
    kinds = []
    for name in names:
        kind = _KINDS.get(name)
        if kind is None:
            return None
        if kind == "full":
            kinds.append(FULL_KIND)
            continue
        window = text.get("sliding_window" if kind == "sliding" else "attention_chunk_size")
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            return None
        kinds.append(FULL_KIND if reach is not None and window >= reach else LayerKind.parse(f"{kind}:{window}"))
    return tuple(kinds)


def layer_names(text: dict[str, Any], count: int) -> list[str]:
    """What transformers' ``layer_types`` are, or would be if the file spelled them out.

    Args:
        text: the decoder's part of config.json (as for :func:`kinds_of`).
        count: number of layers.
    """
    given = text.get("layer_types")
    if isinstance(given, list) and given:
        return [str(name) for name in given[:count]]
    family = text.get("model_type")
    window = text.get("sliding_window")
    if family == "llama4_text":
        ropes = text.get("no_rope_layers")
        if text.get("attention_chunk_size") is None:
            return ["full_attention"] * count
        if isinstance(ropes, list) and ropes:
            return ["chunked_attention" if rope else "full_attention" for rope in ropes[:count]]
    first = text.get("max_window_layers")
    if text.get("use_sliding_window") is not None or (isinstance(first, int) and window is not None):
        if not text.get("use_sliding_window") or window is None:
            return ["full_attention"] * count
        begin = first if isinstance(first, int) else 0
        return [_SLIDING if layer >= begin else "full_attention" for layer in range(count)]
    period = _PERIODS.get(str(family), "f")
    if window is None and "s" in period:
        return ["full_attention"] * count
    pattern = text.get("sliding_window_pattern", text.get("no_rope_layer_interval"))
    if period.endswith("f") and len(period) > 1:
        if isinstance(pattern, str) and pattern:
            pattern = len(pattern)
        if isinstance(pattern, int) and 0 < pattern <= count:
            period = period[0] * (pattern - 1) + "f"
    return [_LETTERS[period[layer % len(period)]] for layer in range(count)]
