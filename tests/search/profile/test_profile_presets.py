"""KVTuner's published presets as layer specs."""

from __future__ import annotations

from statistics import mean

import pytest

from kvtuner_search.profile.presets import per_token, published
from kvtuner_search.profile.schema import ModelInfo


def model(architecture: str, layers: int, kv_heads: int, head_dim: int = 128) -> ModelInfo:
    return ModelInfo(
        id="any",
        architecture=architecture,
        num_layers=layers,
        num_attention_heads=kv_heads * 4,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


@pytest.mark.parametrize(
    ("architecture", "layers", "kv_heads", "prefix"),
    [
        ("LlamaForCausalLM", 32, 8, "Meta-Llama-3.1-8B-Instruct"),
        ("MistralForCausalLM", 32, 8, "Mistral-7B-Instruct-v0.3"),
        ("Qwen2ForCausalLM", 36, 2, "Qwen2.5-3B-Instruct"),
        ("Qwen2ForCausalLM", 28, 4, "Qwen2.5-7B-Instruct"),
    ],
)
def test_each_known_model_has_four(architecture: str, layers: int, kv_heads: int, prefix: str) -> None:
    presets = published(model(architecture, layers, kv_heads))
    assert [name for name, _ in presets] == [f"{prefix}_pertoken_KVTuner{v}" for v in ("4_0", "4_1", "6_0", "6_1")]
    for name, specs in presets:
        assert len(specs) == layers
        bits = mean(mean((spec.key.bits, spec.value.bits)) for spec in specs)
        assert bits <= (4 if "KVTuner4" in name else 6), "the name is a bound of the mean code bits"
        assert {(t.group_size, t.symmetric, t.centred, t.clip) for s in specs for t in (s.key, s.value)} == {
            (128, False, False, 1.0)
        }


def test_another_shape_has_none() -> None:
    assert published(model("Qwen2ForCausalLM", 28, 4, 64)) == []
    assert published(model("Qwen2ForCausalLM", 27, 4)) == []
    assert published(model("LlamaForCausalLM", 28, 4)) == []


def test_a_known_row() -> None:
    first = dict(published(model("Qwen2ForCausalLM", 28, 4)))["Qwen2.5-7B-Instruct_pertoken_KVTuner4_0"]
    assert [spec.name for spec in first[:5]] == ["K8V8", "K4V2", "K4V2", "K8V2", "K4V2"]
    assert str(first[27]) == "8-g128-asym/2-g128-asym"


def test_per_token_with_16_bits_is_raw() -> None:
    assert str(per_token(16, 4, 64)) == "16/4-g64-asym"
