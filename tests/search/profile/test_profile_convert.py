"""Import and export: the real formats, what they lose, and round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.errors import DataError
from kvtuner_search.profile.convert import FORMATS, transformers
from kvtuner_search.profile.convert.base import Imported, Source, nearest_group, parse
from kvtuner_search.profile.schema import ModelInfo
from tests.search.profile_factory import profile

PRESET = Path(__file__).parent / "kvtuner" / "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0.yaml"
QWEN = ModelInfo(
    id="q", architecture="Qwen2ForCausalLM", num_layers=28, num_attention_heads=28, num_kv_heads=4, head_dim=128
)
SMALL = profile().model  # 4 layers, 2 KV heads, head_dim 64


def load(
    format_: str, content: Any, model: ModelInfo = SMALL, scheme: str | None = None, name: str = "file"
) -> Imported:
    return FORMATS[format_].read(Source(name, content, model, scheme))


def specs(imported: Imported) -> list[str]:
    return list(dict.fromkeys(map(str, imported.layers)))


def bits(*pairs: tuple[int, int]) -> dict[int, dict[str, int]]:
    return {index: {"nbits_key": key, "nbits_value": value} for index, (key, value) in enumerate(pairs)}


# transformers


def cache(**config: Any) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": {"residual_length": 1, **config}}


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        ({}, "4-g64-asym"),
        ({"backend": "quanto", "nbits": 2, "q_group_size": 32}, "2-g32-asym"),
        ({"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}, "8-g64-asym"),
        ({"backend": "HQQ", "nbits": 4, "axis_key": 1, "axis_value": 1, "device": "cuda"}, "4-g64-asym"),
    ],
)
def test_quantized_cache_of_consecutive_channels_is_lossless(config: dict[str, Any], spec: str) -> None:
    for content in (cache(**config), cache(**config)["cache_config"]):
        result = load("transformers", content)
        assert specs(result) == [f"{spec}/{spec}"]
        assert result.lost == []


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        ({"residual_length": None}, "up to 128 of the newest tokens"),
        ({"residual_length": 2}, "up to 2 of the newest tokens"),
        ({"axis_key": -1}, "axis_key=-1 groups along tokens"),
        ({"backend": "hqq", "axis_key": 1, "axis_value": 0}, "axis_value=0 groups along tokens"),
        ({"q_group_size": 48}, "groups of 48 become groups of 32"),
        ({"q_group_size": 128}, "groups of 128 become groups of 64"),
        ({"backend": "hqq", "nbits": 3, "axis_key": 1, "axis_value": 1}, "3 bits become 4"),
    ],
)
def test_the_rest_of_quantized_cache_is_listed(config: dict[str, Any], loss: str) -> None:
    result = load("transformers", cache(**config))
    assert len(result.lost) == 1
    assert loss in result.lost[0]


@pytest.mark.parametrize(
    "content",
    [
        [],
        cache(backend="fp8"),
        cache(backend=3),
        cache(nbits=8),
        cache(nbits=True),
        cache(axis_key=1),
        cache(q_group_size=0),
        cache(unknown=1),
        {"cache_implementation": "static", "cache_config": {"nbits": 4}},
        {"cache_implementation": "quantized", "cache_config": 3},
    ],
)
def test_what_transformers_itself_refuses_is_refused(content: Any) -> None:
    with pytest.raises(DataError):
        load("transformers", content)


@pytest.mark.parametrize("spec", ["16/16", "2-g64-asym/2-g64-asym", "4-g32-asym/4-g32-asym", "8-g64-asym/8-g64-asym"])
def test_one_setting_comes_back_from_transformers_and_compressed_tensors(spec: str) -> None:
    for name in ("transformers", "compressed-tensors"):
        written = FORMATS[name].write(profile(spec))
        assert written.lost == []
        result = load(name, json.loads(written.text))
        assert specs(result) == [spec]
        assert result.lost == []


def test_the_exported_configuration_is_one_that_transformers_takes() -> None:
    """The arguments are those of QuantizedCache, and the implementation is one that generate knows."""
    import inspect

    from transformers import GenerationConfig
    from transformers.cache_utils import QuantizedCache

    for spec in ("4-g32-asym/4-g32-asym", "8-g64-asym/8-g64-asym", "16/16"):
        content = json.loads(FORMATS["transformers"].write(profile(spec)).text)
        config = GenerationConfig(**content)
        config.validate()
        assert set(content.get("cache_config", {})) <= set(inspect.signature(QuantizedCache).parameters)


def test_bits_that_no_backend_has_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backend that has not got them, transformers would learn only when it generates."""
    monkeypatch.setitem(transformers._ALLOWED_BITS, "quanto", (2,))  # as if the layout had got a width that it lacks
    written = json.loads(FORMATS["transformers"].write(profile("4-g64-asym/2-g64-asym")).text)["cache_config"]
    assert (written["backend"], written["nbits"], written["axis_key"]) == ("hqq", 4, 1)
    monkeypatch.setitem(transformers._ALLOWED_BITS, "hqq", (1, 2, 3, 8))
    with pytest.raises(
        DataError, match=r"needs 4 bits, which no backend .+ has \(only 1, 2, 3, 8\): export to another"
    ):
        FORMATS["transformers"].write(profile("4-g64-asym/2-g64-asym"))


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_written_and_read_back(name: str) -> None:
    """What a format cannot express is listed, and lost at once: what comes back comes back again."""
    source = ["8-g64-sym/8-g64-sym", "4-g64-asym/4-g64-asym", "8-g64-sym/2-g32-asym", "8-g64-sym/16"]
    for _ in range(3):
        written = FORMATS[name].write(profile(source))
        result = load(name, parse(written.text.encode(), "file"), scheme="pertoken" if name == "kvtuner" else None)
        before, source = source, [str(layer) for layer in result.layers]
        assert source == before or written.lost + result.lost
    assert source == before


def test_mixed_layers_become_the_widest_and_finest() -> None:
    source = profile(["8-g64-asym/4-g32-asym", "2-g64-asym/2-g64-asym", "4-g64-asym/4-g64-asym", "16/16"])
    for name in ("transformers", "compressed-tensors"):
        written = FORMATS[name].write(source)
        result = load(name, json.loads(written.text))
        assert specs(result) == ["8-g32-asym/8-g32-asym"]
        assert written.lost == [
            "keys of layers 0: 8-g64-asym becomes 8-g32-asym",
            "keys of layers 1: 2-g64-asym becomes 8-g32-asym",
            "keys of layers 2: 4-g64-asym becomes 8-g32-asym",
            "keys of layers 3: 16 becomes 8-g32-asym",
            "values of layers 0: 4-g32-asym becomes 8-g32-asym",
            "values of layers 1: 2-g64-asym becomes 8-g32-asym",
            "values of layers 2: 4-g64-asym becomes 8-g32-asym",
            "values of layers 3: 16 becomes 8-g32-asym",
        ]


# vLLM and SGLang


@pytest.mark.parametrize("spec", ["16/16", "8-g64-sym/8-g64-sym"])
def test_vllm_round_trip(spec: str) -> None:
    layers = [spec, "16/16", spec, spec]
    written = FORMATS["vllm"].write(profile(layers))
    assert written.lost == []
    result = load("vllm", parse(written.text.encode(), "x"))
    assert [str(layer) for layer in result.layers] == layers
    assert result.lost == []


def test_vllm_widens_what_it_lacks() -> None:
    written = FORMATS["vllm"].write(profile(["4-g64-asym/16", "16/16", "8-g64-sym/8-g64-sym", "16/16"]))
    assert parse(written.text.encode(), "x") == {
        "kv-cache-dtype": "int8_per_token_head",
        "kv-cache-dtype-skip-layers": ["1", "3"],
    }
    assert written.lost == [
        "keys of layers 0: 4-g64-asym becomes 8-g64-sym",
        "values of layers 0: 16 becomes 8-g64-sym",
    ]


@pytest.mark.parametrize(
    ("format_", "dtype", "spec", "lossless"),
    [
        ("vllm", "auto", "16/16", True),
        ("vllm", "float16", "16/16", True),
        ("vllm", "fp8", "8-g64-sym/8-g64-sym", False),
        ("vllm", "int8_per_token_head", "8-g64-sym/8-g64-sym", True),
        ("vllm", "fp8_per_token_head", "8-g64-sym/8-g64-sym", False),
        ("vllm", "int4_per_token_head", "4-g32-sym/4-g32-sym", False),
        ("vllm", "turboquant_k8v4", "8-g64-sym/4-g64-sym", False),
        ("vllm", "nvfp4", "4-g32-sym/4-g32-sym", False),
        ("sglang", "auto", "16/16", True),
        ("sglang", "bf16", "16/16", True),
        ("sglang", "fp8_e5m2", "8-g64-sym/8-g64-sym", False),
        ("sglang", "fp4_e2m1", "4-g32-sym/4-g32-sym", False),
    ],
)
def test_engine_dtypes(format_: str, dtype: str, spec: str, lossless: bool) -> None:
    for key in ("kv-cache-dtype", "kv_cache_dtype"):
        result = load(format_, {"port": 8000, key: dtype})
        assert specs(result) == [spec]
        assert (result.lost == []) is lossless


def test_engine_scales_are_read_and_lost() -> None:
    scales = {
        "model_type": "qwen2",
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": dict.fromkeys("0123", 1.0)}},
    }
    for format_ in ("vllm", "sglang"):
        result = load(format_, scales)
        assert specs(result) == ["8-g64-sym/8-g64-sym"]
        assert "one fixed scale for a whole tensor" in result.lost[1]
    lost = load("sglang", {"kv-cache-dtype": "fp8_e4m3", "quantization-param-path": "s.json"}).lost
    assert "the fixed scales of quantization-param-path are not kept" in lost


def test_skipped_layers() -> None:
    result = load("vllm", {"kv-cache-dtype": "int8_per_token_head", "kv-cache-dtype-skip-layers": "0, 3"})
    assert [layer == LayerSpec() for layer in result.layers] == [True, False, False, True]
    result = load("vllm", {"kv-cache-dtype": "int8_per_token_head", "kv-cache-dtype-skip-layers": ["sliding_window"]})
    assert "names layers by kind" in result.lost[0]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"kv-cache-dtype": "int3"},
        {"kv-cache-dtype": "fp8_ds_mla"},
        {"kv-cache-dtype": 8},
        {"kv-cache-dtype": "auto", "kv-cache-dtype-skip-layers": [9]},
        {"kv_cache": 1},
        {"kv_cache": {"dtype": "float8_e5m2", "scaling_factor": {}}},
        {"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 1.0}}}},
    ],
)
def test_unknown_engine_options_are_refused(content: Any) -> None:
    for format_ in ("vllm", "sglang"):
        with pytest.raises(DataError):
            load(format_, content)


def test_sglang_lists_every_quantized_tensor() -> None:
    assert FORMATS["sglang"].write(profile("16/16")).text == "kv-cache-dtype: auto\n"
    written = FORMATS["sglang"].write(profile("4-g64-asym/8-g64-sym"))
    assert written.text == "kv-cache-dtype: fp8_e4m3\n"
    assert written.lost[:2] == [
        "keys of layers 0-3: 4-g64-asym becomes FP8 (e4m3)",
        "values of layers 0-3: 8-g64-sym becomes FP8 (e4m3)",
    ]


# compressed-tensors


def scheme(**changes: Any) -> dict[str, Any]:
    base = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": True}
    return {"quantization_config": {"kv_cache_scheme": base | changes}}


def test_compressed_tensors_groups_are_lossless() -> None:
    for content in (scheme(), scheme()["quantization_config"], scheme()["quantization_config"]["kv_cache_scheme"]):
        result = load("compressed-tensors", content)
        assert specs(result) == ["8-g64-sym/8-g64-sym"]
        assert result.lost == []
    result = load("compressed-tensors", scheme(symmetric=False, observer=None))
    assert (specs(result), result.lost, len(result.notes)) == (["8-g64-asym/8-g64-asym"], [], 1)
    assert specs(load("compressed-tensors", {"kv_cache_scheme": None})) == ["16/16"]


@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({"dynamic": False}, ["fixed scales"]),
        ({"type": "float"}, ["floating-point"]),
        ({"strategy": "token", "group_size": None}, ["for all heads of a token"]),
        ({"group_size": 16}, ["groups of 16 become groups of 32"]),
        ({"num_bits": 6}, ["6-bit codes become 8-bit codes"]),
        ({"num_bits": 12}, ["12-bit codes become the 16-bit cache"]),
        (
            {"type": "float", "strategy": "tensor", "group_size": None, "dynamic": False},
            ["for a whole tensor", "fixed scales", "floating-point"],
        ),
    ],
)
def test_the_rest_of_compressed_tensors_is_listed(changes: dict[str, Any], losses: list[str]) -> None:
    lost = load("compressed-tensors", scheme(**changes)).lost
    assert len(lost) == len(losses)
    for line, loss in zip(lost, losses, strict=True):
        assert loss in line


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"quantization_config": {}},
        scheme(num_bits=0),
        scheme(num_bits="8"),
        scheme(type="complex"),
        scheme(strategy="magic"),
        scheme(strategy=3),
        scheme(symmetric=1),
        scheme(dynamic="never"),
        scheme(group_size=None),
        scheme(unknown=1),
    ],
)
def test_what_compressed_tensors_refuses_is_refused(content: Any) -> None:
    with pytest.raises(DataError):
        load("compressed-tensors", content)


def test_nearest_group() -> None:
    assert [nearest_group(size, 128) for size in (1, 32, 63, 64, 128, 1000)] == [32, 32, 32, 64, 128, 128]
    assert [nearest_group(size, 80) for size in (1, 32, 100)] == [80, 80, 80]


# what LLM Compressor and ModelOpt write

FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
FP8_LOST = [
    "one scale for a whole tensor becomes a scale for each token and head",
    "fixed scales are not kept; here each token's scale is computed from the token",
    "8-bit floating-point codes become integer codes",
]


def recipe(text: str) -> Imported:
    return load("compressed-tensors", parse(text.encode(), "recipe.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n      ignore: [lm_head]\n      kv_cache_scheme: SCHEME\n",
        "default_stage:\n  default_modifiers:\n    GPTQModifier: {kv_cache_scheme: SCHEME, scheme: W4A16}\n",
        "default_stage:\n  run_type: oneshot\n  default_modifiers:\n    - SmoothQuantModifier: {smoothing_strength: 0.8}\n    - QuantizationModifier: {kv_cache_scheme: SCHEME}\n",
        "quant_modifiers:\n  QuantizationModifier: {kv_cache_scheme: SCHEME}\n",
        "QuantizationModifier: {kv_cache_scheme: SCHEME}\n",
        "a_stage:\n  a_modifiers: {QuantizationModifier: {kv_cache_scheme: SCHEME}}\nb_stage:\n  b_modifiers: {QuantizationModifier: {kv_cache_scheme: SCHEME}}\n",
    ],
    ids=["stage", "default", "list", "modifiers", "modifier", "twice"],
)
def test_a_recipe_says_what_the_cache_is(text: str) -> None:
    imported = recipe(text.replace("SCHEME", json.dumps(FP8)))
    assert (specs(imported), imported.lost) == (["8-g64-sym/8-g64-sym"], FP8_LOST)
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True}
    imported = recipe(text.replace("SCHEME", json.dumps(group)))
    assert (specs(imported), imported.lost) == (["4-g32-sym/4-g32-sym"], [])
    assert specs(recipe(text.replace("SCHEME", "null"))) == ["16/16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {scheme: FP8}\n",
            "says nothing of the KV cache: no modifier has",
        ),
        ("quant_stage: {}\n", "says nothing of the KV cache"),
        ("quant_stage: 3\n", "says nothing of the KV cache"),
        (
            "AModifier: {kv_cache_scheme: null}\nBModifier: {kv_cache_scheme: {num_bits: 8}}\n",
            "several kv_cache_scheme that differ",
        ),
        ("AModifier: {kv_cache_scheme: fp8}\n", "kv_cache_scheme is a str, not a mapping"),
        ("AModifier: {kv_cache_scheme: {num_bits: 8, colour: red}}\n", "has no colour"),
    ],
)
def test_a_recipe_that_says_nothing_of_it_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe(text)


def modelopt(**fields: Any) -> Imported:
    content = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, **fields},
    }
    return load("compressed-tensors", content)


@pytest.mark.parametrize(
    ("algorithm", "spec", "losses"),
    [
        ("FP8", "8-g64-sym", FP8_LOST),
        ("INT8", "8-g64-sym", FP8_LOST[:2]),
        ("NVFP4", "4-g32-sym", ["a global scale", "fixed scales", "4-bit floating-point", "groups of 16 become"]),
        (None, "16", []),
        ("NONE", "16", []),
    ],
)
def test_hf_quant_config_says_what_the_cache_is(algorithm: str | None, spec: str, losses: list[str]) -> None:
    for imported in (
        modelopt(kv_cache_quant_algo=algorithm),
        load(
            "compressed-tensors",
            {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": algorithm}},
        ),
    ):
        assert specs(imported) == [f"{spec}/{spec}"]
        assert len(imported.lost) == len(losses)
        assert all(line.startswith(start) for line, start in zip(imported.lost, losses, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "says nothing of the KV cache: it has no kv_cache_quant_algo"),
        ({"kv_cache_quant_algo": "FP3"}, "kv_cache_quant_algo='FP3' is not one of FP8, INT8, NVFP4"),
        ({"kv_cache_quant_algo": ["FP8"]}, "is not one of"),
        ({"kv_cache_quant_algo": "x" * 5000}, "kv_cache_quant_algo='x{40,60}… is not one of"),
    ],
)
def test_what_hf_quant_config_does_not_say_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        modelopt(**fields)


def test_quantized_weights_alone_say_nothing_of_the_cache() -> None:
    for config in ({"quant_method": "compressed-tensors", "config_groups": {}}, {"quant_method": "awq", "bits": 4}):
        with pytest.raises(DataError, match="says nothing of the KV cache: it has no kv_cache_scheme"):
            load("compressed-tensors", {"quantization_config": config})
