"""Reading profiles: what is accepted, and everything that is refused before it can do harm."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search import __version__
from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.canonical import MAX_BYTES, canonical_json, digest_of, dumps, load, loads, seal
from kvtuner_search.profile.migrations import MIGRATIONS, migrate
from kvtuner_search.profile.schema import SCHEMA_VERSION
from tests.search.profile_factory import content, front, measure, profile, write

STORED = Path(__file__).parent / "stored"


def sealed(**changes: Any) -> bytes:
    """The bytes of a profile with raw changes and a digest that fits them."""
    body = profile().model_dump(mode="json") | changes
    return canonical_json(body | {"digest": digest_of(body)}).encode()


def test_a_profile_survives_writing_and_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", pareto=front(("4-g64-asym/4-g64-asym", 0.1), ("8-g64-asym/8-g64-asym", 0.01)))
    first = load(path)
    assert dumps(first).encode() == path.read_bytes()
    assert loads(path.read_bytes(), "again") == first


def test_a_stored_file_of_each_version_is_read() -> None:
    """Files of the past are the contract: vN.json was written when version N was current and is never rewritten."""
    files = sorted(STORED.glob("v*.json"))
    assert [path.name for path in files] == [f"v{version}.json" for version in range(1, SCHEMA_VERSION + 1)]
    for path in files:
        assert load(path).name == "stored"


def test_every_migration_has_a_version_before_the_current_one() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION)), "one migration for each version that is not current"


def test_migrations_are_applied_one_after_another() -> None:
    registry = {
        1: lambda old: {**old, "colour": old["color"], "log": ["1 to 2"]},
        2: lambda old: {**old, "log": [*old["log"], "2 to 3"]},
    }
    assert migrate({"schema_version": 1, "color": "red"}, "x", registry, 3) == {
        "schema_version": 3,
        "color": "red",
        "colour": "red",
        "log": ["1 to 2", "2 to 3"],
    }
    with pytest.raises(ProfileError, match="version 0, which never existed"):
        migrate({"schema_version": 0}, "x", registry, 3)


def test_a_newer_version_names_the_release_that_reads_it() -> None:
    newer = SCHEMA_VERSION + 1
    provenance = profile().provenance.model_dump(mode="json") | {"tool": "kvtuner-search 7.2.0"}
    with pytest.raises(
        ProfileError, match=rf"version {newer}, this kvtuner-search {__version__} .* install kvtuner-search 7.2.0"
    ):
        loads(sealed(schema_version=newer, provenance=provenance), "x")
    with pytest.raises(ProfileError, match="install the kvtuner-search that wrote it"):
        loads(sealed(schema_version=newer, provenance={"tool": "evil\n"}), "x")


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_refused(version: int) -> None:
    with pytest.raises(ProfileError, match="never existed"):
        loads(sealed(schema_version=version), "x")


@pytest.mark.parametrize("version", [None, "1", True, 1.0, [1]])
def test_a_version_that_is_none_is_refused(version: object) -> None:
    with pytest.raises(ProfileError, match="no schema_version"):
        loads(sealed(schema_version=version), "x")


def test_another_layout_is_refused_unless_asked_for() -> None:
    for version in (LAYOUT_VERSION - 1, LAYOUT_VERSION + 1):
        data = sealed(layout_version=version)
        with pytest.raises(
            ProfileError, match=f"layout version {version}, these kernels store version {LAYOUT_VERSION}"
        ):
            loads(data, "x")
        assert loads(data, "x", any_layout=True).layout_version == version


def test_an_edit_is_noticed() -> None:
    data = dumps(profile()).replace('"name": "small"', '"name": "large"')
    with pytest.raises(ProfileError, match="says digest"):
        loads(data.encode(), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b'"x"', "holds a JSON str"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "not a JSON number"),
        (b'{"a": 1e999}', "beyond the range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100 + b"]" * 100, "nests deeper"),
        (b'{"a": 1} x', "Extra data"),
    ],
)
def test_what_is_no_strict_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        loads(text, "x")


def test_a_joined_surrogate_pair_is_a_character() -> None:
    body = profile().model_dump(mode="json")
    body["provenance"]["notes"] = ["😀"]
    body["digest"] = digest_of(body)
    assert loads(json.dumps(body).encode(), "x").provenance.notes == ["😀"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "Extra inputs"),
        ({"name": "../x"}, "name"),
        ({"storage__bytes_per_token": 1}, "storage says 1 bytes a token, the layers add up to 832"),
        ({"storage__effective_bits": 4.0}, "effective bits"),
        ({"model__num_layers": 5}, "4 layers are given, the model has 5"),
        ({"model__num_attention_heads": 3}, "do not share 2 KV heads"),
        ({"quality": [measure(), measure()]}, "kl/recall/test is given twice"),
        ({"quality": [measure(ci_low=1.0)]}, "above"),
        ({"quality": [measure() | {"value": 10**400}]}, "quality"),
        ({"transforms": {"file": "../x.safetensors", "digest": "sha256:" + "0" * 64}}, "transforms.file"),
        ({"pareto": [{**front(("16/16", 0.1))[0], "bytes_per_token": 7}]}, "says 7 bytes a token"),
        ({"pareto": [{**front(("16/16", 0.1))[0], "layers": ["16/16"]}]}, "a Pareto point has 1 layers"),
        ({"pareto": [{**front(("16/16", 0.1))[0], "layers": ["x"] * 4}]}, "not a layer spec"),
        ({"pareto": front(("8-g64-asym/8-g64-asym", 0.1), ("4-g64-asym/4-g64-asym", 0.01))}, "not a Pareto front"),
    ],
)
def test_an_inconsistent_profile_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        seal(content(**changes))


def test_centring_needs_a_transforms_file() -> None:
    with pytest.raises(ProfileError, match="no transforms file"):
        seal(content("4-g64-asym-c/4-g64-asym"))


def test_a_huge_file_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(2**30)  # sparse: reading it would take a second and a GiB
    with pytest.raises(ProfileError, match=f"more than {MAX_BYTES} bytes"):
        load(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", ".", "zero"):
        with pytest.raises(ProfileError, match="not a regular file"):
            load(tmp_path / name)
    for name, message in (("loop", "cannot read"), ("gone", "does not exist"), ("a\0b", "cannot read")):
        with pytest.raises(ProfileError, match=message):
            load(tmp_path / name)


def test_a_link_to_a_profile_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    (tmp_path / "link.json").symlink_to(path)
    assert load(tmp_path / "link.json") == load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"k" * 5000: 1},
        {"provenance": content()["provenance"] | {"versions": {"k" * 5000: "1"}}},
        {"model": content()["model"] | {"k" * 61: 1}},
    ],
    ids=["top", "nested", "just-too-long"],
)
def test_errors_quote_at_most_60_characters_of_a_key(changes: dict[str, Any]) -> None:
    with pytest.raises(ProfileError) as caught:
        loads(sealed(**changes), "x")
    assert "k" * 59 + "…" in str(caught.value)
    assert "k" * 60 not in str(caught.value)
