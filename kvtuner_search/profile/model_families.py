"""What config.json may leave out or call by another name, by ``model_type``. Neither torch nor transformers is imported.

A published file and the one that ``save_pretrained`` writes describe one model: the second spells out defaults and renames fields.
Here are the defaults that attention depends on, as transformers 5 has them; a test compares them with the library's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Family:
    """A ``model_type``."""

    architecture: str  # the class that it means where config.json names none
    defaults: dict[str, Any] = field(default_factory=dict)  # fields that a file may leave out, with what they are then


_QWEN_WINDOW: Final = {"use_sliding_window": False, "max_window_layers": 28}
_GLM: Final = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5}
_GEMMA: Final = {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}

FAMILIES: Final[dict[str, Family]] = {
    "apertus": Family("ApertusForCausalLM", {"rope_theta": 12000000}),
    "arcee": Family("ArceeForCausalLM"),
    "bitnet": Family("BitNetForCausalLM", {"num_key_value_heads": 5, "rope_theta": 500000}),
    "codegen": Family("CodeGenForCausalLM"),
    "cohere": Family("CohereForCausalLM", {"rope_theta": 500000}),
    "cohere2": Family("Cohere2ForCausalLM", {"num_key_value_heads": 64, "head_dim": 128, "sliding_window": 4096}),
    "doge": Family("DogeForCausalLM"),
    "ernie4_5": Family("Ernie4_5ForCausalLM", {"num_key_value_heads": 2, "head_dim": 128, "rope_theta": 500000}),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", {"num_key_value_heads": 4, "rope_theta": 500000}),
    "exaone4": Family("Exaone4ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096}),
    "gemma": Family("GemmaForCausalLM", {"num_key_value_heads": 16, "head_dim": 256}),
    "gemma2": Family("Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 50}),
    "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA),
    "glm": Family("GlmForCausalLM", _GLM),
    "glm4": Family("Glm4ForCausalLM", _GLM),
    "glm4_moe": Family("Glm4MoeForCausalLM", {"num_key_value_heads": 8, "partial_rotary_factor": 0.5}),
    "gpt2": Family("GPT2LMHeadModel"),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", {"num_key_value_heads": 1}),
    "gpt_neox": Family("GPTNeoXForCausalLM", {"attention_bias": True, "partial_rotary_factor": 0.25}),
    "gptj": Family("GPTJForCausalLM"),
    "granite": Family("GraniteForCausalLM", {"attention_multiplier": 1}),
    "granitemoe": Family("GraniteMoeForCausalLM", {"attention_multiplier": 1}),
    "helium": Family("HeliumForCausalLM", {"head_dim": 128, "rope_theta": 100000}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "llama": Family("LlamaForCausalLM"),
    "ministral": Family("MinistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family("MixtralForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}),
    "nemotron": Family("NemotronForCausalLM", {"partial_rotary_factor": 0.5}),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM"),
    "olmo3": Family("Olmo3ForCausalLM", {"sliding_window": 4096, "rope_theta": 500000}),
    "olmoe": Family("OlmoeForCausalLM"),
    "opt": Family("OPTForCausalLM"),
    "persimmon": Family("PersimmonForCausalLM", {"partial_rotary_factor": 0.5}),
    "phi": Family("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3ForCausalLM"),
    "phimoe": Family("PhimoeForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, **_QWEN_WINDOW}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {"num_key_value_heads": 16, **_QWEN_WINDOW}),
    "qwen3": Family("Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOW}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {"num_key_value_heads": 4, "use_sliding_window": False}),
    "seed_oss": Family("SeedOssForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}),
    "smollm3": Family(
        "SmolLM3ForCausalLM", {"num_key_value_heads": 4, "use_sliding_window": False, "rope_theta": 2000000}
    ),
    "stablelm": Family("StableLmForCausalLM", {"num_key_value_heads": 32, "partial_rotary_factor": 0.25}),
    "starcoder2": Family("Starcoder2ForCausalLM", {"num_key_value_heads": 2}),
}

_NAMES: Final = {  # what we call a field -> what older families call it
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
}
# Fields for which null means something else than absence: no window, no cap, derived from the other sizes.
_NULL_COUNTS: Final = (
    "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "head_dim", "num_key_value_heads",
)  # fmt: skip


def family_of(text: dict[str, Any]) -> Family | None:
    """The family of a decoder's config, or None if it is not known here."""
    kind = text.get("model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def spelled_out(text: dict[str, Any]) -> dict[str, Any]:
    """A decoder's config under today's names, with the defaults of its family where it leaves a field out.

    Args:
        text: the part of config.json that describes the decoder.

    Example:
        ``spelled_out({"model_type": "gpt2", "n_layer": 12})`` has ``num_hidden_layers`` 12.
    """
    family = family_of(text)
    given = {key: value for key, value in text.items() if value is not None or key in _NULL_COUNTS}
    for name, others in _NAMES.items():
        found = next((given[other] for other in others if other in given), None)
        if name not in given and found is not None:
            given[name] = found
    if given.get("multi_query") is False:  # GPT-BigCode
        given.setdefault("num_key_value_heads", None)
    return {**(family.defaults if family else {}), **given}
