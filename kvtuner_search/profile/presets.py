"""Settings that others published, as layer specs: KVTuner's per-token presets. Nothing here was validated by this project.

The figures are from KVTuner (Li et al., ICML 2025), released calibration presets, commit babe775. Its per-token scheme is
asymmetric with one scale and minimum over the whole head_dim and no residual window, which is ``BITS-gHEAD_DIM-asym`` here.
Its KIVI presets are left out: they need per-channel keys and a residual window, which no layout version stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from kvtuner_kernels.layout import LayerSpec, TensorSpec

SOURCE: Final = "KVTuner (ICML 2025), released calibration presets, commit babe775"


class ModelShape(Protocol):
    """The fields that a preset is matched by; ``schema.ModelInfo`` has them."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class _Published:
    """The presets of one model."""

    model_id: str
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    presets: dict[str, str]  # name -> for each layer a digit of key bits and a digit of value bits


_PUBLISHED: Final = (
    _Published(
        "meta-llama/Llama-3.1-8B-Instruct",
        "LlamaForCausalLM",
        32,
        8,
        128,
        {
            "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner4_0": "48 42 42 42 42 44 44 42 44 44 44 44 44 42 44 44 44 44 42 42 44 44 42 42 42 42 44 42 44 42 44 42",
            "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner4_1": "88 42 42 42 42 84 84 42 44 44 44 44 84 42 44 44 44 44 42 22 44 84 22 42 42 42 84 42 84 42 44 42",
            "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner6_0": "42 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 22 84 84 22 88 88 84 84 84 84 88 84 84",
            "Meta-Llama-3.1-8B-Instruct_pertoken_KVTuner6_1": "44 84 84 84 84 44 44 84 84 84 84 84 44 84 84 84 84 84 84 44 84 44 44 84 84 84 44 84 44 84 84 84",
        },
    ),
    _Published(
        "mistralai/Mistral-7B-Instruct-v0.3",
        "MistralForCausalLM",
        32,
        8,
        128,
        {
            "Mistral-7B-Instruct-v0.3_pertoken_KVTuner4_0": "44 84 84 84 84 44 44 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 84 42 42 42 42 42 42 42 84",
            "Mistral-7B-Instruct-v0.3_pertoken_KVTuner4_1": "48 42 42 84 84 88 88 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 84 42 42 42 42 42 42 42 84",
            "Mistral-7B-Instruct-v0.3_pertoken_KVTuner6_0": "24 84 84 44 44 44 44 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 44 84 84 84 84 84 84 84 44",
            "Mistral-7B-Instruct-v0.3_pertoken_KVTuner6_1": "48 42 42 44 44 42 42 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 84 44 84 84 84 84 84 84 84 44",
        },
    ),
    _Published(
        "Qwen/Qwen2.5-3B-Instruct",
        "Qwen2ForCausalLM",
        36,
        2,
        128,
        {
            "Qwen2.5-3B-Instruct_pertoken_KVTuner4_0": "84 42 42 42 42 42 42 42 42 42 44 42 42 42 42 42 42 42 88 44 42 42 42 42 44 42 44 88 42 88 42 42 42 44 42 42",
            "Qwen2.5-3B-Instruct_pertoken_KVTuner4_1": "82 42 42 42 42 42 42 44 42 42 44 44 42 42 42 42 44 84 84 44 42 44 44 42 44 44 44 84 44 84 84 84 44 44 84 42",
            "Qwen2.5-3B-Instruct_pertoken_KVTuner6_0": "88 84 42 84 84 84 84 42 84 84 84 42 84 84 42 84 42 84 84 84 84 42 42 42 84 42 84 84 42 84 84 84 42 84 84 42",
            "Qwen2.5-3B-Instruct_pertoken_KVTuner6_1": "84 84 42 84 84 84 84 42 84 84 42 42 84 84 42 84 42 88 88 42 84 84 84 42 42 42 42 88 42 88 88 88 42 42 88 42",
        },
    ),
    _Published(
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen2ForCausalLM",
        28,
        4,
        128,
        {
            "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0": "88 42 42 82 42 42 44 44 42 44 44 44 44 82 44 44 44 44 44 44 44 44 44 44 42 42 44 82",
            "Qwen2.5-7B-Instruct_pertoken_KVTuner4_1": "88 42 42 88 42 42 84 42 42 42 42 42 42 88 42 42 42 42 42 84 42 42 42 42 42 42 42 88",
            "Qwen2.5-7B-Instruct_pertoken_KVTuner6_0": "88 44 44 44 44 44 42 88 22 88 88 88 88 44 44 88 88 88 88 42 44 88 88 88 22 44 88 44",
            "Qwen2.5-7B-Instruct_pertoken_KVTuner6_1": "82 44 44 82 44 44 44 44 84 84 44 44 84 82 84 44 84 84 84 44 84 84 84 44 84 44 84 82",
        },
    ),
)


def published(model: ModelShape) -> list[tuple[str, list[LayerSpec]]]:
    """The published presets that fit a model: (name, one LayerSpec a layer), or none.

    They fit by class, layers, KV heads and head_dim. A preset that was made for another model of the same shape (a base model,
    a fine-tune) is a sensible first trial of a search and no more: its name says which model it was made for.
    """
    shape = (model.architecture, model.num_layers, model.num_kv_heads, model.head_dim)
    return [
        (name, [per_token(int(pair[0]), int(pair[1]), model.head_dim) for pair in digits.split()])
        for known in _PUBLISHED
        if (known.architecture, known.num_layers, known.num_kv_heads, known.head_dim) == shape
        for name, digits in known.presets.items()
    ]


def per_token(key_bits: int, value_bits: int, head_dim: int) -> LayerSpec:
    """The scheme of these presets at the given bits: asymmetric, one group of all ``head_dim`` channels; 16 bits is raw.

    Raises:
        LayoutError: for bits that cannot be stored.
    """
    return LayerSpec(_tensor(key_bits, head_dim), _tensor(value_bits, head_dim))


def _tensor(bits: int, head_dim: int) -> TensorSpec:
    return TensorSpec() if bits == 16 else TensorSpec(bits, head_dim)
