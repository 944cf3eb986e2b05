"""Architectures beyond the usual: hooked where transformers allows it, refused before weights are read where not; one digest in all commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.models import load, support
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.canonical import load as load_profile
from kvtuner_search.profile.model_config import read_config

TOKENS = torch.arange(7, 47).view(2, 20)
SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD_SIZES: dict[str, Any] = {
    "vocab_size": 8192, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HOOKED: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "OPT, embedding projected": ("OPTForCausalLM", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "GPT2": ("GPT2LMHeadModel", OLD_SIZES | {"n_inner": 96}),
    "GPTJ": ("GPTJForCausalLM", OLD_SIZES | {"n_inner": 96, "rotary_dim": 8}),
    "GPTNeoX": ("GPTNeoXForCausalLM", SIZES | {"intermediate_size": 96}),
    "Phi3, window as long as the positions": (
        "Phi3ForCausalLM",
        SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": 512},
    ),
    "Mistral, window longer than the positions": (
        "MistralForCausalLM",
        SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": 1024, "head_dim": 16},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Falcon": ("FalconForCausalLM", SIZES | {"ffn_hidden_size": 96}, "classes of its own"),
    "Bloom": (
        "BloomForCausalLM",
        {"vocab_size": 8192, "hidden_size": 64, "n_layer": 4, "n_head": 4},
        "attends with ALiBi",
    ),
    "MPT": ("MptForCausalLM", {"vocab_size": 8192, "d_model": 64, "n_layers": 4, "n_heads": 4}, "attends with ALiBi"),
    "GPTNeo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 8192,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global"], 4]],
            "max_position_embeddings": 512,
        },
        "is not a positive integer|cannot be seen",
    ),
}


def write(folder: Path, name: str, sizes: dict[str, Any]) -> Path:
    """Save a random model of a class, with the reference model's tokenizer."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**sizes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model_path() / file, folder / file)
    return folder


@pytest.mark.parametrize("name", HOOKED)
def test_other_architectures_are_hooked(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", *HOOKED[name])
    loaded = load_model(ModelOptions(source=str(folder)))
    runner = Runner(loaded)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = stock(TOKENS).logits
        assert torch.allclose(runner.head(runner.hidden(TOKENS)), expected, atol=1e-4)
    cache = stored_cache([LayerSpec(TensorSpec(2, 16), TensorSpec(2, 16))] * 4, {})
    assert not torch.equal(runner.hidden(TOKENS, cache), runner.hidden(TOKENS)), "the stored cache is not read"
    assert read_config(folder) == loaded.info.model_copy(update={"weights_digest": None})
    if runner.can_resume:
        assert torch.equal(
            runner.hidden_from(2, runner.layer_inputs(TOKENS)[2], cache),
            runner.hidden(
                TOKENS, stored_cache([LayerSpec()] * 2 + [LayerSpec(TensorSpec(2, 16), TensorSpec(2, 16))] * 2, {})
            ),
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_hooked_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind, sizes, says = REFUSED[name]
    folder = write(tmp_path / "model", kind, sizes)
    monkeypatch.setattr(load, "_saved", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(DataError, match=says):
        load_model(ModelOptions(source=str(folder)))
    profile = reference_profile()
    assert run(["serve", "--profile", profile, "--model-path", str(folder), "--dry-run"]) in (2, 3)
    error = capsys.readouterr().err
    assert error.startswith("kvtuner-search: ")
    assert error.count("\n") == 1


def test_attention_that_no_table_names_is_found_out_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate knows no name for it; a model built without weights shows that its attention passes our function by."""
    folder = write(tmp_path / "model", "BloomForCausalLM", REFUSED["Bloom"][1])
    monkeypatch.setattr(load, "check_supported", lambda *_: None)
    monkeypatch.setattr(load, "_saved", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        DataError, match=r"keys and values of model type 'bloom' cannot be seen or replaced|that attend"
    ):
        load_model(ModelOptions(source=str(folder)))


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "phi", "gpt_neox", "gpt2", "opt", "mixtral", "qwen3_moe", "olmoe"]
)
def test_every_layer_is_seen_without_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks into positions and multiplies experts in bfloat16 alone, and neither may end the look in silence."""
    found: list[set[int]] = []
    monkeypatch.setattr(support, "check_seen", lambda seen, *_: found.append(seen))
    more = {"num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": None}
    if kind in ("gpt2", "opt"):
        more = {}
    support.check_hooked(transformers.AutoConfig.for_model(kind, **SIZES, **more), 4, "it")
    assert found == [{0, 1, 2, 3}]


def test_a_layer_that_stops_calling_the_hook_is_noticed(tiny_model: Path) -> None:
    loaded = load_model(ModelOptions(source=str(tiny_model)))
    attention = loaded.model.model.layers[2].self_attn
    attention.config = type(attention.config).from_dict(attention.config.to_dict())
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(DataError, match="layer 2 computes attention in its own code"):
        Runner(loaded)


def reference_profile() -> str:
    return str(Path(__file__).resolve().parents[3] / "profiles" / "reference" / "reference-4.00bit.json")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX in the hub's cache, with config.json as Pythia's was published, but for ``architectures``."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--tiny-pythia" / "snapshots" / COMMIT
    write(folder, *HOOKED["GPTNeoX"])
    published = {
        "model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96,
        "max_position_embeddings": 512, "rotary_emb_base": 10000, "rotary_pct": 0.25, "vocab_size": 8192, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False, "use_parallel_residual": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    return folder


def test_calibrate_check_and_serve_know_a_published_config_alike(
    pythia: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    data = ["--data", "list", "--samples", "2", "--length", "256", "--quiet"]
    more = ["--trials", "3", "--no-bands", "--no-random-baseline", "--target-bits", "8", "--output", str(output)]
    assert run(["calibrate", "--model", str(pythia), *data, *more]) == 0
    made = output / "tiny-pythia-8.00bit.json"  # not called by the snapshot's hash
    profile = load_profile(made)
    assert (profile.model.id, profile.model.revision) == ("org/tiny-pythia", COMMIT)
    assert profile.model.architecture == "GPTNeoXForCausalLM"
    assert profile.model.config is not None
    assert profile.model.config["partial_rotary_factor"] == "0.25"
    assert run(["check", str(made), "--model", str(pythia)]) == 0
    assert run(["serve", "--profile", str(made), "--model-path", str(pythia), "--dry-run"]) == 0
    assert run(["evaluate", "--model", str(pythia), "--profile", str(made), *data]) == 0
    capsys.readouterr()
    other = shutil.copytree(pythia, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"rotary_pct": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    for arguments, code in (
        (["check", str(made), "--model", str(other)], 4),
        (["serve", "--profile", str(made), "--model-path", str(other), "--dry-run"], 4),
        (["evaluate", "--model", str(other), "--profile", str(made), *data], 4),
    ):
        assert run(arguments) == code
        assert "partial_rotary_factor (0.25 there, 0.5 here)" in capsys.readouterr().err
