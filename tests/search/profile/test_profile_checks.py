"""The transforms file, the model, and what a strict check remarks on."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.errors import NotComparableError, ProfileError
from kvtuner_search.profile.canonical import dumps, load
from kvtuner_search.profile.checks import check_model, strict_remarks
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.storage import storage_of
from kvtuner_search.transforms import MAX_HEADER, check_transforms, read_header, verify_transforms
from tests.search.profile_factory import digest, fitted, measure, profile, safetensors, transforms

LAYERS = ["4-g64-asym-c/4-g64-asym", "4-g64-asym/4-g64-asym", "4-g64-asym-c/4-g64-asym-c", "16/16"]
REFERENCE = Path(__file__).resolve().parents[3] / "profiles" / "reference"
TENSORS = {"layers.0.key": [2, 64], "layers.2.key": [2, 64], "layers.2.value": [2, 64]}


def with_file(folder: Path, data: bytes) -> Profile:
    (folder / "a.safetensors").write_bytes(data)
    return profile(LAYERS, transforms={"file": "a.safetensors", "digest": "sha256:" + hashlib.sha256(data).hexdigest()})


def test_a_file_that_fits(tmp_path: Path) -> None:
    check_transforms(with_file(tmp_path, safetensors(TENSORS)), tmp_path)
    check_transforms(profile(), tmp_path)


def test_a_file_that_the_library_wrote(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save

    tensors = {name: numpy.ones(shape, numpy.float32) for name, shape in TENSORS.items()}
    check_transforms(with_file(tmp_path, save(tensors, {"format": "pt"})), tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    checked = with_file(tmp_path, safetensors(TENSORS))
    (tmp_path / "a.safetensors").write_bytes(safetensors(TENSORS)[:-1] + b"\1")
    with pytest.raises(ProfileError, match="has digest"):
        check_transforms(checked, tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ProfileError, match="does not exist"):
        check_transforms(checked, tmp_path)


def test_a_file_that_is_far_too_large_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    checked = with_file(tmp_path, safetensors(TENSORS))
    with (tmp_path / "a.safetensors").open("r+b") as stream:
        stream.truncate(2**30)
    with pytest.raises(ProfileError, match="more than"):
        check_transforms(checked, tmp_path)


def raw(header: object, payload: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (safetensors({**TENSORS, "layers.1.key": [2, 64]}), "differ in layers.1.key"),
        (safetensors({**TENSORS, "layers.1.key": [0]}), "differ in layers.1.key"),
        (safetensors({name: TENSORS[name] for name in ("layers.0.key", "layers.2.key")}), "differ in layers.2.value"),
        (safetensors({**TENSORS, "layers.2.value": [64, 2]}), r"F32 \[64, 2\], not F32 \[2, 64\]"),
        (safetensors(TENSORS, "I32"), "I32"),
        (b"", "is not a safetensors file: "),
        (b"\xff" * 8, "is not a safetensors file: "),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "is not a safetensors file: "),
        (raw([]), "is not a safetensors file: "),
        (raw({"a": 1}), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 5), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4), "is not a safetensors file: "),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "is not a safetensors file: "),
        (struct.pack("<Q", 9) + b' {"a": 1}', "is not a safetensors file: "),
        (struct.pack("<Q", 9) + b'{"a":[\xff]}', "is not a safetensors file: "),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "is not a safetensors file: "),
        (struct.pack("<Q", 18) + b'{"a":{},"a":{}}   ', "is not a safetensors file: "),
        (raw({"__metadata__": {"a": 1}}), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "is not a safetensors file: "),
        (raw({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4), "is not a safetensors file: "),
        (
            raw({"a": {"dtype": "F32", "shape": [2**62] * 40000, "data_offsets": [0, 4]}}, 4),
            "is not a safetensors file: ",
        ),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, 4), "is not a safetensors file: "),
        (
            raw({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, 4),
            "is not a safetensors file: ",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    for look in (check_transforms, verify_transforms):
        with pytest.raises(ProfileError, match=message):
            look(with_file(tmp_path, data), tmp_path)


@given(st.data())
def test_what_is_accepted_is_what_the_library_reads(data: st.DataObject) -> None:
    """The reader of headers is not the library's, which serving uses: whatever it lets through, the library takes for the same tensors."""
    good = bytearray(safetensors(TENSORS))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 260))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"1", b" ", b",", b"]", b'"', b"4", b"F16", b"{}"])
        )
    try:
        found = read_header(BytesIO(good))
    except ValueError:
        return
    theirs = dict(deserialize(bytes(good)))
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items()} == found


def test_a_large_file_is_checked_a_head_at_a_time(tmp_path: Path) -> None:
    """A model of 80 layers with 64 KV heads takes 681 MB of bases; 300 MB must do for any."""
    shapes = transforms(["b65443322/b44333222"] * 4, 64, 128)
    data = safetensors(shapes)
    assert len(data) > 2**25
    storage = storage_of([LayerSpec.parse("b65443322/b44333222")] * 4, 64, 128).model_dump()
    model = {"model__num_attention_heads": 64, "model__num_kv_heads": 64, "model__head_dim": 128}
    made = fitted(["b65443322/b44333222"] * 4, data, storage=storage, **model)
    (tmp_path / "t.safetensors").write_bytes(data)
    tracemalloc.start()
    verify_transforms(made, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21
    assert check_transforms(made, tmp_path) == data


def test_the_model_must_be_the_profiles_own() -> None:
    checked = profile()
    check_model(checked, checked.model, "config.json")
    check_model(checked, checked.model.model_copy(update={"config_digest": None, "id": "other"}), "config.json")
    for change in ({"num_layers": 5}, {"config_digest": digest("x")}, {"architecture": "X"}, {"head_dim": 128}):
        with pytest.raises(NotComparableError, match=next(iter(change))):
            check_model(checked, checked.model.model_copy(update=change), "config.json")


def remarks(data: bytes | None = None, **changes: Any) -> list[str]:
    checked = profile(**changes)
    return [remark.id for remark in strict_remarks(checked, dumps(checked).encode() if data is None else data)]


@pytest.mark.parametrize(
    ("remark", "fires", "below"),
    [
        ("model-unverified", {"model__config_digest": None}, {"model__revision": None}),
        ("quality-unproven", {"quality": []}, {"quality": [], "layers": "16/16"}),
        (
            "interval-excludes-value",
            {"quality": [measure() | {"ci_low": 0.0201}]},
            {"quality": [measure() | {"ci_low": 0.02}]},
        ),
        (
            "unused-transforms",
            {"transforms": {"file": "a.safetensors", "digest": digest("a")}},
            {"transforms": {"file": "a.safetensors", "digest": digest("a")}, "layers": LAYERS},
        ),
    ],
)
def test_remarks(remark: str, fires: dict[str, Any], below: dict[str, Any]) -> None:
    assert remarks(**fires) == [remark]
    assert remarks(**below) == []


def test_a_file_out_of_canonical_form() -> None:
    assert remarks(json.dumps(profile().model_dump(mode="json")).encode()) == ["not-canonical"]


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.json")), ids=lambda path: path.stem)
def test_the_profiles_that_calibrate_made_here_leave_nothing_to_remark(path: Path) -> None:
    # Not even one that is no point of its front: the front is the search split's, and the choice looks at another split too.
    assert list(strict_remarks(load(path), path.read_bytes())) == []
