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
    rope: dict[str, Any] | None = None  # rotary parameters of a file that has none, if they are more than a base
    thetas: tuple[str | None, str | None] = (
        None,
        None,
    )  # of two embeddings, what older files call the bases, full and windowed
    scaled: tuple[str, ...] = ("full_attention",)  # of two embeddings, those that an older file's rope_scaling is for
    unread: tuple[str, ...] = ()  # usual names that this family does not read
    other: tuple[int, str] | None = (
        None  # without layer_types: the first layer that is no attention with keys and values, and what it is
    )


_LINEAR: Final = "linear_attention"
_QWEN_WINDOW: Final = {"use_sliding_window": False, "max_window_layers": 28}


def _two(full: int, sliding: int) -> dict[str, Any]:
    """The two rotary embeddings of models with windows."""
    return {
        "full_attention": {"rope_type": "default", "rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }


def _llama3(theta: int, factor: int) -> dict[str, Any]:
    scaled = {"factor": factor, "high_freq_factor": 4, "low_freq_factor": 1, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": theta, **scaled}


FAMILIES: Final[dict[str, Family]] = {
    "afmoe": Family("AfmoeForCausalLM", {"head_dim": 128, "sliding_window": 1024}),
    "apertus": Family("ApertusForCausalLM", {"rope_theta": 12000000}, rope=_llama3(12000000, 8)),
    "apertus1p5_text": Family("Apertus1p5TextForCausalLM", {"rope_theta": 12000000}, rope=_llama3(12000000, 8)),
    "arcee": Family("ArceeForCausalLM"),
    "aria_text": Family("AriaTextForCausalLM"),
    "axk1": Family("AXK1ForCausalLM", {"kv_lora_rank": 512}),
    "axk2": Family("AXK2ForCausalLM", {"kv_lora_rank": 128}),
    "bailing_hybrid": Family("BailingHybridForCausalLM", {"rope_theta": 6000000, "kv_lora_rank": 512}),
    "bert-generation": Family("BertGenerationDecoder"),
    "biogpt": Family("BioGptForCausalLM"),
    "bitnet": Family("BitNetForCausalLM", {"num_key_value_heads": 5, "rope_theta": 500000}),
    "codegen": Family("CodeGenForCausalLM", {"rotary_dim": 64}),
    "cohere": Family("CohereForCausalLM", {"rope_theta": 500000}),
    "cohere2": Family("Cohere2ForCausalLM", {"sliding_window": 4096}),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", {"head_dim": 128, "sliding_window": 4096}),
    "cohere_compass_text": Family("CohereCompassForCausalLM", {"sliding_window": 4096}),
    "ctrl": Family("CTRLLMHeadModel"),
    "cwm": Family("CwmForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192, "rope_theta": 1000000}, rope=_llama3(1000000, 16)),
    "dbrx": Family("DbrxForCausalLM"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", {"kv_lora_rank": 512}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", {"kv_lora_rank": 512}),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", {"kv_lora_rank": 512}),
    "diffllama": Family("DiffLlamaForCausalLM"),
    "doge": Family("DogeForCausalLM"),
    "dots1": Family("Dots1ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62, "use_sliding_window": False}),
    "ernie4_5": Family("Ernie4_5ForCausalLM", {"num_key_value_heads": 2, "head_dim": 128, "rope_theta": 500000}),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", {"num_key_value_heads": 4, "rope_theta": 500000}),
    "exaone": Family("LlamaForCausalLM", {"num_key_value_heads": 8, "rope_theta": 500000}),
    "exaone4": Family("Exaone4ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096}),
    "exaone_moe": Family("ExaoneMoeForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096}),
    "flex_olmo": Family("FlexOlmoForCausalLM", {"rope_theta": 500000}),
    "gemma": Family("GemmaForCausalLM", {"num_key_value_heads": 16, "head_dim": 256}),
    "gemma2": Family("Gemma2ForCausalLM", {"num_key_value_heads": 4, "head_dim": 256, "attn_logit_softcapping": 50, "query_pre_attn_scalar": 256, "sliding_window": 4096}),
    "gemma3_text": Family("Gemma3ForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}, rope=_two(1000000, 10000), thetas=("rope_theta", "rope_local_base_freq")),
    "glm": Family("GlmForCausalLM", {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4": Family("Glm4ForCausalLM", {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4_moe": Family("Glm4MoeForCausalLM", {"num_key_value_heads": 8, "partial_rotary_factor": 0.5}),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", {"kv_lora_rank": 512}),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", {"kv_lora_rank": 512}),
    "gpt2": Family("GPT2LMHeadModel"),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", {"num_key_value_heads": 1}),
    "gpt_neox": Family("GPTNeoXForCausalLM", {"attention_bias": True, "partial_rotary_factor": 0.25}, unread=("rope_theta", "partial_rotary_factor")),
    "gptj": Family("GPTJForCausalLM", {"rotary_dim": 64}),
    "gpt_oss": Family("GptOssForCausalLM", {"num_key_value_heads": 8, "head_dim": 64, "num_attention_heads": 64, "attention_bias": True, "sliding_window": 128, "max_position_embeddings": 131072, "rope_theta": 150000}, rope={"rope_type": "yarn", "factor": 32, "beta_fast": 32, "beta_slow": 1, "truncate": False, "original_max_position_embeddings": 4096}),
    "flint": Family("FlintForCausalLM", {"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 513}),
    "granite": Family("GraniteForCausalLM", {"attention_multiplier": 1}),
    "granitemoe": Family("GraniteMoeForCausalLM", {"attention_multiplier": 1}),
    "granite_swa": Family("GraniteSWAForCausalLM", {"num_key_value_heads": 4, "attention_multiplier": 1, "sliding_window": 128}),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM", {"attention_multiplier": 1, "sliding_window": 128}),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM", {"attention_multiplier": 1}),
    "helium": Family("HeliumForCausalLM", {"num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("HYV3ForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 11158840}),
    "hy_v4": Family("HYV4ForCausalLM", {"kv_lora_rank": 512}),
    "hyperclovax": Family("HyperCLOVAXForCausalLM", {"attention_multiplier": 128**-0.5}),
    "inkling2_loop_text": Family("Inkling2LoopForCausalLM", {"num_key_value_heads": 8, "head_dim": 128}, other=(0, "hybrid_sliding")),
    "inkling2_text": Family("Inkling2ForCausalLM", {"num_key_value_heads": 8, "head_dim": 128}, other=(0, "hybrid_sliding")),
    "inkling_text": Family("InklingForCausalLM", {"num_key_value_heads": 8, "head_dim": 128}, other=(0, "hybrid_sliding")),
    "internlm3": Family("LlamaForCausalLM", {"num_key_value_heads": 2, "head_dim": 128}),
    "iquestcoder": Family("LlamaForCausalLM", {"num_key_value_heads": 8, "head_dim": 128}),
    "jais2": Family("Jais2ForCausalLM", {"attention_bias": True}),
    "kimi_linear": Family("KimiLinearForCausalLM", {"kv_lora_rank": 512}),
    "kolibri1": Family("Kolibri1ForCausalLM", {"num_key_value_heads": 4, "head_dim": 128, "sliding_window": 513}),
    "laguna": Family("LagunaForCausalLM", {"rope_theta": 500000, "partial_rotary_factor": 0.5, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 512}, rope={"full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 500000, "rope_type": "default"}, "sliding_attention": {"partial_rotary_factor": 1, "rope_theta": 10000, "rope_type": "default"}}),
    "lara_mini": Family("LaraMiniForCausalLM", {"sliding_window": 512}, other=(0, _LINEAR)),
    "lfm3": Family("Lfm3ForCausalLM", {"rope_theta": 1000000, "partial_rotary_factor": 0.5, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 256}, other=(0, "conv"), rope={"full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_type": "proportional"}, "sliding_attention": {"rope_theta": 10000, "rope_type": "default"}}),
    "llama": Family("LlamaForCausalLM"),
    "llama4_text": Family("Llama4ForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "attention_chunk_size": 8192, "rope_theta": 500000}),
    "longcat_flash": Family("LongcatFlashForCausalLM", {"rope_theta": 10000000, "kv_lora_rank": 512}),
    "mellum": Family("MellumForCausalLM", {"rope_theta": 500000, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 1024}, rope=_two(500000, 10000)),
    "minicpm3": Family("MiniCPM3ForCausalLM", {"kv_lora_rank": 256}),
    "minimax": Family("MiniMaxForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}, other=(1, _LINEAR)),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5000000}),
    "minimax_m3_vl_text": Family("MiniMaxM3VLForCausalLM", {"num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "rope_theta": 5000000}),
    "ministral": Family("MinistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "ministral3": Family("Ministral3ForCausalLM", {"rope_theta": 1000000, "num_key_value_heads": 8, "head_dim": 128}, rope={"beta_fast": 32, "beta_slow": 1, "factor": 16, "llama_4_scaling_beta": 0.1, "mscale": 1, "mscale_all_dim": 1, "original_max_position_embeddings": 16384, "rope_theta": 1000000, "rope_type": "yarn", "type": "yarn"}),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family("MixtralForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}),
    "modernbert-decoder": Family("ModernBertDecoderForCausalLM", {"rope_theta": 160000, "sliding_window": 64}, rope=_two(160000, 10000), thetas=("global_rope_theta", "local_rope_theta"), scaled=("full_attention", "sliding_attention")),
    "moshi": Family("MoshiForCausalLM", {"sliding_window": 3000}),
    "nanochat": Family("NanoChatForCausalLM"),
    "nemotron": Family("NemotronForCausalLM", {"partial_rotary_factor": 0.5}),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM"),
    "olmo3": Family("Olmo3ForCausalLM", {"rope_theta": 500000, "sliding_window": 4096}, rope=_two(500000, 500000), thetas=("rope_theta", None)),
    "olmoe": Family("OlmoeForCausalLM"),
    "opt": Family("OPTForCausalLM"),
    "persimmon": Family("PersimmonForCausalLM", {"partial_rotary_factor": 0.5}, unread=("num_key_value_heads", "head_dim", "sliding_window")),
    "phi": Family("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3ForCausalLM", {"original_max_position_embeddings": 4096}),
    "phi4_multimodal": Family("Phi4MultimodalForCausalLM", {"num_key_value_heads": 8, "original_max_position_embeddings": 4096}),
    "phimoe": Family("PhimoeForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, **_QWEN_WINDOW}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {"num_key_value_heads": 16, **_QWEN_WINDOW}),
    "qwen3": Family("Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOW}),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", {"num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25}, other=(0, _LINEAR)),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", {"num_key_value_heads": 4, "head_dim": 256, "partial_rotary_factor": 0.25}, other=(0, _LINEAR)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {"num_key_value_heads": 4, "use_sliding_window": False}),
    "qwen3_next": Family("Qwen3NextForCausalLM", {"num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25}, other=(0, _LINEAR)),
    "sarvam_mla": Family("DeepseekV3ForCausalLM", {"kv_lora_rank": 512}),
    "sarvam_moe": Family("Glm4MoeForCausalLM", {"num_key_value_heads": 4, "head_dim": 64, "rope_theta": 8000000}),
    "seed_oss": Family("SeedOssForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}),
    "smollm3": Family("SmolLM3ForCausalLM", {"num_key_value_heads": 4, "use_sliding_window": False, "rope_theta": 2000000}),
    "solar_open": Family("SolarOpenForCausalLM", {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000}),
    "stablelm": Family("StableLmForCausalLM", {"num_key_value_heads": 32, "partial_rotary_factor": 0.25}),
    "starcoder2": Family("Starcoder2ForCausalLM", {"num_key_value_heads": 2}),
    "vaultgemma": Family("VaultGemmaForCausalLM", {"num_key_value_heads": 4, "head_dim": 256, "attn_logit_softcapping": 50, "query_pre_attn_scalar": 256, "sliding_window": 4096}),
    "youtu": Family("YoutuForCausalLM", {"kv_lora_rank": 512}),
    "zaya": Family("ZayaForCausalLM", {}, other=(0, "hybrid")),
}  # fmt: skip

_PARTS: Final = {  # of larger models, and no class of their own
    "emu3_text_model": Family("Emu3ForCausalLM", {"num_key_value_heads": 8, "rope_theta": 1000000}),
}
_NAMES: Final = {  # what we call a field -> what older families call it
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
}
_NESTED: Final = {  # model_type of a whole config.json -> that of its decoder, where the decoder's part names none
    "emu3": "emu3_text_model", "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text", "got_ocr2": "qwen2", "llama4": "llama4_text", "llava": "llama", "llava_next": "llama",
    "mistral3": "mistral", "mllama": "mllama_text_model", "moss_transcribe_diarize": "qwen3", "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text", "qwen4_exp": "qwen4_exp_text",
}  # fmt: skip
_SAME: Final = {"gpt-sw3": "gpt2", "fuyu": "persimmon"}  # model_type -> what transformers saves it as
# Where null says something else than a missing field does: no window, no chunks, no cap, derived from the other sizes.
_NULL_COUNTS: Final = (
    "sliding_window", "attention_chunk_size", "local_attention", "attn_logit_softcapping", "query_pre_attn_scalar", "head_dim",
    "num_key_value_heads",
)  # fmt: skip


def family_of(text: dict[str, Any]) -> Family | None:
    """The family of a decoder's config, or None if it is not known here."""
    kind = text.get("model_type")
    return FAMILIES.get(kind, _PARTS.get(kind)) if isinstance(kind, str) else None


def spelled_out(text: dict[str, Any], whole: str = "") -> dict[str, Any]:
    """A decoder's config under today's names, with the defaults of its family where it leaves a field out, and whole numbers as such.

    Args:
        text: the part of config.json that describes the decoder.
        whole: the ``model_type`` of the whole file, where that is another.

    Example:
        ``spelled_out({"model_type": "gpt2", "n_layer": 12.0})`` has ``num_hidden_layers`` 12.
    """
    given = {key: plain_numbers(value) for key, value in text.items() if value is not None or key in _NULL_COUNTS}
    if whole in _NESTED:
        given.setdefault("model_type", _NESTED[whole])
    kind = given.get("model_type")
    if isinstance(kind, str) and kind in _SAME:
        given["model_type"] = _SAME[kind]
    if given.get("model_type") == "mistral" and given.get("layer_types"):  # as AutoConfig reads it
        given["model_type"] = "ministral"
    family = family_of(given) or Family("")
    for name in family.unread:
        given.pop(name, None)
    for name, others in _NAMES.items():
        found = next((given[other] for other in others if other in given), None)
        if name not in given and found is not None:
            given[name] = found
    if given.get("model_type") == "dbrx":  # its attention reads this part alone
        part = given.get("attn_config")
        nested = part if isinstance(part, dict) else {}
        given |= {"num_key_value_heads": nested.get("kv_n_heads", 1), "rope_theta": nested.get("rope_theta", 10000)}
        given = {name: value for name, value in given.items() if name not in ("rope_parameters", "rope_scaling")}
    if given.get("multi_query") is False:  # GPT-BigCode
        given.setdefault("num_key_value_heads", None)
    if family.rope is not None:
        given["rope_parameters"] = _ropes(family, given)
        given.pop("rope_scaling", None)
    if given.get("model_type") == "modernbert-decoder" and "local_attention" in given:  # both sides of a token
        local = given["local_attention"]
        given.setdefault("sliding_window", local // 2 if isinstance(local, int) and local else -1)
    if given.get("model_type") == "hyperclovax" and given.get("attention_multiplier") is None:
        given |= _one_over_root(given)
    return {**family.defaults, **given}


def _one_over_root(given: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None
    size = given.get("head_dim") or derived
    return {"attention_multiplier": size**-0.5} if isinstance(size, int) and 0 < size < 2**31 else {}


def _ropes(family: Family, given: dict[str, Any]) -> Any:
    """Rotary parameters where the family has some of its own: those of the file, as far as it has any."""
    usual: dict[str, Any] = family.rope or {}
    found = given.get("rope_scaling") or given.get("rope_parameters")
    if "full_attention" not in usual:
        return found or usual
    if isinstance(found, dict) and found and all(isinstance(rope, dict) for rope in found.values()):
        ropes = found
    elif family.thetas != (None, None) and not given.get("rope_scaling"):
        # Their classes look up the two parts and nothing else: parameters that lie beside them are saved again, but change nothing.
        parts = found if isinstance(found, dict) else {}
        ropes = {kind: parts[kind] for kind in usual if isinstance(parts.get(kind), dict)}
    else:
        ropes = {kind: found if isinstance(found, dict) else {} for kind in family.scaled}
        if family.thetas == (None, None) and "type" in ropes["full_attention"]:
            ropes["full_attention"] = {"rope_type": ropes["full_attention"]["type"], **ropes["full_attention"]}
    named = dict(zip(("full_attention", "sliding_attention"), family.thetas, strict=True))
    return {
        kind: {**usual.get(kind, {}), **_theta(given, named.get(kind)), **ropes.get(kind, {})}
        for kind in {**usual, **ropes}
    }


def _theta(given: dict[str, Any], name: str | None) -> dict[str, Any]:
    return {"rope_theta": given[name]} if name in given else {}


def plain_numbers(value: Any) -> Any:
    """1000000 and 1000000.0 are one number, but two JSON texts."""
    if isinstance(value, dict):
        return {str(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
