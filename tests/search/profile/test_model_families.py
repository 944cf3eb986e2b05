"""Every decoder that transformers has: its config.json as published and as AutoConfig saves it again are one model, or refused alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvtuner_search.profile.model_config import config_digest, decoder, model_info, normal_form, text_config
from kvtuner_search.profile.model_families import _NESTED, FAMILIES
from kvtuner_search.profile.model_support import unsupported

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 640, "num_attention_heads": 10, "num_hidden_layers": 4, "max_position_embeddings": 2048, "vocab_size": 1000,
}  # fmt: skip
FULL: Final = {"layer_types": ["full_attention"] * 4}
YARN: Final = {"factor": 4.0, "original_max_position_embeddings": 512}
FORMS: Final[dict[str, dict[str, Any]]] = {  # what files say, and leave out
    "sizes": {},
    "more": {"num_key_value_heads": 2, "head_dim": 32, "rope_theta": 20000.0},
    "no window": {"sliding_window": None},
    "a window as long as the positions": {"sliding_window": 2048, "num_key_value_heads": 5},
    "windows, but in no layer": {"sliding_window": 512, **FULL},
    "old scaling": {"rope_theta": 5000.0, "rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 4096},
    "new scaling": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000, **YARN}, "sliding_window": 4096},
}


def again(config: dict[str, Any], folder: Path) -> list[dict[str, Any]] | None:
    """What transformers saves for a config.json, with what it leaves out filled in too; None if it does not read it."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read = AutoConfig.from_pretrained(folder)
        read.save_pretrained(folder / "saved")
    except Exception:  # of the library, which refuses many combinations
        return None
    saved = json.loads((folder / "saved" / "config.json").read_text())
    return [saved, json.loads(read.to_json_string(use_diff=False))]


def config_of(kind: str, form: str) -> dict[str, Any]:
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    config: dict[str, Any] = {
        "architectures": [classes if isinstance(classes, str) else classes[0]],
        "model_type": kind,
    }
    if kind in _NESTED:
        return config | {"text_config": SIZES | FORMS[form]}
    return config | SIZES | FORMS[form]


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_what_autoconfig_saves_is_the_same_model_or_refused_alike(kind: str, tmp_path: Path) -> None:
    for form in FORMS:
        config = config_of(kind, form)
        for other in again(config, tmp_path) or ():
            refused = unsupported(config)
            assert (refused is None) is (unsupported(other) is None), (form, refused, unsupported(other))
            if refused is None:
                assert normal_form(other) == normal_form(config), form
                assert config_digest(other) == config_digest(config), form


@pytest.mark.parametrize(("kind", "theta"), [("gemma3_text", 1000000), ("olmo3", 500000)])
def test_what_lies_beside_the_parts_of_two_embeddings_changes_nothing(kind: str, theta: int, tmp_path: Path) -> None:
    """As in the library, whose model looks up the parts alone."""
    flat = {"rope_type": "yarn", "rope_theta": 5000, **YARN}
    plain = {"architectures": ["X"], "model_type": kind, "sliding_window": 4096} | SIZES
    for rope in (flat, flat | {"full_attention": {"rope_type": "default", "rope_theta": theta}}, {}):
        config = plain | {"rope_parameters": rope}
        assert normal_form(config) == normal_form(plain)
        for other in again(config, tmp_path) or [{}]:
            assert normal_form(other) == normal_form(plain)
    part = plain | {"rope_parameters": flat | {"full_attention": flat}}
    assert normal_form(part)["rope"]["full_attention"]["rope_theta"] == 5000
    for other in again(part, tmp_path) or [{}]:
        assert normal_form(other) == normal_form(part)


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim", "sliding_window"])
@pytest.mark.parametrize("kind", ["fuyu", "persimmon"])
def test_fields_that_a_class_does_not_have_change_nothing(kind: str, field: str, tmp_path: Path) -> None:
    plain = {"architectures": ["X"], "model_type": kind} | SIZES
    for config in [plain | {field: 2}, *(again(plain | {field: 2}, tmp_path) or [{}])]:
        assert normal_form(config) == normal_form(plain)
        assert model_info(config, "it").num_kv_heads == 10


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_read_in_at_least_one_form(kind: str, tmp_path: Path) -> None:
    """What the library reads in no form would hold above, whatever the table says."""
    assert any(again(config_of(kind, form), tmp_path) is not None for form in FORMS)


@pytest.mark.parametrize("kind", _NESTED)
def test_a_nested_part_without_a_type_is_of_the_type_that_the_whole_means(kind: str, tmp_path: Path) -> None:
    config = {"architectures": ["X"], "model_type": kind, "text_config": {**SIZES}}
    [_, full] = again(config, tmp_path) or [{}, {}]
    assert decoder(config)["model_type"] == text_config(full)["model_type"]


def test_a_family_whose_attention_has_a_part_of_its_own_is_read_there(tmp_path: Path) -> None:
    published = {
        "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000, "model_type": ""},
    }  # fmt: skip
    info = model_info(published, "it")
    assert (info.num_attention_heads, info.num_kv_heads, info.head_dim) == (48, 8, 128)
    assert info.config is not None
    assert info.config["rope_theta"] == "500000"
    for other in again(published, tmp_path) or [{}]:
        assert model_info(other, "it") == info


def spelled(value: Any) -> Any:
    """Every whole number as a float, as other programs write them."""
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("kind", [*FAMILIES, "not-known"])
@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_are_the_same_model_however_they_are_spelled(kind: str, form: str) -> None:
    config = {"architectures": ["XForCausalLM"], "model_type": kind} | SIZES | {"num_key_value_heads": 5} | FORMS[form]
    floats = json.loads(json.dumps(spelled(config)))
    assert unsupported(floats) == unsupported(config)
    if unsupported(config) is None:
        assert normal_form(floats) == normal_form(config)
        assert model_info(floats, "it") == model_info(config, "it")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 512), ("max_position_embeddings", 4096), ("rope_theta", 1000000), ("head_dim", 64), ("num_hidden_layers", 4),
     ("num_key_value_heads", 5), ("max_window_layers", 2), ("original_max_position_embeddings", 1024), ("attention_chunk_size", 128)],
)  # fmt: skip
def test_one_number_spelled_as_a_float(field: str, value: int) -> None:
    whole = (
        {"architectures": ["X"], "model_type": "x"}
        | SIZES
        | {"rope_scaling": {"type": "yarn", "factor": 2}}
        | {field: value}
    )
    other = whole | {field: float(value)}
    assert config_digest(other) == config_digest(whole)
    assert unsupported(other) == unsupported(whole)
    assert config_digest(whole | {field: value + 0.5}) != config_digest(whole) or field.startswith("max_")
