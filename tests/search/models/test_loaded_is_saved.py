"""What is loaded is what was saved: a checkpoint that transformers would fill up, cut or misread ends every command before it measures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.models.runner import Runner
from kvtuner_search.models.source import has_tokenizer
from kvtuner_search.models.weights import check_loaded
from kvtuner_search.profile.canonical import LFS_POINTER

POINTER = LFS_POINTER + b"v1\noid sha256:" + b"4d" * 32 + b"\nsize 123456\n"
LAYER = "model.layers.1.self_attn.k_proj.weight"
SMALL = ("--data", "list", "--samples", "2", "--length", "128", "--quiet")


def edited(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """A copy of a model folder with other tensors and other fields in config.json."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return configured(folder, **config)


def configured(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def renamed(start: str, inside: str = "") -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Every name begins with ``start``, or has it after ``inside``."""
    return lambda tensors: {
        name.replace(inside, inside + start, 1) if inside else start + name: tensor for name, tensor in tensors.items()
    }


def without(text: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if text not in name}


def plus(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | more


def lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = LAYER.replace(".weight", ".lora_A.default.weight")
    return {"base_model.model." + key: tensor for key, tensor in (tensors | {name: torch.zeros(2, 64)}).items()}


def put(value: float, name: str = LAYER) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[5] = value
        return tensors

    return change


def fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ModelOpt stores it: codes with a scale beside each weight."""
    found = dict(tensors)
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 448
        found[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        found[name.replace(".weight", ".weight_scale")] = scale.reshape(1).float()
        found[name.replace(".weight", ".input_scale")] = torch.ones(1)
    return found


MODEL_OPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
# how the checkpoint is changed, fields of config.json, what the line must say
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "compiled": (renamed("_orig_mod."), {}, r"missing .*; unused _orig_mod\.lm_head.* strip '_orig_mod\.'"),
    "compiled inside": (renamed("_orig_mod.", "model.layers.1."), {}, r"missing model\.layers\.1\..*strip '_orig_mod\.'"),
    "wrapped for data parallel": (renamed("module."), {}, r"strip 'module\.'"),
    "adapter": (lora, {}, r"lora_A.*merge it into its base model|base_model\.model.*merge it"),
    "unmerged names": (renamed("base_model.model."), {}, "merge it into its base model"),
    "one layer missing": (without("layers.2."), {}, r"missing model\.layers\.2\..* and \d+ more: restore"),
    "one bias missing": (without("layers.3.self_attn.k_proj.bias"), {}, r"missing model\.layers\.3\.self_attn\.k_proj\.bias"),
    "a layer too many": (lambda t: t, {"num_hidden_layers": 3}, r"unused model\.layers\.3\."),
    "another shape": (lambda t: t, {"intermediate_size": 80}, r"mlp\.down_proj\.weight \[64, 96\] instead of \[64, 80\]"),
    "cache scales": (plus(**{LAYER.replace("k_proj.weight", "k_scale"): torch.ones(1)}), {}, r"k_scale: these are scales of a quantization"),
    "ModelOpt": (fp8, MODEL_OPT, r"does not know.*'modelopt'.*scales .*input_scale"),
    "ModelOpt, no word of it": (fp8, {}, r"_proj\.weight.* as F8_E4M3.*scales .*_scale"),
    "a method without a name": (lambda t: t, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "quantization that is not an object": (lambda t: t, {"quantization_config": "fp8"}, "'fp8'"),
    "NaN": (put(float("nan")), {}, rf"{LAYER} holds NaN"),
    "infinity": (put(float("inf")), {}, rf"{LAYER} holds infinity"),
    "minus infinity in a norm": (put(float("-inf"), "model.norm.weight"), {}, r"model\.norm\.weight holds infinity"),
    "NaN in a bias": (put(float("nan"), LAYER.replace("weight", "bias")), {}, r"k_proj\.bias holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_that_is_not_the_models_is_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    change, config, says = FAULTS[name]
    folder = edited(tiny_model, tmp_path / "model", change, **config)
    if "layer_types" in json.loads((folder / "config.json").read_text()) and "num_hidden_layers" in config:
        configured(folder, layer_types=["full_attention"] * config["num_hidden_layers"])
    with pytest.raises(DataError, match=says) as raised:
        load_model(ModelOptions(source=str(folder)))
    assert "\n" not in str(raised.value)


def test_buffers_that_follow_from_the_config_may_be_left_over(tiny_model: Path, tmp_path: Path) -> None:
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
    }
    load_model(ModelOptions(source=str(edited(tiny_model, tmp_path / "m", plus(**more)))))


def test_a_quantization_that_was_not_applied_is_refused(tiny_model: Path) -> None:
    """transformers knows the method, and loaded the model without it all the same."""
    model = load_model(ModelOptions(source=str(tiny_model))).model
    check_loaded(model, {}, quantized=False, source="m")
    with pytest.raises(DataError, match="m has a quantization_config that transformers did not apply"):
        check_loaded(model, {}, quantized=True, source="m")
    with pytest.raises(DataError, match=r"cannot be loaded: size mismatch"):
        check_loaded(model, {"error_msgs": ["size mismatch"]}, quantized=False, source="m")


def test_a_shard_that_the_index_names_and_nobody_has(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {name: "model-0000{}-of-00002.safetensors".format(1 + ("layers.3" in name)) for name in names}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"cannot load the weights of .*model-00002-of-00002\.safetensors|model\.layers\.3"
    ):
        load_model(ModelOptions(source=str(folder)))


def test_model_opts_own_file_is_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model, tmp_path / "m", fp8)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(DataError, match=r"ModelOpt \(hf_quant_config.json: FP8\).*input_scale"):
        load_model(ModelOptions(source=str(folder)))


@pytest.mark.parametrize("command", ["calibrate", "sensitivity", "evaluate"])
@pytest.mark.parametrize("name", ["compiled", "ModelOpt", "NaN"])
def test_each_command_ends_with_3_and_writes_no_profile(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    change, config, _ = FAULTS[name]
    folder = edited(tiny_model, tmp_path / "model", change, **config)
    arguments = [command, "--model", str(folder), *SMALL]
    if command == "evaluate":
        arguments += ["--uniform", "4-g16-asym/4-g16-asym"]
    if command == "calibrate":
        arguments += ["--output", str(tmp_path / "out"), "--trials", "2"]
    assert run(arguments) == 3
    errors = capsys.readouterr().err
    assert [line.startswith("kvtuner-search: ") for line in errors.splitlines()] == [True], errors
    assert not list(tmp_path.glob("out/*.json"))


def test_logits_that_are_not_finite_are_named(tiny_model: Path, tmp_path: Path) -> None:
    """Finite weights whose products go beyond the dtype."""
    folder = edited(tiny_model, tmp_path / "m", lambda t: t | {"model.norm.weight": torch.full((64,), 3e38)})
    with pytest.raises(DataError, match=r"logits of m are not finite in float32"):
        Runner(load_model(ModelOptions(source=str(folder))))


@pytest.mark.parametrize("vocabulary", [300, 5])
def test_token_ids_beyond_the_embedding_are_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], vocabulary: int
) -> None:
    def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor[:vocabulary].clone() if "embed_tokens" in name or "lm_head" in name else tensor
            for name, tensor in tensors.items()
        }

    folder = edited(tiny_model, tmp_path / "m", fewer, vocab_size=vocabulary)
    assert run(["evaluate", "--model", str(folder), "--uniform", "8-g16-asym/16", *SMALL]) == 3
    errors = capsys.readouterr().err
    assert f"is beyond the {vocabulary} embeddings of m" in errors
    assert "token id " in errors


@pytest.mark.parametrize("command", ["calibrate", "sensitivity", "evaluate"])
def test_a_length_beyond_the_positions_is_a_usage_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = {"calibrate": ["--output", str(tmp_path / "o")], "evaluate": ["--uniform", "16/16"]}.get(command, [])
    assert run([command, "--model", str(tiny_model), "--length", "513", *more]) == 2
    assert "--length 513 is beyond the 512 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scaling", "length", "reach"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, 2048, 2048),
        ({"type": "linear", "factor": 2.0}, 1024, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 1024),
    ],
)
def test_scaling_makes_it_a_remark(
    tiny_model: Path, tmp_path: Path, scaling: dict[str, Any], length: int, reach: int
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": scaling}))
    loaded = load_model(ModelOptions(source=str(folder)), length)
    assert len(loaded.notes) == 1
    assert f"--length {length} is beyond the 512 positions" in loaded.notes[0]
    assert load_model(ModelOptions(source=str(folder)), 512).notes == ()
    with pytest.raises(UsageError, match=f"give at most {reach}"):
        load_model(ModelOptions(source=str(folder)), reach + 1)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(ModelOptions(source=str(folder)))


def test_an_adapter_names_its_base_model(tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 8}))
    whole = shutil.copytree(tiny_model, tmp_path / "whole")
    shutil.copy(adapter / "adapter_config.json", whole)
    for folder in (adapter, whole):
        with pytest.raises(DataError, match=r"an adapter of org/base .*merge it into its base model"):
            load_model(ModelOptions(source=str(folder)))
    for text in ("{}", "[", "[]", '{"base_model_name_or_path": 5}'):
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(DataError, match="has an adapter "):
            load_model(ModelOptions(source=str(adapter)))


def test_the_tokenizers_missing_file_or_package_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(DataError, match=r"only tekken\.json.*tokenizer\.json is missing"):
        load_model(ModelOptions(source=str(folder)))
    (folder / "tokenizer.model").write_bytes(b"\x00")
    monkeypatch.setattr("kvtuner_search.models.source.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package sentencepiece.*kvtuner-search\[sentencepiece\]"):
        load_model(ModelOptions(source=str(folder)))
    monkeypatch.setattr("kvtuner_search.models.source.util.find_spec", lambda name: object())
    assert has_tokenizer(folder)


def test_id_and_revision_are_read_from_the_hubs_cache(tiny_model: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "hub" / "models--org--My-Model" / "snapshots" / commit
    shutil.copytree(tiny_model, snapshot)
    link = tmp_path / "current"
    link.symlink_to(snapshot)
    for source in (snapshot, link, f"{snapshot}/"):
        info = load_model(ModelOptions(source=str(source))).info
        assert (info.id, info.revision) == ("org/My-Model", commit)
    assert load_model(ModelOptions(source=str(snapshot), revision="mine")).info.revision == "mine"


def test_shapes_that_transformers_reads_otherwise_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2Config

    folder = shutil.copytree(tiny_model, tmp_path / "m")
    real = Qwen2Config.from_pretrained

    def other(*arguments: Any, **named: Any) -> Any:
        config = real(*arguments, **named)
        config.num_key_value_heads = 1
        return config

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", other)
    with pytest.raises(DataError, match="num_kv_heads=2, transformers reads it as 1"):
        load_model(ModelOptions(source=str(folder)))


def test_validate_asks_the_same_of_tokenizer_and_length(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = str(Path(__file__).resolve().parents[3] / "profiles" / "reference" / "reference-4.00bit.json")
    folder = shutil.copytree(reference_model_path(), tmp_path / "reference")
    given = ["validate", "--profile", profile, "--folder", str(tmp_path / "out"), "--url", "http://127.0.0.1:9"]
    given += ["--baseline-url", "http://127.0.0.1:9", "--model-path", str(folder)]
    assert run([*given, "--length", "4097"]) == 2
    assert "--length 4097 is beyond the 4096 positions" in capsys.readouterr().err
    (folder / "tokenizer.json").write_bytes(POINTER)
    assert run(given) == 3
    assert "tokenizer.json is a Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.bool])
def test_whole_numbers_are_codes_whatever_their_width(tiny_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = edited(tiny_model, tmp_path / "m", lambda t: t | {LAYER: (t[LAYER] * 1000).to(dtype)})
    with pytest.raises(DataError, match=rf"stores {LAYER} as (I\d+|BOOL)"):
        load_model(ModelOptions(source=str(folder)))


def test_weights_in_64_bits_are_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model, tmp_path / "m", lambda t: {name: x.double() for name, x in t.items()})
    load_model(ModelOptions(source=str(folder)))


def test_files_that_nobody_reads_may_be_anything(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tokenizer.model"):
        (folder / name).write_bytes(POINTER)
    save_file({LAYER: torch.zeros(4, dtype=torch.int8)}, folder / "other-int8.safetensors")
    load_model(ModelOptions(source=str(folder)))


@pytest.mark.parametrize("side", ["k_proj", "v_proj"])
def test_a_layer_that_does_nothing_is_measured(tiny_model: Path, tmp_path: Path, side: str) -> None:
    dead = {f"layers.1.self_attn.{side}.weight", f"layers.1.self_attn.{side}.bias"}
    folder = edited(
        tiny_model,
        tmp_path / "m",
        lambda t: {n: torch.zeros_like(x) if n.removeprefix("model.") in dead else x for n, x in t.items()},
    )
    given = ["--data", "list", "--samples", "2", "--length", "170", "--quiet", "--output", str(tmp_path / "out")]
    assert run(["sensitivity", "--model", str(folder), *given]) == 0


@pytest.mark.parametrize("command", ["calibrate", "sensitivity"])
def test_keys_that_are_finite_and_too_large_to_be_stored(
    command: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights and logits are finite, so that only storing shows it: a group's scale is a 16-bit number."""
    model = edited(tiny_model, tmp_path / "m", put(1e30))
    more = ["--trials", "1", "--no-random-baseline"] if command == "calibrate" else []
    assert (
        run([command, "--model", str(model), *SMALL, "--length", "256", *more, "--output", str(tmp_path / "out")]) == 3
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert "too large to be stored" in last
    assert "layer 1" in last
