"""What lies in profiles/ and docs/ is what the scripts write, and says nothing that was not measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.model_config import read_config
from kvtuner_search.profile.presets import published
from kvtuner_search.profile.rules import rules_markdown
from kvtuner_search.profile.schema import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[3]
QWEN = sorted((ROOT / "profiles" / "qwen2.5-7b").glob("*.json"))


def regenerate(script: str, folder: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / script, folder], check=True, timeout=60)


def test_the_schema_is_what_the_script_writes(tmp_path: Path) -> None:
    regenerate("schema", tmp_path)
    name = f"v{SCHEMA_VERSION}.json"
    assert (tmp_path / "schema" / name).read_bytes() == (ROOT / "profiles" / "schema" / name).read_bytes()


def test_published_schemas_of_the_past_stay() -> None:
    """A schema that was published is never rewritten, so that files of its version can still be validated."""
    published = hashlib.sha256((ROOT / "profiles" / "schema" / "v1.json").read_bytes()).hexdigest()
    assert published == "6b578ac58ede8d78b29100e093c4580db86253b694426f8fb426dffad3315592"
    past = [ROOT / "profiles" / "schema" / f"v{version}.json" for version in range(1, SCHEMA_VERSION)]
    for path in past:
        stored = json.loads((Path(__file__).parent / "stored" / path.name).read_text())
        jsonschema.Draft202012Validator(json.loads(path.read_text())).validate(stored)


def test_every_field_of_the_schema_is_described() -> None:
    schema = json.loads((ROOT / "profiles" / "schema" / f"v{SCHEMA_VERSION}.json").read_text())
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for name, field in part["properties"].items():
            assert field.get("description"), name


def test_the_profiles_are_what_the_script_writes(tmp_path: Path) -> None:
    regenerate("profiles", tmp_path)
    assert [path.name for path in QWEN] == sorted(path.name for path in tmp_path.iterdir())
    assert len(QWEN) == 10
    for path in QWEN:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_nothing_claims_a_measurement(path: Path) -> None:
    profile = load(path)
    assert profile.quality == []
    assert profile.pareto == []
    assert profile.validation is None
    if "kvtuner" in path.stem:
        assert profile.provenance.origin == "published"
        assert "Published by KVTuner, not validated here." in profile.provenance.notes[0]
    else:
        assert profile.provenance.origin == "uniform"


@pytest.mark.parametrize(
    ("name", "bits"),
    [("16bit", 16), ("kv8", 8.25), ("k8v4", 6.25), ("kv4", 4.25), ("k4v2", 3.25), ("kv2", 2.25)],
)
def test_effective_bits_count_scales_and_minima(name: str, bits: float) -> None:
    profile = load(ROOT / "profiles" / "qwen2.5-7b" / f"qwen2.5-7b-{name}.json")
    assert profile.storage.effective_bits == bits
    assert profile.storage.bytes_per_token == 28 * 2 * 4 * 128 * bits / 8


def test_the_presets_profiles_hold_the_presets() -> None:
    profiles = {path.stem: load(path) for path in QWEN}
    model = profiles["qwen2.5-7b-16bit"].model
    presets = published(model)
    assert len(presets) == 4
    for name, layers in presets:
        stem = "qwen2.5-7b-" + name.rpartition("_pertoken_")[2].lower().replace("_", "-")
        assert profiles[stem].layer_specs() == layers


def test_the_profiles_model_is_qwen(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_config(tmp_path, "Qwen/Qwen2.5-7B-Instruct")
    assert load(QWEN[0]).model == model


def test_the_documented_rules_are_the_rules() -> None:
    text = (ROOT / "docs" / "diff.md").read_text()
    assert text.split("<!-- rules -->\n")[1].split("<!-- /rules -->")[0] == rules_markdown()
