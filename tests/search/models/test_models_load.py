"""Loading models, refusing what is not supported, and what the runner relies on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, make_config, write_model
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3NextConfig

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.models.attention import tapped
from kvtuner_search.models.load import ModelOptions, load_model, pick_device
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.model_config import model_info
from kvtuner_search.profile.model_support import check_supported

TOKENS = torch.arange(7, 47).view(2, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_and_gives_the_logits_of_stock_attention(family: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family)
    loaded = load_model(ModelOptions(source=str(folder), dtype="float32"))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    runner = Runner(loaded)
    with torch.inference_mode():
        expected = stock(TOKENS).logits
        got = runner.head(runner.hidden(TOKENS))
    assert torch.allclose(got, expected, atol=1e-4)
    assert loaded.info.architecture == f"{family}ForCausalLM"
    assert (loaded.info.num_layers, loaded.info.num_kv_heads, loaded.info.id) == (4, 2, "model")
    assert loaded.info.weights_digest is not None
    assert runner.can_resume


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_the_middle_is_the_same_pass(family: str, tmp_path: Path) -> None:
    runner = Runner(load_model(ModelOptions(source=str(write_model(tmp_path / "m", family)))))
    cache = stored_cache([LayerSpec()] * 2 + [LayerSpec(TensorSpec(2, runner.loaded.info.head_dim))] * 2, {})
    inputs = runner.layer_inputs(TOKENS)
    assert torch.equal(runner.hidden_from(2, inputs[2], cache), runner.hidden(TOKENS, cache))
    assert not torch.equal(runner.hidden(TOKENS, cache), runner.hidden(TOKENS))
    assert len(runner.layers) == 4  # the layers are put back


def test_the_tap_sees_keys_after_rotary_embedding_and_ends_with_the_block(tiny_model: Path) -> None:
    runner = Runner(load_model(ModelOptions(source=str(tiny_model))))
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    keys: list[torch.Tensor] = []

    def tap(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((layer, tuple(query.shape), tuple(value.shape)))
        keys.append(key)
        return key, value

    same = torch.full((1, 6), 9)
    runner.hidden(same, tap)
    assert seen == [(layer, (1, 6, 4, 16), (1, 6, 2, 16)) for layer in range(4)]
    assert not torch.allclose(
        keys[0][0, 0], keys[0][0, 5]
    )  # one token, two positions: only the rotary embedding differs
    with tapped(None):
        runner.hidden(same)
    assert len(seen) == 4


def test_padding_on_the_right_changes_nothing_before_it(tiny_model: Path) -> None:
    runner = Runner(load_model(ModelOptions(source=str(tiny_model))))
    padded = torch.cat((TOKENS, torch.zeros(2, 9, dtype=torch.int64)), 1)
    assert torch.allclose(runner.hidden(padded)[:, :20], runner.hidden(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (make_config("Mistral", sliding_window=128), ["sliding:128"] * 4),
        (
            make_config("Qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2),
            ["full", "full", "sliding:64", "sliding:64"],
        ),
        (Gemma2Config(num_hidden_layers=2), ["sliding:4096", "full"]),
    ],
)
def test_layers_with_windows_are_named(config: Any, kinds: list[str]) -> None:
    check_supported(config.to_dict(), "model")
    assert model_info(config.to_dict() | {"architectures": ["ItForCausalLM"]}, "model").layer_kinds == kinds


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (make_config("Mistral", sliding_window=0), "sliding_window=0, but layer 0 .*sliding_attention"),
        (
            make_config("Qwen2", use_sliding_window=True, sliding_window=-64, max_window_layers=2),
            "sliding_window=-64, but layer 2 .*sliding_attention",
        ),
        (
            Gemma2Config(num_hidden_layers=2, sliding_window=None),
            "sliding_window=null, but layer 0 .*sliding_attention",
        ),
        (Qwen3NextConfig(num_hidden_layers=4), "layer 0 .*linear_attention"),
    ],
)
def test_layers_that_no_profile_describes_are_refused_by_number(config: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_supported(config.to_dict(), "model")


def test_latent_attention_is_refused() -> None:
    from transformers import DeepseekV3Config

    with pytest.raises(DataError, match=r"latent attention, MLA \(kv_lora_rank=512"):
        check_supported(DeepseekV3Config().to_dict(), "model")


def test_logits_that_are_changed_after_the_head_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "Granite", logits_scaling=16.0)
    with pytest.raises(DataError, match="GraniteForCausalLM"):
        Runner(load_model(ModelOptions(source=str(folder))))


def test_what_is_missing_is_named(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, says in ((str(tmp_path / "nowhere"), "does not exist"), (str(tmp_path / "empty"), "no config.json")):
        with pytest.raises(DataError, match=says):
            load_model(ModelOptions(source=source))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(DataError, match="tokenizer"):
        load_model(ModelOptions(source=str(bare)))
    (bare / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:5000])
    (bare / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="weights of"):
        load_model(ModelOptions(source=str(bare)))


def test_devices_and_dtypes_that_are_not_there_are_usage_errors(tiny_model: Path) -> None:
    assert pick_device("cpu").type == "cpu"
    for device in ("cuda:99", "typewriter"):
        with pytest.raises(UsageError, match=device):
            pick_device(device)
    with pytest.raises(UsageError, match="float16"):
        load_model(ModelOptions(source=str(tiny_model), device="cpu", dtype="float16"))


def test_random_weights_need_no_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    loaded = load_model(ModelOptions(source=str(tmp_path), random_weights=True))
    assert loaded.tokenizer is None
    assert loaded.info.weights_digest is None


def test_a_model_loaded_through_a_device_map_is_the_same_model(tiny_model: Path) -> None:
    mapped = load_model(ModelOptions(source=str(tiny_model), device_map="auto", device="cpu"))
    plain = Runner(load_model(ModelOptions(source=str(tiny_model))))
    assert torch.equal(Runner(mapped).hidden(TOKENS), plain.hidden(TOKENS))
