"""Profiles of schema version 1: read as before, brought up to date without loss, and no doubtful one let in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtuner_kernels.layout import LAYOUT_VERSION, LayerSpec
from kvtuner_kernels.reference import pack_rows
from kvtuner_search.errors import ProfileError
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.profile.canonical import canonical_json, digest_of, digest_without_validation, dumps, load, loads
from kvtuner_search.profile.checks import strict_remarks
from kvtuner_search.profile.compare import compare
from kvtuner_search.profile.migrations import migrate
from kvtuner_search.profile.schema import SCHEMA_VERSION
from kvtuner_search.profile.validation_text import is_stale, verdict
from kvtuner_search.transforms import check_transforms
from tests.search.profile_factory import digest, profile, validated

STORED = Path(__file__).parent / "stored"
FILES = [STORED / "v1.json", STORED / "reference-4.00bit.json"]
Json = dict[str, Any]


def content(path: Path = FILES[0]) -> Json:
    body: Json = json.loads(path.read_text())
    assert body["schema_version"] == body["layout_version"] == 1
    return body


def sealed(body: Json) -> bytes:
    return canonical_json(body | {"digest": digest_of(body)}).encode()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_everything_but_versions_and_digests_stays(path: Path) -> None:
    old, new = content(path), load(path).model_dump(mode="json")
    assert (new["schema_version"], new["layout_version"]) == (SCHEMA_VERSION, LAYOUT_VERSION)
    for layer in new["layers"]:
        for entry in layer.values():
            assert entry.pop("bands") is None
    for body in (old, new):
        for name in ("schema_version", "layout_version", "digest"):
            del body[name]
        del body["validation"]["profile_digest"]
    assert new == old


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_block_of_its_own_stays_its_own(path: Path) -> None:
    found = load(path)
    assert found.validation is not None
    assert not is_stale(found)
    assert verdict(found) == "pass"
    assert found.validation.profile_digest == digest_without_validation(found)


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body.update(name="renamed"),
        lambda body: body["validation"].update(profile_digest=digest("another profile")),
        lambda body: body["provenance"]["notes"].append("edited"),
        lambda body: body["layers"].reverse() or body["layers"][0]["key"].update(clip=0.9),
    ],
)
def test_a_block_of_another_profile_stays_stale(edit: Any) -> None:
    body = content(FILES[1])
    edit(body)
    assert is_stale(loads(sealed(body), "x"))


def test_a_migration_says_of_each_block_what_version_1_said() -> None:
    """The same content with an own, another and no block, as if version 1 had written it."""
    for made in (validated(), validated(failing=True), profile(), profile(validation=None)):
        body = made.model_dump(mode="json") | {"schema_version": 1, "layout_version": 1}
        for layer in body["layers"]:
            for entry in layer.values():
                del entry["bands"]
        if body["validation"]:
            body["validation"]["profile_digest"] = digest_of(body | {"validation": None})
        assert loads(sealed(body), "x") == made


def test_an_edit_of_an_old_file_is_noticed_by_its_old_digest() -> None:
    data = FILES[0].read_text().replace('"name": "stored"', '"name": "edited"')
    with pytest.raises(ProfileError, match="says digest"):
        loads(data.encode(), "x")


def test_version_1_has_no_bands() -> None:
    for change in ({"bands": "65443322", "bits": 0}, {"bands": None}):
        body = content()
        body["layers"][0]["key"] |= change
        with pytest.raises(ProfileError, match="x: schema version 1 has no bands"):
            loads(sealed(body), "x")
    body = content()
    body["layers"][0]["key"]["bits"] = 0
    with pytest.raises(ProfileError, match=r"layers\.0\.key"):
        loads(sealed(body), "x")


@pytest.mark.parametrize("version", [3, 7])
def test_a_layout_that_was_another_stays_another(version: int) -> None:
    data = sealed(content() | {"layout_version": version})
    with pytest.raises(ProfileError, match=f"layout version {version}"):
        loads(data, "x")
    assert loads(data, "x", any_layout=True).layout_version == version


@pytest.mark.parametrize("layers", [None, 3, {}, [1], [{"key": 1, "value": None}], [[]], "x"])
def test_what_is_no_profile_is_refused_as_such(layers: Any) -> None:
    with pytest.raises(ProfileError, match="layers"):
        loads(sealed(content() | {"layers": layers}), "x")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_writing_it_again_is_the_migrated_profile(path: Path) -> None:
    found = load(path)
    assert loads(dumps(found).encode(), "again") == found
    before = copy.deepcopy(content(path))
    given = content(path)
    migrate(given, "x")
    assert given == before, "what is migrated is not changed in place"


def test_the_transforms_file_beside_an_old_profile_is_its_own() -> None:
    found = load(FILES[1])
    assert check_transforms(found, STORED) == (STORED / "reference-4.00bit.safetensors").read_bytes()


def test_old_and_rewritten_do_not_differ() -> None:
    old, new = load(FILES[1]), loads(dumps(load(FILES[1])).encode(), "new")
    comparison = compare(old, new)
    assert comparison.comparable
    assert comparison.findings == []


def test_an_old_profile_stores_the_same_bytes() -> None:
    """The digest is of rows that layout version 1 packed, so what was measured with version 1 still holds."""
    found, centres = open_profile(FILES[1])
    generator = torch.Generator().manual_seed(0)
    shape = (9, found.model.num_kv_heads, found.model.head_dim)
    rows = []
    for index, spec in enumerate(found.layer_specs()):
        # integers, so that no sum is rounded in an order of its own
        key, value = (torch.randint(-9, 10, shape, generator=generator).to(torch.float16) for _ in range(2))
        rows.append(pack_rows(key, value, spec, centres[index]).numpy().tobytes())
    assert digest(repr(rows)) == "sha256:73641435781740a1537779fb0d9941f2f0aff2d142659c177f21c595791c90f5"
    assert sum(map(len, rows)) == 9 * found.storage.bytes_per_token


def test_a_strict_check_names_the_remedy() -> None:
    for path in FILES:
        remarks = {remark.id: remark.message for remark in strict_remarks(load(path), path.read_bytes())}
        assert "check --rewrite" in remarks["older-schema"]
        assert "not-canonical" not in remarks
    current = load(STORED / "v2.json")
    assert list(strict_remarks(current, (STORED / "v2.json").read_bytes())) == []


def test_specs_of_version_1_are_specs() -> None:
    assert {str(spec) for spec in load(FILES[0]).layer_specs()} == {
        str(LayerSpec.parse(text))
        for text in (f"{_text(layer['key'])}/{_text(layer['value'])}" for layer in content()["layers"])
    }


def _text(entry: Json) -> str:
    if entry["bits"] == 16:
        return "16"
    flags = ("-c" if entry["centred"] else "") + ("-r" if entry["rotated"] else "")
    clip = "" if entry["clip"] == 1.0 else f"-x{entry['clip']:g}"
    return f"{entry['bits']}-g{entry['group_size']}-{'sym' if entry['symmetric'] else 'asym'}{flags}{clip}"
