"""Bands in a profile: how they are written, what they need, what is refused, and the transforms file that they come with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtuner_kernels.bands import EXTRA_ROWS as KERNEL_ROWS
from kvtuner_kernels.bands import BasisError, basis
from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search import transforms as transforms_module
from kvtuner_search.errors import ProfileError
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.profile.canonical import dumps, load, loads, save
from kvtuner_search.profile.checks import strict_remarks
from kvtuner_search.profile.schema import Profile, TensorEntry
from kvtuner_search.transforms import EXTRA_ROWS, check_transforms, transform_shapes
from tests.search.profile_factory import (
    BANDED,
    HEAD_DIM,
    fitted,
    front,
    named,
    profile,
    safetensors,
    transforms,
    write_fitted,
)

LAYERS = [BANDED, "8-g64-asym-c/b33222110", "b88644321/4-g64-asym", "16/16"]
ROWS, FLAT = HEAD_DIM + 2, (HEAD_DIM + 2) * HEAD_DIM  # of one head of a basis


@pytest.mark.parametrize("text", ["16", "4-g64-asym-c", "b65443322", "b00000001", "b88888888"])
def test_an_entry_is_its_spec(text: str) -> None:
    spec = TensorSpec.parse(text)
    entry = TensorEntry.of(spec)
    assert entry.spec() == spec
    assert entry.fitted == spec.fitted
    assert TensorEntry.model_validate(json.loads(entry.model_dump_json())) == entry


def test_bands_are_written_as_eight_digits() -> None:
    entry = json.loads(dumps(fitted(LAYERS)))["layers"][0]["key"]
    plain = {"group_size": 0, "symmetric": False, "centred": False, "rotated": False, "clip": 1.0}
    assert entry == {"bits": 0, "bands": "65443322", **plain}
    assert json.loads(dumps(profile()))["layers"][0]["key"]["bands"] is None


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 0},
        {"bits": 0, "bands": None},
        {"bits": 0, "bands": "00000000"},
        {"bits": 0, "bands": "6544332"},
        {"bits": 0, "bands": "654433222"},
        {"bits": 0, "bands": "65443329"},
        {"bits": 0, "bands": "65443322\n"},
        {"bits": 0, "bands": "6544332\u0662"},
        {"bits": 0, "bands": [6, 5, 4, 4, 3, 3, 2, 2]},
        {"bits": 4, "bands": "65443322"},
        {"bits": 4, "group_size": 64, "bands": "65443322"},
        {"bits": 16, "bands": "65443322"},
        {"bits": 0, "bands": "65443322", "group_size": 64},
        {"bits": 0, "bands": "65443322", "centred": True},
        {"bits": 0, "bands": "65443322", "rotated": True},
        {"bits": 0, "bands": "65443322", "clip": 0.9},
    ],
)
def test_what_is_no_banded_entry_is_refused(entry: dict[str, Any]) -> None:
    body = fitted(LAYERS).model_dump(mode="json")
    body["layers"][0]["key"] = entry
    with pytest.raises(ProfileError, match=r"layers\.0\.key"):
        loads(json.dumps(body).encode(), "x")


def test_bands_need_a_transforms_file() -> None:
    with pytest.raises(ProfileError, match="centred or banded but no transforms file"):
        profile(BANDED)


def test_a_head_that_does_not_split_into_bands_is_refused() -> None:
    body = fitted(LAYERS).model_dump(mode="json")
    body["model"]["head_dim"] = 60
    with pytest.raises(ProfileError, match="does not split into 8 bands"):
        loads(json.dumps(body).encode(), "x")


def test_effective_bits_count_words_scales_and_padding_and_no_first_token() -> None:
    # 20 and 17 bits of codes, two of scales: three words a head that keys and values share; apart they would take two each.
    made = fitted(["b54332210/b43322210"] * 4)
    assert made.storage.bytes_per_token == 4 * 2 * (3 * HEAD_DIM // 8 * 2)
    assert made.storage.effective_bits == 16 * made.storage.bytes_per_token / made.storage.bytes_per_token_16bit
    apart = [LayerSpec.parse(f"{text}/16").key.code_bytes(HEAD_DIM) for text in ("b54332210", "b43322210")]
    assert apart == [2 * HEAD_DIM // 8 * 2] * 2
    with pytest.raises(ProfileError, match="the layers add up to"):
        fitted(["b54332210/b43322210"] * 4, storage__bytes_per_token=4 * 2 * (4 * HEAD_DIM // 8 * 2))


def test_a_front_of_banded_settings_reads_back(tmp_path: Path) -> None:
    made = fitted(LAYERS, pareto=front(("b44333222/b33222110", 0.1), (BANDED, 0.01)))
    save(made, tmp_path / "a.json")
    assert load(tmp_path / "a.json").pareto[1].layers == [BANDED] * 4
    with pytest.raises(ProfileError, match="is not a tensor spec"):
        fitted(LAYERS, pareto=[{**front((BANDED, 0.1))[0], "layers": ["b6544332/16"] * 4}])


# the transforms file


def with_file(folder: Path, data: bytes, layers: list[str] | None = None) -> Profile:
    (folder / "t.safetensors").write_bytes(data)
    return fitted(layers or LAYERS, data)


def test_rows_of_a_basis_are_the_kernels() -> None:
    assert EXTRA_ROWS == KERNEL_ROWS


def test_each_fitted_tensor_has_its_shape() -> None:
    assert transform_shapes(fitted(LAYERS)) == {
        "layers.0.key": [2, ROWS, HEAD_DIM],
        "layers.0.value": [2, ROWS, HEAD_DIM],
        "layers.1.key": [2, HEAD_DIM],
        "layers.1.value": [2, ROWS, HEAD_DIM],
        "layers.2.key": [2, ROWS, HEAD_DIM],
    }
    assert transform_shapes(profile()) == {}


def test_a_file_that_fits_is_what_evaluation_reads(tmp_path: Path) -> None:
    path = write_fitted(tmp_path / "a.json", LAYERS)
    made, centres = open_profile(path)
    assert made.layer_specs() == [LayerSpec.parse(text) for text in LAYERS]
    assert centres[0].key is not None
    assert torch.equal(basis(centres[0].key).matrix[1], torch.eye(HEAD_DIM))
    assert centres[1].key is not None
    assert centres[1].key.shape == (2, HEAD_DIM)
    assert centres[2].value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.key": [2, HEAD_DIM]}, r"layers.0.key is F32 \[2, 64\], not F32 \[2, 66, 64\]"),
        ({"layers.0.key": [2, HEAD_DIM, ROWS]}, r"not F32 \[2, 66, 64\]"),
        ({"layers.1.key": [2, ROWS, HEAD_DIM]}, "has more than|not F32"),
        ({"layers.1.key": [2, 32]}, r"not F32 \[2, 64\]"),
        ({"layers.3.key": [2, HEAD_DIM]}, "differ in layers.3.key"),
        ({"layers.2.key": None}, "differ in layers.2.key"),
    ],
)
def test_another_tensor_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shapes = {name: shape for name, shape in (transforms(LAYERS) | change).items() if shape is not None}
    with pytest.raises(ProfileError, match=message):
        check_transforms(with_file(tmp_path, safetensors(shapes)), tmp_path)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("layers.0.value", 0),
        ("layers.0.value", FLAT + HEAD_DIM * HEAD_DIM),  # the mean of the second head
        ("layers.2.key", 2 * FLAT - 1),  # the last of the file: of a first token's mean
        ("layers.1.key", 2 * HEAD_DIM - 1),  # of a centring vector
    ],
)
def test_what_is_not_finite_is_refused(tmp_path: Path, name: str, index: int, number: float) -> None:
    data = safetensors(transforms(LAYERS), numbers={name: {index: number}})
    with pytest.raises(ProfileError, match=f"{name} has a number that is not finite"):
        check_transforms(with_file(tmp_path, data), tmp_path)


def test_opposite_infinities_do_not_make_up_for_each_other_and_large_numbers_are_finite(tmp_path: Path) -> None:
    opposite = safetensors(transforms(LAYERS), numbers={"layers.1.key": {0: math.inf, 1: -math.inf}})
    with pytest.raises(ProfileError, match="not finite"):
        check_transforms(with_file(tmp_path, opposite), tmp_path)
    large = safetensors(transforms(LAYERS), numbers={"layers.1.key": dict.fromkeys(range(128), 3.4e38)})
    assert check_transforms(with_file(tmp_path, large), tmp_path) == large


@pytest.mark.parametrize(
    "numbers",
    [
        {FLAT + 5 * HEAD_DIM + 5: 0.0},  # a row of zeros in the second head
        {FLAT + 5 * HEAD_DIM + 5: 0.0, FLAT + 5 * HEAD_DIM + 9: 1.0},  # row 5 is row 9
    ],
)
def test_a_basis_that_plainly_cannot_be_inverted_is_refused(tmp_path: Path, numbers: dict[int, float]) -> None:
    data = safetensors(transforms(LAYERS), numbers={"layers.2.key": numbers})
    with pytest.raises(
        ProfileError, match=r"layers\.2\.key: the basis of head 1 has a row of zeros, or the same row twice"
    ):
        check_transforms(with_file(tmp_path, data), tmp_path)


def test_a_basis_that_is_singular_in_another_way_is_refused_where_it_is_used(tmp_path: Path) -> None:
    """`check` has no linear algebra: docs/profile.md says so."""
    twice = {5 * HEAD_DIM + 5: 0.0, 5 * HEAD_DIM + 9: 2.0}  # row 5 is twice row 9
    data = safetensors(transforms(LAYERS), numbers={"layers.2.key": twice})
    save(with_file(tmp_path, data), tmp_path / "a.json")
    _, centres = open_profile(tmp_path / "a.json")
    assert centres[2].key is not None
    with pytest.raises(BasisError, match="cannot be inverted"):
        basis(centres[2].key)


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_file(tmp_path, safetensors(transforms(LAYERS)))
    with (tmp_path / "t.safetensors").open("r+b") as stream:
        stream.truncate(2**31)
    with pytest.raises(ProfileError, match="more than"):
        check_transforms(made, tmp_path)
    (tmp_path / "t.safetensors").unlink()
    needed = 4 * sum(math.prod(shape) for shape in transforms(LAYERS).values())
    monkeypatch.setattr(transforms_module, "MAX_PAYLOAD", needed - 1)
    with pytest.raises(ProfileError, match=f"would take {needed} bytes"):
        check_transforms(made, tmp_path)
    monkeypatch.setattr(transforms_module, "MAX_PAYLOAD", needed)
    with pytest.raises(ProfileError, match="does not exist"):
        check_transforms(made, tmp_path)


def test_a_banded_profile_leaves_nothing_to_remark_and_uses_its_transforms() -> None:
    banded = fitted([BANDED] * 4)
    assert list(strict_remarks(banded, dumps(banded).encode())) == []
    unused = profile(transforms=named(b""))
    assert [remark.id for remark in strict_remarks(unused, dumps(unused).encode())] == ["unused-transforms"]
