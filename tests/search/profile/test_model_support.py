"""One gate of what is supported: every command that is told a model's config.json asks it, and gives the same reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.profile.model_support import check_supported, read_supported, unsupported
from kvtuner_search.serving.sglang.model import served_model
from tests.search.profile_factory import write

SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 64,
    "max_position_embeddings": 8192, "vocab_size": 1000, "intermediate_size": 64,
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alibi": ({"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 4}, "attends with ALiBi"),
    "own attention": ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "in classes of its own"),
    "latent": ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "kv_lora_rank": 512}, "MLA (kv_lora_rank=512"),
    "window": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 0}, "has sliding_window=0, but layer 0"),
    "negative": ({"architectures": ["X"], "model_type": "gemma2", "sliding_window": -1}, "has sliding_window=-1, but layer 0"),
    "text": ({"architectures": ["X"], "model_type": "phi3", "sliding_window": "4096"}, 'has sliding_window="4096", but layer 0'),
    "no window": ({"architectures": ["X"], "model_type": "olmo3", "sliding_window": None}, "has sliding_window=null, but layer 0"),
    "no chunks": ({"architectures": ["X"], "model_type": "x", "layer_types": ["full_attention", "chunked_attention"]}, "has attention_chunk_size=null, but layer 1"),
    "short": ({"architectures": ["X"], "model_type": "x", "layer_types": ["full_attention"]}, "has 1 layer_types for 2 layers"),
    "pattern": ({"architectures": ["X"], "model_type": "cohere2", "sliding_window_pattern": 0}, "has sliding_window_pattern=0"),
    "not applied": ({"architectures": ["X"], "model_type": "llama", "sliding_window": 512}, "which the class of model type 'llama' does not apply"),
    "shared": ({"architectures": ["X"], "model_type": "gemma3n_text"}, "share keys and values"),
    "cross": ({"architectures": ["X"], "model_type": "mllama"}, "cross-attention"),
    "encoder": ({"architectures": ["X"], "model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends to later tokens too"),
    "state": ({"architectures": ["JambaForCausalLM"], "model_type": "jamba"}, "keep a state instead of keys and values"),
    "hybrid": ({"architectures": ["X"], "model_type": "qwen3_next", "full_attention_interval": 4}, "layers of several kinds"),
    "encoder-decoder": ({"architectures": ["T5Model"], "model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
    "nested": ({"architectures": ["X"], "model_type": "x", "text_config": SIZES | {"model_type": "x_text", "alibi": True}}, "ALiBi"),
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A folder with this config.json."""

    def made(config: dict[str, Any]) -> Path:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text(json.dumps(SIZES | config))
        return tmp_path / "m"

    return made


@pytest.mark.parametrize("kind", REFUSED)
def test_import_and_check_refuse_what_calibrate_and_serve_refuse(
    model: Callable[[dict[str, Any]], Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, says = REFUSED[kind]
    folder = model(config)
    profile = write(tmp_path / "p.json", "4-g64-asym/4-g64-asym", 2)
    (tmp_path / "k.yaml").write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}\n")
    commands = {
        "import": ["import", str(tmp_path / "k.yaml"), "--from", "kvtuner", "--scheme", "pertoken", "--allow-lossy", "-o", str(tmp_path / "new.json")],
        "check": ["check", str(profile), str(profile)],
    }  # fmt: skip
    for path in (folder, folder / "config.json"):
        for name, arguments in commands.items():
            assert run([*arguments, "--model", str(path)]) == 3, name
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1), name
            assert says in err, name
            assert str(folder / "config.json") in err, name
    assert not (tmp_path / "new.json").exists(), "nothing is written for a model that nothing can be written for"
    assert run(["check", str(profile), "--model", str(folder), "--json"]) == 3
    assert run(["serve", "--profile", str(profile), "--model-path", str(folder), "--dry-run"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("kind", REFUSED)
def test_the_reason_is_one_everywhere(model: Callable[[dict[str, Any]], Path], kind: str) -> None:
    config, says = REFUSED[kind]
    folder = model(config)
    reason = str(unsupported(SIZES | config))
    assert says in reason
    with pytest.raises(DataError) as calibrated:
        load_model(ModelOptions(source=str(folder)))
    with pytest.raises(UsageError) as served:  # serve, validate and bench with a profile
        served_model(str(folder))
    with pytest.raises(DataError) as read:  # check and import
        read_supported(folder)
    for raised in (calibrated, served, read):
        assert reason in str(raised.value)


def test_validate_and_bench_ask_it_before_they_start_anything(
    model: Callable[[dict[str, Any]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(REFUSED["latent"][0])
    profile = write(tmp_path / "p.json", "4-g64-asym/4-g64-asym", 2)
    common = ["--profile", str(profile), "--url", "http://127.0.0.1:9"]
    assert run(["bench", *common, "--model-path", str(folder), "--folder", str(tmp_path / "b"), "--hardware", "x,bandwidth=1e12,flops=1e14"]) == 2  # fmt: skip
    assert "MLA (kv_lora_rank=512" in capsys.readouterr().err
    assert run(["validate", *common, "--model-path", str(folder), "--baseline-url", "http://127.0.0.1:9", "--folder", str(tmp_path / "v")]) == 2  # fmt: skip
    assert "MLA (kv_lora_rank=512" in capsys.readouterr().err


def test_what_is_supported_is_still_imported_and_checked(
    model: Callable[[dict[str, Any]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    (tmp_path / "k.yaml").write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}\n")
    new = str(tmp_path / "new.json")
    assert run(["import", str(tmp_path / "k.yaml"), "--from", "kvtuner", "--scheme", "pertoken", "--model", str(folder), "-o", new]) == 0  # fmt: skip
    assert run(["check", new, "--model", str(folder)]) == 0
    check_supported(SIZES | {"model_type": "llama"}, "it")
