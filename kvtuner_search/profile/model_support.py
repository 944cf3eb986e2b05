"""The one gate for supported models: decoders in which every layer has keys and values of its own, and full, sliding-window or chunked
attention. It reads config.json alone.

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
)
from kvtuner_search.profile.model_kinds import trouble
from kvtuner_search.profile.schema import ModelInfo

_MLA: Final = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")
_HYBRID: Final = (  # fields by which models of mixed layers say which layer is what
    "full_attention_interval", "attn_type_list", "hybrid_override_pattern", "layers_block_type", "attn_layer_period",
    "attention_layer_idx", "full_attn_idxs", "sparse_attention_config",
)  # fmt: skip
_ALIBI: Final = "attends with ALiBi, a bias by distance that packed attention does not add"
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
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_text", "gemma4_unified_text", "gemma4_assistant", "gemma4_unified_assistant"),
        "has layers that share keys and values, or have heads of other sizes",
    ),
    "mimo_v2_flash": "has windowed layers with twice the KV heads, and values with heads of other sizes than keys",
    "deepseek_v4": "has layers that compress keys and values",
    "doge": "adds a bias to its scores that it computes from values, and masks by values",
    **dict.fromkeys(("mllama", "mllama_text_model"), "has layers of several kinds (cross-attention)"),
    **dict.fromkeys(("dory", "zaya", "beam", "dots3_note", "dots3_note_text"), "has layers of several kinds, by a rule of its own"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "attends to tokens that an index picks"),
    "jetmoe": "attends with a mixture of heads",
}  # fmt: skip
_ENCODER_DECODER: Final = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody", "mvp", "pegasus",
    "plbart", "prophetnet", "whisper",
)  # fmt: skip
_ONLY: Final = "only layers of full, sliding-window or chunked attention are supported"


def unsupported(config: dict[str, Any], most: int | None = None) -> str | None:
    """Why a model cannot be calibrated or served with a profile, as a text that follows its name; None if its config.json shows no reason.

    Args:
        config: the content of config.json.
        most: most tokens of a sequence, if known: no window that is at least that long cuts anything off.

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
    return _mixed(config, text, most)


def _mixed(config: dict[str, Any], text: dict[str, Any], most: int | None) -> str | None:
    """Layers of kinds that no profile describes, and windows that make no sense."""
    named = next((name for name in _HYBRID if text.get(name)), None)
    if named is not None:
        return (
            f"has layers of several kinds (a hybrid of attention and others: {named}={shorten(text[named])}); {_ONLY}"
        )
    both = text.get("use_bidirectional_attention")
    if both:
        return f"attends to later tokens too (use_bidirectional_attention={shorten(both)}): only decoders are supported"
    heads = text.get("num_attention_heads_per_layer")
    if isinstance(heads, list) and len({shorten(each) for each in heads}) > 1:
        return f"has layers of other numbers of heads (num_attention_heads_per_layer={shorten(heads)}): a profile has one number for all"
    reach = positions(config)[1]
    return trouble(text, min((n for n in (reach, most) if n is not None), default=None))


def check_supported(config: dict[str, Any], source: str, most: int | None = None) -> None:
    """Refuse a config.json that has a layer of a kind for which there is no profile; ``source`` is what the message calls the model.

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
