"""The kind of every layer, from config.json alone: what transformers' classes make of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import AutoConfig

from kvtuner_search.profile.kinds import FULL_KIND, LayerKind
from kvtuner_search.profile.model_config import (
    config_digest,
    decoder,
    layer_kinds,
    model_info,
    normal_form,
    positions,
    text_config,
)
from kvtuner_search.profile.model_families import FAMILIES
from kvtuner_search.profile.model_kinds import trouble
from kvtuner_search.profile.model_support import unsupported

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 13, "max_position_embeddings": 100000, "num_key_value_heads": 5,
}  # fmt: skip
FORMS: Final[dict[str, dict[str, Any]]] = {
    "as usual": {},
    "a window": {"sliding_window": 512},
    "no window": {"sliding_window": None},
    "switched on": {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 5},
    "switched on for all": {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0},
    "switched off": {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 5},
    "a pattern": {"sliding_window": 512, "sliding_window_pattern": 3, "global_attn_every_n_layers": 3, "no_rope_layer_interval": 3},
    "a long pattern": {"sliding_window": 512, "sliding_window_pattern": 20, "global_attn_every_n_layers": 20, "no_rope_layer_interval": 20},
    "all full": {"sliding_window": 512, "sliding_window_pattern": 1, "global_attn_every_n_layers": 1, "no_rope_layer_interval": 1},
    "rotary by layer": {"no_rope_layers": [1, 0] * 6 + [1], "use_sliding_window": True, "sliding_window": 512},
    "dense first": {"sliding_window": 512, "first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2},
    "local": {"local_attention": 64, "attention_chunk_size": 128},
    "no chunks": {"attention_chunk_size": None},
    "named": {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"] * 6 + ["full_attention"]},
    "wide": {"sliding_window": 100000, "attention_chunk_size": 100000},
}  # fmt: skip
WINDOWED: Final = (  # families of which at least one form has windows or chunks
    "afmoe", "cohere2", "cohere2_moe", "cwm", "exaone4", "exaone_moe", "flint", "gemma2", "gemma3_text", "gpt_oss", "granite_swa",
    "granitemoe_swa", "kolibri1", "llama4_text", "mellum", "ministral", "mistral", "mixtral", "modernbert-decoder", "olmo3", "phi3",
    "phimoe", "phi4_multimodal", "ministral3", "dots1", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2", "vaultgemma", "laguna",
    "cohere_compass_text",
)  # fmt: skip


def of_the_library(config: dict[str, Any]) -> tuple[LayerKind, ...] | None:
    """What transformers' class says, or would do; None if it refuses the file, or a window is no number."""
    if config["model_type"] == "mistral" and "layer_types" in config:  # as AutoConfig reads a file
        config = config | {"model_type": "ministral"}
    try:
        copy = json.loads(json.dumps(config))
        made: Any = AutoConfig.for_model(**copy).get_text_config()
    except Exception:  # of the library, which refuses many combinations
        return None
    window, chunk, count = getattr(made, "sliding_window", None), getattr(made, "attention_chunk_size", None), 13
    types = getattr(made, "layer_types", None)
    if types is None or config["model_type"] in ("mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2", "phi4_multimodal", "ministral3"):  # fmt: skip
        types = ["sliding_attention" if window else "full_attention"] * count
    kinds = []
    for name in types:
        size = {"sliding_attention": window, "chunked_attention": chunk}.get(name, 0)
        if size is None or (name == "sliding_attention" and size <= 0):
            return None
        wide = size == 0 or size >= (positions(config)[1] or 0)
        kinds.append(FULL_KIND if wide else LayerKind("sliding" if name == "sliding_attention" else "chunked", size))
    return tuple(kinds)


def test_kinds_are_those_of_the_librarys_classes() -> None:
    windowed = set()
    for family in FAMILIES:
        for form, fields in FORMS.items():
            config = {"architectures": ["X"], "model_type": family} | SIZES | fields
            if unsupported(config) is not None:
                continue
            if family not in WINDOWED:
                assert set(layer_kinds(config) or ()) <= {FULL_KIND}, (family, form)
                continue
            expected = of_the_library(config)
            if expected is not None:
                assert layer_kinds(config) == expected, (family, form)
                windowed |= {family} if any(kind.window for kind in expected) else set()
    assert set(WINDOWED) == windowed


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("form", FORMS)
def test_with_and_without_layer_types_is_one_model(family: str, form: str) -> None:
    config = {"architectures": ["X"], "model_type": family} | SIZES | FORMS[form]
    info = layer_kinds(config)
    if of_the_library(config) is None or unsupported(config) is not None or info is None:
        return
    spelled = json.loads(AutoConfig.for_model(**json.loads(json.dumps(config))).to_json_string(use_diff=False))
    spelled["architectures"] = ["X"]
    assert config_digest(spelled) == config_digest(config)
    assert layer_kinds(spelled) == info
    assert ("window" in normal_form(config)) is any(kind.window for kind in info)


SSSSSF: Final = (["sliding_attention"] * 5 + ["full_attention"]) * 3
YARN: Final = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
PUBLISHED: Final[dict[str, tuple[dict[str, Any], str]]] = {  # config.json as published, with the fields that matter here, and its kinds
    "gemma-2-2b": ({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "head_dim": 256, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_hidden_layers": 26, "max_position_embeddings": 8192, "sliding_window": 4096, "rope_theta": 10000.0,
        "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "cache_implementation": "hybrid",
    }, "sliding:4096 full " * 13),
    "gemma-3-270m": ({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640, "head_dim": 256, "num_attention_heads": 4,
        "num_key_value_heads": 1, "num_hidden_layers": 18, "max_position_embeddings": 32768, "sliding_window": 512, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256, "_sliding_window_pattern": 6, "layer_types": SSSSSF,
        "use_bidirectional_attention": False, "attn_logit_softcapping": None, "rope_scaling": None,
    }, ("sliding:512 " * 5 + "full ") * 3),
    "gemma-3-1b": ({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152, "head_dim": 256, "num_attention_heads": 4,
        "num_key_value_heads": 1, "num_hidden_layers": 26, "max_position_embeddings": 32768, "sliding_window": 512, "rope_theta": 1000000,
        "rope_local_base_freq": 10000, "query_pre_attn_scalar": 256, "sliding_window_pattern": 6,
    }, ("sliding:512 " * 5 + "full ") * 4 + "sliding:512 " * 2),
    "gemma-3-4b": ({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    }, ("sliding:1024 " * 5 + "full ") * 5 + "sliding:1024 " * 4),
    "olmo-3-7b": ({
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 65536, "sliding_window": 4096,
        "rope_theta": 500000, "rope_scaling": YARN, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    }, ("sliding:4096 " * 3 + "full ") * 8),
    "gpt-oss-20b": ({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880,
        "initial_context_length": 4096, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 24,
        "max_position_embeddings": 131072, "sliding_window": 128, "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                         "rope_type": "yarn", "truncate": False},
    }, "sliding:128 full " * 12),
    "command-r7b": ({
        "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "max_position_embeddings": 132096, "sliding_window": 4096,
        "sliding_window_pattern": 4, "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "rope_theta": 50000,
    }, ("sliding:4096 " * 3 + "full ") * 8),
    "llama-4-scout": ({
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
                        "num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 48, "max_position_embeddings": 10485760,
                        "no_rope_layers": [], "rope_theta": 500000.0, "attn_temperature_tuning": True, "attention_bias": False,
                        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
    }, ("chunked:8192 " * 3 + "full ") * 12),
    "mistral-7b-v0.1": ({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096,
    }, "sliding:4096 " * 32),
    "phi-3-mini-4k": ({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32,
        "num_key_value_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 4096, "sliding_window": 2047, "rope_theta": 10000.0,
    }, "sliding:2047 " * 32),
    "qwen2 with windows": ({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14,
        "num_key_value_heads": 2, "num_hidden_layers": 24, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21,
    }, "full " * 21 + "sliding:4096 " * 3),
    "exaone-4.0-32b": ({
        "architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "hidden_size": 5120, "num_attention_heads": 40, "head_dim": 128,
        "num_key_value_heads": 8, "num_hidden_layers": 64, "max_position_embeddings": 131072, "rope_theta": 1000000,
        "sliding_window": 4096, "sliding_window_pattern": "LLLG", "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"},
    }, ("sliding:4096 " * 3 + "full ") * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_saved_again_and_without_layer_types_are_one_model(name: str, tmp_path: Path) -> None:
    published, kinds = PUBLISHED[name]
    info = model_info(published, "it")
    assert unsupported(published) is None
    assert info.layer_kinds == kinds.split()
    (tmp_path / "config.json").write_text(json.dumps(published))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    for other in (saved, published):
        without = json.loads(json.dumps(other))
        text_config(without).pop("layer_types", None)
        for form in (other, without):
            assert model_info(form, "it") == info, name
            assert normal_form(form) == normal_form(published)
    assert info.config is not None
    field = "attention_chunk_size" if "chunked" in kinds else "sliding_window"
    assert int(info.config[field]) == next(kind.window for kind in info.kinds if kind.window)
    assert "layer_types" in info.config


def test_other_kinds_and_other_windows_are_other_models() -> None:
    published = PUBLISHED["gemma-3-1b"][0]
    for change in ({"sliding_window": 1024}, {"sliding_window_pattern": 5}, {"layer_types": ["full_attention"] * 26}):
        assert config_digest(published | change) != config_digest(published)
    assert config_digest(published | {"sliding_window": 40000}) == config_digest(published | {"sliding_window": 50000})


def test_what_makes_no_sense_has_no_kinds() -> None:
    plain = {"model_type": "gemma2", "max_position_embeddings": 8192} | {"num_hidden_layers": 4}
    for window in (0, -1, "512", 0.5, True, None, [512]):
        text = decoder(plain | {"sliding_window": window})
        assert layer_kinds(plain | {"sliding_window": window}) is None
        assert f"sliding_window={json.dumps(window)}" in str(trouble(text, None))
    assert "has sliding_window=1000000000, " in str(trouble(decoder(plain | {"sliding_window": 10**9}), None))
    assert layer_kinds({**plain, "num_hidden_layers": 10**9}) is None
    assert layer_kinds({}) is None
    assert positions(plain)[1] == 8192


def test_a_letter_pattern_is_read_as_its_authors_mean_it() -> None:
    config = {"model_type": "exaone4", "num_hidden_layers": 6, "sliding_window": 16, "sliding_window_pattern": "LLG"}
    kinds = "sliding:16 sliding:16 full sliding:16 sliding:16 full"
    assert " ".join(map(str, layer_kinds(config) or ())) == kinds
    assert str((layer_kinds(config | {"num_hidden_layers": 5}) or ())[-1]) == "full", "the last is full in any case"


def test_a_kind_and_its_text() -> None:
    for text in ("full", "sliding:1", "chunked:8192"):
        assert str(LayerKind.parse(text)) == text
    for text in ("", "full:1", "sliding", "sliding:0", "sliding:-1", "sliding:01", "linear:1", "sliding:1\n"):
        with pytest.raises(ValueError, match="no kind of layer"):
            LayerKind.parse(text)
    assert [LayerKind.parse(text).kept(600) for text in ("full", "sliding:512", "chunked:8192")] == [600, 512, 600]
