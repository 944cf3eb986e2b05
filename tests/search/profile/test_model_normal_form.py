"""One normal form: a config.json as published, with fields left out, and as transformers saves it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, NotComparableError
from kvtuner_search.profile.canonical import canonical_json, load
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.compare import compare
from kvtuner_search.profile.model_config import (
    config_digest,
    layer_kinds,
    model_info,
    name_of,
    normal_form,
    positions,
    read_config,
)
from kvtuner_search.profile.model_families import FAMILIES, spelled_out
from kvtuner_search.profile.model_support import unsupported
from kvtuner_search.profile.schema import Profile
from tests.search.profile_factory import profile, write

# config.json of published models, with the fields that matter here
PUBLISHED: dict[str, dict[str, Any]] = {
    "pythia": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8,
        "num_hidden_layers": 6, "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25, "vocab_size": 50304,
        "intermediate_size": 2048, "tie_word_embeddings": False, "use_parallel_residual": True,
    },
    "phi-3.5": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32,
        "num_key_value_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 131072, "sliding_window": 262144,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "attention_bias": False,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28,
    },
    "qwen2 without a word on windows": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1024, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_hidden_layers": 24, "max_position_embeddings": 32768, "sliding_window": 16384,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_size": 2048, "num_attention_heads": 8,
        "num_key_value_heads": 1, "num_hidden_layers": 18, "max_position_embeddings": 8192,
    },
    "phi-2": {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_size": 2560, "num_attention_heads": 32,
        "num_hidden_layers": 32, "max_position_embeddings": 2048,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 40, "max_position_embeddings": 4096, "attention_multiplier": 0.015625,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    },
    "opt": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 768, "num_attention_heads": 12,
        "num_hidden_layers": 12, "max_position_embeddings": 2048, "ffn_dim": 3072, "word_embed_proj_dim": 768,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 2048, "num_attention_heads": 16,
        "num_hidden_layers": 36, "max_position_embeddings": 65536, "rope_theta": 5000000.0,
    },
    "llama 3.1": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
}  # fmt: skip


def saved(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers writes for it, every default included."""
    from transformers import AutoConfig

    copy = json.loads(json.dumps(config))  # the library writes into what it is given
    content: dict[str, Any] = json.loads(AutoConfig.for_model(**copy).to_json_string(use_diff=False))
    return content


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_and_saved_again_are_one_model(name: str) -> None:
    published = PUBLISHED[name]
    again = saved(published)
    assert normal_form(published) == normal_form(again)
    assert model_info(published, "a") == model_info(again, "a")
    assert model_info({**published, "architectures": None}, "a") == model_info(published, "a")
    assert model_info({k: v for k, v in published.items() if k != "architectures"}, "a") == model_info(published, "a")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_are_the_librarys(kind: str) -> None:
    """Every field of the table is what transformers takes it to be where config.json leaves it out."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(kind)
    content = json.loads(config.to_json_string(use_diff=False))
    family = FAMILIES[kind]
    assert family.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    assert (family.defaults.get("attention_bias") or False) == (content.get("attention_bias") or False)
    for name in ("attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier"):
        assert family.defaults.get(name) == content.get(name), name
    if content.get("use_sliding_window") is not None:
        assert family.defaults["use_sliding_window"] is content["use_sliding_window"]
    elif "sliding_window" in content:
        assert family.defaults.get("sliding_window") == content["sliding_window"]
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if name in family.defaults:
            assert family.defaults[name] == getattr(config, name), name
    ropes = content.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    if "rope_theta" in rope and kind != "gemma3_text":  # whose layers have two
        assert family.defaults.get("rope_theta", 10000) == rope["rope_theta"]
        assert family.defaults.get("partial_rotary_factor", 1) == rope.get("partial_rotary_factor", 1)


@pytest.mark.parametrize(
    ("window", "windows"),
    [(131071, True), (131072, False), (262144, False), (None, False), (2047, True)],
)
def test_a_window_as_long_as_the_positions_is_full_attention(window: int | None, windows: bool) -> None:
    config = PUBLISHED["phi-3.5"] | {"sliding_window": window}
    assert unsupported(config) is None
    assert [str(kind) for kind in layer_kinds(config) or ()] == [f"sliding:{window}" if windows else "full"] * 32
    assert ("window" in normal_form(config)) is windows
    assert (config_digest(config) == config_digest(PUBLISHED["phi-3.5"] | {"sliding_window": None})) is not windows


def test_layers_that_slide_in_a_window_as_long_as_the_positions_are_full() -> None:
    config = PUBLISHED["mistral"] | {"layer_types": ["sliding_attention"] * 32}
    assert model_info(config | {"sliding_window": 32768}, "it").layer_kinds is None
    assert model_info(config | {"sliding_window": 32767}, "it").layer_kinds == ["sliding:32767"] * 32
    assert "has sliding_window=null, but layer 0 of model type 'ministral'" in str(
        unsupported(config | {"sliding_window": None})
    )


def test_a_scaled_embedding_reaches_further_than_its_positions() -> None:
    yarn = PUBLISHED["qwen2.5"] | {
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    }
    assert positions(yarn) == (32768, 131072)
    assert positions(PUBLISHED["llama 3.1"]) == (131072, 131072)
    assert positions(PUBLISHED["gpt2"]) == (1024, 1024)
    assert positions({}) == (None, None)
    slides = yarn | {"use_sliding_window": True, "max_window_layers": 0}
    assert model_info(slides | {"sliding_window": 65536}, "it").layer_kinds == ["sliding:65536"] * 28
    assert model_info(slides | {"sliding_window": 131072}, "it").layer_kinds is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 64}, "attends with ALiBi"),
        ({"model_type": "mpt", "n_layers": 2, "n_heads": 2, "d_model": 64}, "attends with ALiBi.*'mpt'"),
        ({"model_type": "falcon"}, "computes attention in classes of its own"),
        ({"model_type": "custom", "alibi": True}, "attends with ALiBi.*'custom'"),
        ({"model_type": "mamba2"}, "keep a state instead of keys and values"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "q_lora_rank": 1536}, r"MLA \(kv_lora_rank=512"),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, "layers of several kinds"),
        ({"model_type": "x", "layer_types": ["linear_attention", "full_attention"]}, "layer 0 .* is linear_attention"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window=null, but layer 0 of model type 'gemma2' is sliding_attention"),
        ({"model_type": "llama", "sliding_window": 512, "max_position_embeddings": 2048}, "sliding_window=512, which the class of model type 'llama' does not apply"),
        ({"model_type": "moshi", "sliding_window": 512, "max_position_embeddings": 2048}, "which the class of model type 'moshi' does not apply"),
        ({"model_type": "llama", "attention_chunk_size": 512}, "attention_chunk_size=512, which the class of model type 'llama' does not apply"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends to later tokens too"),
        ({"model_type": "doge"}, "computes from values"),
        ({"model_type": "laguna", "num_attention_heads_per_layer": [48, 32]}, "other numbers of heads"),
        ({"model_type": "mimo_v2_flash"}, "twice the KV heads, and values with heads of other sizes"),
        ({"model_type": "minimax_m3_vl_text", "sparse_attention_config": {"sparse_topk_blocks": 16}}, "sparse_attention_config"),
        ({"model_type": "dots3_note_text"}, "several kinds, by a rule of its own"),
        ({"model_type": "deepseek_v4"}, "compress keys and values"),
        ({"model_type": "gemma3n_text"}, "share keys and values"),
        ({"model_type": "gemma4_text"}, "share keys and values"),
    ],
)  # fmt: skip
def test_the_gate_names_what_it_refuses(config: dict[str, Any], says: str) -> None:
    import re

    assert re.search(says, str(unsupported(config))), unsupported(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_supported_passes_the_gate(name: str) -> None:
    assert unsupported(PUBLISHED[name]) is None


def test_a_name_that_older_families_give_a_field_is_understood() -> None:
    assert spelled_out({"model_type": "gpt2", "n_layer": 12})["num_hidden_layers"] == 12
    assert spelled_out({"model_type": "gpt2", "n_layer": 12, "num_hidden_layers": 6})["num_hidden_layers"] == 6
    assert spelled_out({"model_type": ["x"], "rotary_pct": 0.5})["partial_rotary_factor"] == 0.5


# mismatches


def sealed(config: dict[str, Any], fields: bool) -> Profile:
    """A profile of the model, with the fields of its config or with the digest alone; its layers do not matter here."""
    info = model_info(config, "config.json", "m")
    if not fields:
        info = info.model_copy(update={"config": None})
    made = profile("16/16")
    return made.model_copy(
        update={"model": made.model.model_copy(update=info.model_dump(exclude={"id"}) | {"config": info.config})}
    )


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2.5", {"rope_theta": 10000.0}, r"rope_theta \(1000000 there, 10000 here\)"),
    ("qwen2.5", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling\.factor \(absent there, 4 here\)"),
    ("qwen2.5", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 7}, r"sliding_window \(absent there, 4096 here\)"),
    ("qwen2.5", {"attention_bias": True}, r"attention_bias \(absent there, true here\)"),
    ("pythia", {"rotary_pct": 0.5}, r"partial_rotary_factor \(0\.25 there, 0\.5 here\)"),
    ("pythia", {"attention_bias": False}, r"attention_bias \(true there, absent here\)"),
    ("llama 3.1", {"rope_theta": 1000000.0}, r"rope_theta \(500000 there, 1000000 here\)"),
    ("granite", {"attention_multiplier": None, "rope_theta": 500000}, r"rope_theta \(10000 there, 500000 here\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "says"), CHANGES)
def test_a_mismatch_names_the_fields_that_differ(name: str, change: dict[str, Any], says: str) -> None:
    stored = sealed(PUBLISHED[name], fields=True)
    check_model(stored, model_info(PUBLISHED[name], "same", "m"), "same")
    with pytest.raises(NotComparableError, match=says) as raised:
        check_model(stored, model_info(PUBLISHED[name] | change, "other", "m"), "other")
    assert "config_digest=" in str(raised.value)


@pytest.mark.parametrize(("name", "change", "says"), CHANGES[:6])
def test_of_a_profile_with_a_digest_alone_the_usual_values_are_tried(
    name: str, change: dict[str, Any], says: str
) -> None:
    stored = sealed(PUBLISHED[name], fields=False)
    with pytest.raises(NotComparableError, match=says):
        check_model(stored, model_info(PUBLISHED[name] | change, "other", "m"), "other")


def test_what_cannot_be_found_out_is_said_to_be_unknown() -> None:
    stored = sealed(PUBLISHED["qwen2.5"] | {"rope_theta": 12345.0, "attention_bias": True}, fields=False)
    odd = PUBLISHED["qwen2.5"] | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    with pytest.raises(NotComparableError, match="which of its fields differ is not stored"):
        check_model(stored, model_info(odd, "other", "m"), "other")


def test_diff_names_them_too() -> None:
    old = sealed(PUBLISHED["qwen2.5"], fields=True)
    new = sealed(PUBLISHED["qwen2.5"] | {"rope_theta": 10000.0}, fields=True)
    [finding] = compare(old, new).findings
    assert finding.where == "model.config_digest"
    assert "rope_theta (1000000 old, 10000 new)" in finding.message


def test_shapes_that_differ_are_all_named() -> None:
    stored = sealed(PUBLISHED["qwen2.5"], fields=True)
    with pytest.raises(NotComparableError, match=r"num_layers=28, other has 12; .*num_kv_heads=4, other has 2"):
        check_model(
            stored,
            model_info(PUBLISHED["qwen2.5"] | {"num_hidden_layers": 12, "num_key_value_heads": 2}, "other", "m"),
            "other",
        )


BEFORE: dict[str, tuple[str, str]] = {  # digests by commit fcacae5: of the file, as import took it; of what transformers makes of it, as calibrate did
    'pythia': ('sha256:e2db5ae7249089e4552e1cf28320081d5c830d69f69c7c1cbd37cf617d3d7b25', 'sha256:d8973cd4508d9c142723838cbc28863fbc34c27a4c37b73862dda025e8b69d59'),
    'phi-3.5': ('sha256:d3dc3d56a9b08c6107e6ebc52964abca4913a034687ad443dc5e4be745f76ead', 'sha256:d3dc3d56a9b08c6107e6ebc52964abca4913a034687ad443dc5e4be745f76ead'),
    'qwen2.5': ('sha256:6a64f8d9ee301033d2791003a63ab1a136acf35ebb0901c2d34a866b0c6acf30', 'sha256:6a64f8d9ee301033d2791003a63ab1a136acf35ebb0901c2d34a866b0c6acf30'),
    'qwen2 without a word on windows': ('sha256:366e3360e003871a6f0a84ed52efc380a97784a8daa77c4bddc8167a27672d8a', 'sha256:9c94de515f768d432b6964566f737c6fb066f213aac0801fe9d755f84ad15ab0'),
    'gemma': ('sha256:18446b5425be0011f1babd95e91bf621c60ef47d6eb9dbea80d6a006240cd761', 'sha256:18446b5425be0011f1babd95e91bf621c60ef47d6eb9dbea80d6a006240cd761'),
    'phi-2': ('sha256:129b06ae3a9d3fd37f31d8a9c90b9132116fefe2fd156f53ca455311781a684b', 'sha256:fdbe5c44654231961b0fd721cc2c0c0ef153d8e5a9e35b15ec896da67b041107'),
    'mistral': ('sha256:cf1529fcd77970e5458f08b4a556cbb1abf0e8ffed9bd2903a097158e6b274fc', 'sha256:8eb720027238315feabc2fc9f662755dafcab21b532aedc112e7d78cc34a2639'),
    'granite': ('sha256:fe3330f5f49e74084a50a482095017ba92326e28678acef7d85b06d7a3e1f75e', 'sha256:fe3330f5f49e74084a50a482095017ba92326e28678acef7d85b06d7a3e1f75e'),
    'opt': ('sha256:215191a4f8c6ad1a7fb6633a9093e536c19ee89615c5d30c41e7ad955f485785', 'sha256:215191a4f8c6ad1a7fb6633a9093e536c19ee89615c5d30c41e7ad955f485785'),
    'smollm3': ('sha256:a775309d86bcd487aaa096e03f617f35d40f621388ac1e0f85ab3f37fe02a3e3', 'sha256:252f20461c8768758117d0d6b5b5cc1b8b3f274aeb3813bcefb59794a19adba4'),
    'llama 3.1': ('sha256:da1a32441026cc2ebd6e0faa5460ebc0f36b75d8ad37d0a339661d64f142e79b', 'sha256:da1a32441026cc2ebd6e0faa5460ebc0f36b75d8ad37d0a339661d64f142e79b'),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_profiles_of_before_fit_the_files_that_they_were_made_for(name: str) -> None:
    imported, calibrated = BEFORE[name]
    info = model_info(PUBLISHED[name], "config.json")
    assert info.has_digest(imported)
    assert info.has_digest(calibrated)
    if name != "phi-3.5":  # which could not be calibrated
        assert info.config_digest == calibrated
    assert not info.has_digest("sha256:" + "0" * 64)
    assert not model_info(PUBLISHED[name] | {"rope_theta": 1234.0}, "config.json").has_digest(imported)


def test_a_profile_without_the_field_keeps_its_form(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", "16/16")
    assert "config" not in json.loads(path.read_text())["model"]
    assert canonical_json(load(path).model_dump(mode="json")) == path.read_text()


# ids


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/" + "a" * 40, ("Qwen/Qwen2.5-7B-Instruct", "a" * 40)),
        ("hub/models--gpt2/snapshots/" + "0123456789" * 4, ("gpt2", "0123456789" * 4)),
        ("hub/models--a--b/snapshots/main", ("main", None)),
        ("hub/datasets--a--b/snapshots/" + "a" * 40, ("a" * 40, None)),
        ("plain/my-model", ("my-model", None)),
    ],
)
def test_ids_and_revisions_of_hub_snapshots(tmp_path: Path, path: str, expected: tuple[str, str | None]) -> None:
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED["qwen2.5"]))
    assert name_of(folder) == expected
    for place in (folder, folder / "config.json"):
        info = read_config(place)
        assert (info.id, info.revision) == expected
    assert read_config(folder, "mine", "main").revision == "main"
    assert read_config(folder, "mine").id == "mine"


def test_a_folder_with_an_adapter_alone_names_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(DataError, match=r"adapter of org/base"):
        read_config(tmp_path)
    path = write(tmp_path / "p.json", "16/16")
    assert run(["check", str(path), "--model", str(tmp_path)]) == 3
    assert "merge it into its base model" in capsys.readouterr().err


def test_other_kinds_of_layers_are_another_model() -> None:
    plain = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
    }
    full = plain | {"layer_types": ["full_attention", "full_attention"]}
    assert normal_form(full) == normal_form(plain)
    for more in (
        {"layer_types": ["linear_attention", "full_attention"]},
        {"kv_lora_rank": 512},
        {"alibi": True},
        {"is_encoder_decoder": True},
    ):
        assert normal_form(plain | more) != normal_form(plain)
    assert normal_form(plain | {"architectures": []}) == normal_form(plain)
