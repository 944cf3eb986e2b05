"""Shape and digest of a config.json, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.errors import DataError
from kvtuner_search.profile.model_config import config_digest, model_info, read_config

OLD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def test_the_shape() -> None:
    info = model_info(OLD, "config.json", "org/model", "abc")
    assert (info.id, info.revision, info.architecture) == ("org/model", "abc", "LlamaForCausalLM")
    assert (info.num_layers, info.num_attention_heads, info.num_kv_heads, info.head_dim) == (32, 32, 8, 128)
    assert info.config_digest == config_digest(OLD)


def test_missing_kv_heads_are_the_attention_heads_and_head_dim_is_a_share_of_the_hidden_size() -> None:
    info = model_info(without(OLD, "num_key_value_heads"), "config.json")
    assert info.num_kv_heads == 32
    assert info.config_digest == config_digest({**OLD, "num_key_value_heads": 32})
    assert config_digest({**OLD, "head_dim": 128}) == config_digest(OLD)
    assert model_info({**OLD, "head_dim": 64}, "config.json").head_dim == 64


def test_old_and_new_spelling_of_rope_give_one_digest() -> None:
    new = without(OLD, "rope_theta", "rope_scaling") | {
        "rope_parameters": {**OLD["rope_scaling"], "rope_theta": 500000}
    }
    assert config_digest(new) == config_digest(OLD)
    older = OLD | {"rope_scaling": {**without(OLD["rope_scaling"], "rope_type"), "type": "llama3"}}
    assert config_digest(older) == config_digest(OLD)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "gemma3_text", "phi3", "qwen3"])
def test_saving_with_transformers_keeps_the_digest(family: str) -> None:
    """The real library rewrites old files; profiles must not be orphaned by that."""
    from transformers import AutoConfig

    flat: dict[str, Any] = {
        "architectures": ["AnyForCausalLM"],
        "model_type": family,
        "hidden_size": 512,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    }
    if family == "qwen2":
        flat |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 3}
    if family == "llama":
        flat |= {"rope_scaling": dict(OLD["rope_scaling"])}  # the library writes into it
    if family == "gemma3_text":
        flat |= {"rope_local_base_freq": 10000.0, "sliding_window": 512, "query_pre_attn_scalar": 64}
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        flat |= {"layer_types": kinds}
    saved = json.loads(AutoConfig.for_model(**flat).to_json_string(use_diff=False))
    defaults = {
        key: saved[key] for key in ("attention_bias", "attn_logit_softcapping") if key in saved and key not in flat
    }  # a file that leaves a default out is another file: the library's defaults may change
    assert config_digest(saved) == config_digest(flat | defaults)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 33),
        ("num_key_value_heads", 4),
        ("rope_theta", 10000.0),
        ("architectures", ["OtherForCausalLM"]),
        ("sliding_window", 4096),
        ("attention_bias", True),
        ("head_dim", 64),
    ],
)
def test_what_attention_depends_on_changes_the_digest(name: str, value: object) -> None:
    assert config_digest({**OLD, name: value}) != config_digest(OLD)


@pytest.mark.parametrize(
    ("name", "value"), [("max_position_embeddings", 4096), ("torch_dtype", "float16"), ("eos_token_id", 2)]
)
def test_the_rest_does_not(name: str, value: object) -> None:
    assert config_digest({**OLD, name: value}) == config_digest(OLD)


def test_a_scaled_embedding_without_a_pretraining_length_depends_on_the_context() -> None:
    scaled = OLD | {"rope_scaling": without(OLD["rope_scaling"], "original_max_position_embeddings")}
    assert config_digest(scaled) != config_digest(scaled | {"max_position_embeddings": 4096})


def test_an_unused_window_does_not_count() -> None:
    window = {"sliding_window": 4096, "max_window_layers": 32}
    assert config_digest(OLD | window | {"use_sliding_window": False}) == config_digest(OLD)
    assert config_digest(OLD | window | {"use_sliding_window": True}) == config_digest(OLD), "no layer lies beyond"
    assert config_digest(OLD | window | {"max_window_layers": 8}) != config_digest(OLD)


def test_a_multimodal_model_is_its_text_model() -> None:
    nested = {"architectures": OLD["architectures"], "text_config": without(OLD, "architectures"), "vision_config": {}}
    assert model_info(nested, "config.json") == model_info(OLD, "config.json")


def test_folder_and_file_are_alike_and_name_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLD | {"_name_or_path": "C:/Users/someone/private"}))
    assert read_config(folder) == read_config(folder / "config.json")
    assert read_config(folder).id == "my-model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers=None is not a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a positive integer"),
        ({"architectures": [], "model_type": "unheard-of"}, "names no class"),
        ({"num_attention_heads": 30}, "does not split"),
        ({"num_key_value_heads": "8"}, "num_kv_heads"),
        ({"num_hidden_layers": 5000}, "num_layers"),
    ],
)
def test_what_cannot_be_described_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD | change))
    with pytest.raises(DataError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '"x"', ""])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError):
        read_config(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_config(tmp_path / "missing")
