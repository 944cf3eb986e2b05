"""Tiny random models whose layers are of several kinds, on disk, with the reference model's tokenizer."""

import shutil
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from kvtuner_search.models.reference_model import reference_model_path

WINDOW: Final = 12  # tokens that a query of a sliding layer sees, its own included
CHUNK: Final = 16
SIZES: Final[dict[str, Any]] = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SLIDES: Final = {"sliding_window": WINDOW}
_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA: Final = _SLIDES | {"query_pre_attn_scalar": 9}  # not head_dim, so that a scale of head_dim**-0.5 is wrong
KINDS: Final[dict[str, tuple[str, dict[str, Any], str]]] = {  # class, config, kinds as a profile names them (s, c, f)
    "Gemma 2": ("Gemma2ForCausalLM", _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}, "sfsf"),
    "Gemma 3": ("Gemma3ForCausalLM", _GEMMA | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "sssf"),
    "gpt-oss": ("GptOssForCausalLM", _SLIDES | _EXPERTS | {"intermediate_size": 64}, "sfsf"),
    "Llama 4": (
        "Llama4ForCausalLM",
        _EXPERTS
        | {
            "attention_chunk_size": CHUNK,
            "intermediate_size_mlp": 96,
            "floor_scale": 8,
            "attn_scale": 0.5,
            "moe_layers": [],
            "no_rope_layers": [1, 1, 1, 0],
        },
        "cccf",
    ),
    "OLMo 3": ("Olmo3ForCausalLM", _SLIDES, "sssf"),
    "Cohere 2": ("Cohere2ForCausalLM", _SLIDES | {"logit_scale": 0.25}, "sssf"),
    "Mistral": ("MistralForCausalLM", _SLIDES, "ssss"),
    "Qwen2": ("Qwen2ForCausalLM", _SLIDES | {"use_sliding_window": True, "max_window_layers": 2}, "ffss"),
    "SmolLM3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 1, 0]}, "ffff"),
    "Cohere": ("CohereForCausalLM", {"logit_scale": 0.25}, "ffff"),
}
TEXTS: Final = {"s": f"sliding:{WINDOW}", "c": f"chunked:{CHUNK}", "f": "full"}


def kinds_of(name: str) -> list[str]:
    """The kind of each layer, as a profile names it."""
    return [TEXTS[letter] for letter in KINDS[name][2]]


def write_kind(folder: Path, name: str, **changes: Any) -> Path:
    """Save a random model of a kind, with a tokenizer; the same arguments give the same weights."""
    kind, more, _ = KINDS[name]
    cls = getattr(transformers, kind)
    config = transformers.Llama4TextConfig if name == "Llama 4" else cls.config_class
    torch.manual_seed(0)
    model = cls(config(**(SIZES | more | changes)))
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "sinks"):
                layer.self_attn.sinks.normal_(1.0)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model_path() / file, folder / file)
    return folder
