"""Tiny random models whose layers are of several kinds, in classes that SGLang has too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from kvtuner_search.models.reference_model import reference_model_path

WINDOW = 16
POSITIONS = 256
_SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 8192, "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "sliding_window": WINDOW,
}  # fmt: skip
_THREE_OF_FOUR = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class, and what its config has besides
    # SGLang caps the last logits by a Triton kernel, also on the CPU.
    "gemma2": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 50, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", {"head_dim": 64, "query_pre_attn_scalar": 50, "layer_types": _THREE_OF_FOUR}),
    "olmo3": ("Olmo3", {"hidden_size": 256, "layer_types": _THREE_OF_FOUR}),
    "afmoe": ("Afmoe", {"head_dim": 64, "num_dense_layers": 4, "layer_types": _THREE_OF_FOUR}),  # without experts
    "gpt_oss": ("GptOss", {"head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": _THREE_OF_FOUR}),
    "mistral": ("Mistral", {"head_dim": 64}),
}  # fmt: skip
_SPELLED: dict[str, dict[str, Any]] = {  # what SGLang's classes read in config.json, and transformers does not write
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "olmo3": {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
    "afmoe": {
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1, 1, 0, 1],
    },  # a pool of their own for layers with windows
}


def write_window_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model, with a tokenizer. Its answers depend on its windows.

    Args:
        folder: where to.
        name: of the family.
        dtype: of its weights.
        changes: other values of its config.
    """
    torch.manual_seed(0)
    family, more = _FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(_SHAPE | more | changes))
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        if config.tie_word_embeddings:  # or the last token would answer with itself, whatever it attends to
            model.model.embed_tokens.weight *= 0.15
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    model.to(dtype).save_pretrained(folder)
    path = folder / "config.json"
    spelled = _SPELLED.get(name, {})
    path.write_text(
        json.dumps(json.loads(path.read_text()) | spelled | {k: v for k, v in changes.items() if k in spelled})
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model_path() / file, folder / file)
    return folder
