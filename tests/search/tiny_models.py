"""Tiny random models on disk, with the reference model's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from kvtuner_search.models.reference_model import reference_model_path

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # random, but not so flat that quantization changes nothing
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Llama": {},
    "Mistral": {"sliding_window": None},
}


def make_config(family: str, **changes: Any) -> Any:
    """A transformers config of a family."""
    return getattr(transformers, f"{family}Config")(**(SHAPE | FAMILIES.get(family, {}) | changes))


def write_model(folder: Path, family: str = "Qwen2", **changes: Any) -> Path:
    """Save a random model of a family, with a tokenizer; the same arguments give the same weights."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(make_config(family, **changes))
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.self_attn.k_proj.bias is not None:
                layer.self_attn.k_proj.bias[::7] += 5.0  # a key outlier, as Qwen2.5 has
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model_path() / name, folder / name)
    return folder
