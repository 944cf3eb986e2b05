"""The one gate for supported models: decoders in which every layer has standard, full attention. It reads config.json alone.

Neither torch nor transformers is imported. A config does not say whether transformers lets calibration see a model's keys and
values; :mod:`kvtuner_search.models.support` tests that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import DataError
from kvtuner_search.profile.model_config import (
    config_file,
    decoder,
    load_config,
    positions,
    read_config,
    shorten,
    windowed_layers,
)
from kvtuner_search.profile.model_families import family_of
from kvtuner_search.profile.schema import ModelInfo

_MLA: Final = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")
_FULL: Final = ("full_attention", "attention")
_HYBRID: Final = (  # fields by which models of mixed layers say which layer is what
    "full_attention_interval", "attn_type_list", "hybrid_override_pattern", "layers_block_type", "attn_layer_period",
    "attention_layer_idx", "full_attn_idxs",
)  # fmt: skip
_ALIBI: Final = "attends with ALiBi, a bias by distance that packed attention does not add"
_SINKS: Final = "adds sinks to its scores, which packed attention does not do"
_OTHER: Final = {  # by model type, what no field of config.json says
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "bamba", "jamba", "zamba", "zamba2", "falcon_h1",
         "nemotron_h", "granitemoehybrid", "olmo_hybrid", "lfm2", "lfm2_moe"),
        "has layers that keep a state instead of keys and values",
    ),
    **dict.fromkeys(
        ("falcon", "blt", "cpmant", "git", "gpt_neo", "gpt_neox_japanese", "hrm_text", "openai-gpt", "reformer", "trocr", "xglm", "xlm",
         "xlnet"),
        "computes attention in classes of its own, so its keys and values cannot be seen or replaced",
    ),
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
         "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "is an encoder",
    ),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), _SINKS),
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_text", "gemma4_unified_text", "gemma4_assistant", "gemma4_unified_assistant"),
        "has layers that share keys and values, or have heads of other sizes",
    ),
    **dict.fromkeys(("mllama", "mllama_text_model"), "has layers of several kinds (cross-attention)"),
    **dict.fromkeys(("dory", "zaya", "beam"), "has layers of several kinds, by a rule of its own"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "attends to tokens that an index picks"),
    "jetmoe": "attends with a mixture of heads",
}  # fmt: skip
_ENCODER_DECODER: Final = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody", "mvp", "pegasus",
    "plbart", "prophetnet", "whisper",
)  # fmt: skip
_ONLY: Final = "only models with full attention in every layer are supported"


def unsupported(config: dict[str, Any], most: int | None = None) -> str | None:
    """Why a model cannot be calibrated or served with a profile, as a text that follows its name; None if its config.json shows no reason.

    Args:
        config: the content of config.json.
        most: most tokens of a sequence, if known: a window at least that long is full attention.

    Example:
        ``unsupported({"model_type": "bloom"})`` names its kind of attention, and what is supported.
    """
    text = decoder(config)
    kind = str(text.get("model_type"))[:60] if isinstance(text.get("model_type"), str) else "unknown"
    said = text.get("is_encoder_decoder", kind in _ENCODER_DECODER)
    if config.get("is_encoder_decoder") or said:
        return f"is an encoder-decoder (model type {kind!r}): only decoders are supported"
    why = _OTHER.get(kind)
    if why is None and text.get("alibi"):
        why = _ALIBI
    if why is not None:
        return f"{why} (model type {kind!r}): {_ONLY}"
    if text.get("kv_lora_rank"):
        fields = ", ".join(f"{name}={shorten(text[name])}" for name in _MLA if text.get(name))
        return (
            f"has multi-head latent attention, MLA ({fields}): its cache does not hold keys and values, so no profile"
            " fits it"
        )
    return _mixed(config, text, kind, most) or _scores(text, kind)


def _scores(text: dict[str, Any], kind: str) -> str | None:
    """What is done to scores before the softmax, which packed attention does not do."""
    cap = text.get("attn_logit_softcapping")
    if cap is None:
        return None
    return f"caps its scores (model type {kind!r}, attn_logit_softcapping={shorten(cap)}): only standard attention is supported"


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
    family = family_of(text)
    if family is not None and family.other is not None and not types:
        layer, name = family.other
        if name != "sliding_attention" or (size is None and not wide):
            return f"has layers of several kinds ({name}): layer {layer} of model type {kind!r} is {name}; {_ONLY}"
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


def read_supported(path: Path, model_id: str | None = None, revision: str | None = None) -> ModelInfo:
    """The shape of a model for which there can be a profile; arguments as for :func:`~kvtuner_search.profile.model_config.read_config`.

    Raises:
        DataError: if config.json cannot be read, describes no decoder, or is refused by :func:`check_supported`.
    """
    file = config_file(path)
    check_supported(load_config(file), str(file))
    return read_config(path, model_id, revision)
