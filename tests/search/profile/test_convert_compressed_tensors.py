"""Import from compressed-tensors, LLM Compressor and ModelOpt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvtuner_search.errors import DataError
from kvtuner_search.profile.convert.base import Imported, parse
from tests.search.profile.test_profile_convert import load, specs


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
