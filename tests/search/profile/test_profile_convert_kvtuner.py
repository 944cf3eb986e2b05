"""KVTuner's presets, and the YAML that they and the engines' options are written in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.convert import FORMATS
from kvtuner_search.profile.convert.base import Imported, Source, parse
from kvtuner_search.profile.presets import published
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


def test_a_kvtuner_preset_is_the_published_one() -> None:
    result = load("kvtuner", parse(PRESET.read_bytes(), "x"), QWEN, "pertoken", PRESET.name)
    assert result.layers == dict(published(QWEN))[PRESET.stem]
    assert result.lost == []


def test_the_scheme_must_be_given_and_must_not_contradict_the_name() -> None:
    content = parse(PRESET.read_bytes(), "x")
    with pytest.raises(UsageError, match="hints at pertoken: say so with --scheme pertoken"):
        load("kvtuner", content, QWEN, None, PRESET.name)
    with pytest.raises(UsageError, match="contradicts"):
        load("kvtuner", content, QWEN, "kivi", PRESET.name)
    with pytest.raises(UsageError, match="give --scheme"):
        load("kvtuner", content, QWEN, None, "preset.yaml")


def test_kivi_loses_channels_and_the_window() -> None:
    result = load("kvtuner", bits((4, 2), (8, 8), (2, 2), (16, 4)), scheme="kivi")
    assert [str(layer) for layer in result.layers] == [
        "4-g32-asym/2-g32-asym",
        "8-g32-asym/8-g32-asym",
        "2-g32-asym/2-g32-asym",
        "16/4-g32-asym",
    ]
    assert len(result.lost) == 2
    assert "per channel" in result.lost[0]
    assert "32 of the newest tokens" in result.lost[1]


def test_other_bits_are_rounded_up_and_listed() -> None:
    result = load("kvtuner", bits((3, 4), (3, 4), (4, 4), (5, 1)), scheme="pertoken")
    assert [layer.name for layer in result.layers] == ["K4V4", "K4V4", "K4V4", "K8V2"]
    assert result.lost == [
        "layers 0-1: key bits 3 become 4",
        "layers 3: key bits 5 become 8",
        "layers 3: value bits 1 become 2",
    ]


def test_bits_by_head() -> None:
    head = {"nbits_key": 4, "nbits_value": 4}
    same = {0: {0: head, 1: head}, **dict.fromkeys((1, 2, 3), head)}
    assert load("kvtuner", same, scheme="pertoken").lost == []
    mixed = {**same, 0: {0: head, 1: {"nbits_key": 8, "nbits_value": 4}}}
    result = load("kvtuner", mixed, scheme="pertoken")
    assert result.layers[0].name == "K8V4"
    assert result.lost == ["layer 0: key bits differ from head to head; all heads get the widest, 8"]


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {},
        bits((4, 4)),
        bits(*[(4, 4)] * 5),
        {"0": 1, "1": 1, "2": 1, "3": 1},
        dict.fromkeys(range(4), 4),
        {index: {"nbits_key": 4} for index in range(4)},
        bits((0, 4), (4, 4), (4, 4), (4, 4)),
        bits((17, 4), (4, 4), (4, 4), (4, 4)),
        {index: {"nbits_key": "4", "nbits_value": True} for index in range(4)},
        {index: {0: 1, 1: 2} for index in range(4)},
    ],
)
def test_what_is_no_preset_of_this_model_is_refused(content: Any) -> None:
    with pytest.raises(DataError):
        load("kvtuner", content, scheme="pertoken")


def test_a_preset_comes_back() -> None:
    source = profile(
        ["8-g64-asym/4-g64-asym", "4-g64-asym/2-g64-asym", "2-g64-asym/8-g64-asym", "4-g64-asym/4-g64-asym"]
    )
    written = FORMATS["kvtuner"].write(source)
    assert written.lost == []
    assert load("kvtuner", parse(written.text.encode(), "x"), scheme="pertoken").layers == source.layer_specs()


def test_what_a_preset_cannot_say_is_listed() -> None:
    written = FORMATS["kvtuner"].write(
        profile(["16/4-g64-asym", "4-g32-asym/4-g64-sym", "4-g64-asym-r/4-g64-asym-x0.9", "8-g64-asym/8-g64-asym"])
    )
    assert written.lost == [
        "keys of layers 0: 16 becomes 8-g64-asym",
        "keys of layers 1: 4-g32-asym becomes 4-g64-asym",
        "keys of layers 2: 4-g64-asym-r becomes 4-g64-asym",
        "values of layers 1: 4-g64-sym becomes 4-g64-asym",
        "values of layers 2: 4-g64-asym-x0.9 becomes 4-g64-asym",
    ]


# YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: &x [1]\nb: *x\n", "aliases"),
        (b"a: 1\na: 2\n", "given twice"),
        (b"0: {a: 1, a: 2}\n", "given twice"),
        (b"a: " + b"[" * 200 + b"]" * 200, "nests deeper"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xff", "not valid YAML"),
        (b"a: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        (b"a: " + b"9" * 5000, "not valid YAML"),
        (b"a: 2020-99-99\n", "not valid YAML"),
        (b"? [1]\n: 2\n", "not valid YAML"),
        (b'{"a": 1, "a": 2}', "given twice"),
    ],
)
def test_doubtful_yaml_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text, "x")


TEXT = "".join(
    f"'{index}':\n  nbits_key: {key}\n  nbits_value: {value}\n"
    for index, (key, value) in enumerate([(8, 4), (4, 2), (2, 2), (16, 8)])
)


@pytest.mark.parametrize(
    "data",
    [
        TEXT,
        TEXT.replace("'", '"'),
        TEXT.replace("'0'", "0").replace("'2'", "2"),
        TEXT.replace("'", ""),
        '{"0": {"nbits_key": 8, "nbits_value": 4}, "1": {"nbits_key": 4, "nbits_value": 2}, "3": {"nbits_key": 16, "nbits_value": 8}, "2": {"nbits_key": 2, "nbits_value": 2}}',
    ],
    ids=["quoted", "double", "mixed", "numbers", "json"],
)
def test_layers_may_be_numbered_by_text(data: str) -> None:
    imported = load("kvtuner", parse(data.encode(), "x"), scheme="pertoken")
    assert [str(layer) for layer in imported.layers] == [
        "8-g64-asym/4-g64-asym",
        "4-g64-asym/2-g64-asym",
        "2-g64-asym/2-g64-asym",
        "16/8-g64-asym",
    ]
    assert imported.lost == []


def test_heads_may_be_numbered_by_text() -> None:
    head = {"nbits_key": 4, "nbits_value": 2}
    content = {str(index): {"0": head, "1": head | {"nbits_key": 8}} for index in range(4)}
    assert specs(load("kvtuner", content, scheme="pertoken")) == ["8-g64-asym/2-g64-asym"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1}, "the preset has 'x' where a number is expected: it is not a preset of KVTuner"),
        ({"01": 1}, "has '01' where a number"),
        ({" 1": 1}, "has ' 1' where a number"),
        ({"-1": 1}, "has '-1' where a number"),
        ({-1: 1}, "has -1 where a number"),
        ({"١": 1}, "has '١' where a number"),
        ({1.0: 1}, "has 1.0 where a number"),
        ({True: 1}, "has True where a number"),
        ({None: 1}, "has None where a number"),
        ({"k" * 5000: 1}, "has 'k{40,60}… where a number"),
        ({"0": {}}, "has 0 twice, as a number and as text"),
        ({"4": {}}, "has layers 0-4, the model has 0 to 3: it is a preset of another model"),
    ],
)
def test_what_numbers_no_layer_is_refused(change: dict[Any, Any], message: str) -> None:
    content: dict[Any, Any] = {} if True in change or 1.0 in change else bits((4, 4), (4, 4), (4, 4), (4, 4))
    with pytest.raises(DataError, match=message):
        load("kvtuner", content | change, scheme="pertoken")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"nbits_value": 4}, "layer 0 has no nbits_key: it is not a preset"),
        ({"0": {}}, "layer 0 has no nbits_key, nor an entry for each of 2 KV heads"),
        ({"a": {}}, "layer 0 has 'a' where a number is expected"),
        ({}, "layer 0 has no nbits_key"),
    ],
)
def test_what_is_no_layer_is_refused(layer: dict[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("kvtuner", bits((4, 4), (4, 4), (4, 4), (4, 4)) | {0: layer}, scheme="pertoken")


def test_no_layers_are_said_so() -> None:
    with pytest.raises(DataError, match="has no layers, the model has 0 to 3"):
        load("kvtuner", {}, scheme="pertoken")
