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


def test_nearest_group() -> None:
    assert [nearest_group(size, 128) for size in (1, 32, 63, 64, 128, 1000)] == [32, 32, 32, 64, 128, 128]
    assert [nearest_group(size, 80) for size in (1, 32, 100)] == [80, 80, 80]
