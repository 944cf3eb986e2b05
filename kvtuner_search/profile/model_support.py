"""The one gate for supported models: decoders in which every layer has standard, full attention. It reads config.json alone.

Neither torch nor transformers is imported. A config does not say whether transformers lets calibration see a model's keys and
values; :mod:`kvtuner_search.models.support` tests that.
"""

from __future__ import annotations

from typing import Any, Final

from kvtuner_search.errors import DataError
from kvtuner_search.profile.model_config import positions, shorten, text_config, windowed_layers
from kvtuner_search.profile.model_families import spelled_out

_MLA: Final = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")
_FULL: Final = ("full_attention", "attention")
_HYBRID: Final = (  # fields by which models of mixed layers say which layer is what
    "full_attention_interval", "attn_type_list", "hybrid_override_pattern", "layers_block_type", "attn_layer_period",
    "attention_layer_idx", "full_attn_idxs",
)  # fmt: skip
_NO_CACHE: Final = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "bamba", "jamba", "zamba", "zamba2", "falcon_h1",
     "nemotron_h", "granitemoehybrid", "olmo_hybrid", "lfm2", "lfm2_moe"),
    "has layers that keep a state instead of keys and values",
)  # fmt: skip
_OTHER: Final = {
    "bloom": "attends with ALiBi, a bias by distance that packed attention does not add",
    "mpt": "attends with ALiBi, a bias by distance that packed attention does not add",
    "falcon": "computes attention in classes of its own, into which no quantized cache can be put",
    "bert": "is an encoder",
    "roberta": "is an encoder",
    "electra": "is an encoder",
}
_ONLY: Final = "only models with full attention in every layer are supported"


def unsupported(config: dict[str, Any], most: int | None = None) -> str | None:
    """Why a model cannot be calibrated or served with a profile, as a text that follows its name; None if its config.json shows no reason.

    Args:
        config: the content of config.json.
        most: most tokens of a sequence, if known: a window at least that long is full attention.

    Example:
        ``unsupported({"model_type": "bloom"})`` names its kind of attention, and what is supported.
    """
    text = spelled_out(text_config(config))
    kind = str(text.get("model_type"))[:60] if isinstance(text.get("model_type"), str) else "unknown"
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        return f"is an encoder-decoder (model type {kind!r}): only decoders are supported"
    why = _OTHER.get(kind) or _NO_CACHE.get(kind)
    if why is None and text.get("alibi"):
        why = _OTHER["bloom"]
    if why is not None:
        return f"{why} (model type {kind!r}): {_ONLY}"
    if text.get("kv_lora_rank"):
        fields = ", ".join(f"{name}={shorten(text[name])}" for name in _MLA if text.get(name))
        return (
            f"has multi-head latent attention, MLA ({fields}): its cache does not hold keys and values, so no profile"
            " fits it"
        )
    return _mixed(config, text, kind, most)


def _mixed(config: dict[str, Any], text: dict[str, Any], kind: str, most: int | None) -> str | None:
    """Layers of other kinds, and windows."""
    count = text.get("num_hidden_layers")
    types = text.get("layer_types")
    types = types[: count if isinstance(count, int) and count > 0 else None] if isinstance(types, list) else []
    reach = min((n for n in (positions(config)[1], most) if n is not None), default=None)
    window = windowed_layers(config)
    full = window is None or (reach is not None and isinstance(window[0], int) and window[0] >= reach)
    size = text.get("sliding_window")
    wide = reach is not None and isinstance(size, int) and size >= reach  # as long as the positions: full attention
    plain = (*_FULL, "sliding_attention") if wide else _FULL
    for layer, name in enumerate(types):
        if name not in plain:
            span = f" (window {shorten(text.get('sliding_window'))})" if name == "sliding_attention" else ""
            kinds = ", ".join(sorted({shorten(each).strip('"') for each in types if each not in plain})[:4])
            return f"has layers of several kinds ({kinds}): layer {layer} of model type {kind!r} is {shorten(name)[1:-1]}{span}; {_ONLY}"
    named = next((name for name in _HYBRID if text.get(name)), None)
    if named is not None:
        return (
            f"has layers of several kinds (a hybrid of attention and others: {named}={shorten(text[named])}); {_ONLY}"
        )
    chunk = text.get("attention_chunk_size")
    if chunk and not (reach is not None and isinstance(chunk, int) and chunk >= reach) and not types:
        return f"has no full attention: layer 0 of model type {kind!r} attends in chunks of {shorten(chunk)} tokens; {_ONLY}"
    if not full and window is not None:
        first = window[1][0] if window[1] else 0
        several = (
            "has layers of several kinds (sliding_attention): "
            if window[1] and window[1] != list(range(len(window[1])))
            else "has no full attention: "
        )
        return (
            f"{several}layer {first} of model type {kind!r} is sliding_attention, in a window of {shorten(window[0])} tokens"
            f" (sliding_window) of {reach or 'unknown'} positions; {_ONLY}. If no text is longer than the window, set"
            " sliding_window to null in a copy of the folder, and calibrate and serve that copy"
        )
    return None


def check_supported(config: dict[str, Any], source: str, most: int | None = None) -> None:
    """Refuse a config.json that has a layer without standard, full attention; ``source`` is what the message calls the model.

    Raises:
        DataError: names the first such layer and why.
    """
    reason = unsupported(config, most)
    if reason is not None:
        raise DataError(f"{source} {reason}")
