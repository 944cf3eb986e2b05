"""Every list and text of a profile has a bound, so every accepted file is shown soon; and equal content has one digest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.calibration.outputs import thinned
from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.canonical import (
    MAX_BYTES,
    canonical_json,
    digest_of,
    dumps,
    json_schema,
    loads,
    seal,
)
from kvtuner_search.profile.fields import MAX_MEASURES, MAX_NOTES
from kvtuner_search.profile.schema import MAX_FRONT, MAX_POINTS, Profile
from kvtuner_search.profile.text import bounded
from kvtuner_search.profile.validation_text import is_stale
from tests.search.large_profiles import LARGEST, block, datum, front_of, taken, write_largest, write_small
from tests.search.profile_factory import content, measure, profile, validated

ROOT = Path(__file__).resolve().parents[3]
STORED = Path(__file__).parent / "stored"
Json = dict[str, Any]


def test_the_schema_bounds_every_list_and_text() -> None:
    """No array without maxItems, no text without maxLength, a pattern or a set of values, no open object without maxProperties."""
    open_ended = []

    def walk(node: Any, where: str) -> None:
        if isinstance(node, list):
            for index, part in enumerate(node):
                walk(part, f"{where}.{index}")
        if not isinstance(node, dict):
            return
        kind = node.get("type")
        if kind == "array" and "maxItems" not in node:
            open_ended.append(where)
        if kind == "string" and not {"maxLength", "pattern", "enum", "const"} & set(node):
            open_ended.append(where)
        if kind == "object" and "properties" not in node and "maxProperties" not in node:
            open_ended.append(where)
        assert "pattern" not in node or re.search(r"[^+*]\$$", node["pattern"]), (
            f"{where}: a pattern that ends has a bound"
        )
        for key, part in node.items():
            walk(part, f"{where}.{key}")

    walk(json.loads(json_schema()), "schema")
    assert open_ended == []


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": [measure(data=f"d{i}") for i in range(MAX_MEASURES + 1)]},
        {"provenance__data": [datum(i) for i in range(MAX_MEASURES + 1)]},
        {"provenance__notes": ["x"] * (MAX_NOTES + 1)},
        {"provenance__notes": ["x" * 4097]},
        {"provenance__versions": {f"v{i}": "1" for i in range(65)}},
        {"provenance__versions": {"v" * 129: "1"}},
        {"provenance__versions": {"v": "1" * 257}},
        {"pareto": front_of(MAX_POINTS + 1, MAX_POINTS + 1)},
        {"pareto": [{**front_of(1, 4)[0], "layers": ["x" * 129] * 4}]},
        {"model__id": "x" * 513},
        {"validation": block(notes=["x"] * (MAX_NOTES + 1))},
        {"validation": block(notes=["x" * 4097])},
        {"validation": block(versions={f"v{i}": "1" for i in range(65)})},
        {"validation": block(checks=[{**block()["checks"][0], "name": f"c{i}"} for i in range(MAX_MEASURES + 1)])},
        {"validation": block(likelihood=[measure("nll", data=f"d{i}") for i in range(MAX_MEASURES + 1)])},
        {"validation": block(data=[datum(i) for i in range(MAX_MEASURES + 1)])},
        {"validation": block(offline=block()["offline"] * 9)},
        {"validation": block(greedy__first_divergence=[1] * (2**16 + 1))},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_too_long_is_refused(changes: Json) -> None:
    with pytest.raises(ProfileError, match=r"at most|should have|more than"):
        seal(content(**changes))


def test_a_front_has_a_bound_on_all_its_specs() -> None:
    count = MAX_FRONT // 512
    seal(content("8-g64-asym/8-g64-asym", 512, pareto=front_of(count, 512)))
    with pytest.raises(ProfileError, match=f"specs, more than {MAX_FRONT}"):
        seal(content("8-g64-asym/8-g64-asym", 512, pareto=front_of(count + 1, 512)))


@pytest.mark.parametrize(
    ("points", "layers", "kept"),
    [(3, 4, 3), (MAX_POINTS, 4, MAX_POINTS), (2000, 4, MAX_POINTS), (2000, 128, MAX_FRONT // 128), (9, 4096, 8)],
)
def test_calibration_thins_a_front_that_is_too_long(points: int, layers: int, kept: int) -> None:
    front = [{"loss": -number, "layers": ["16/16"] * layers} for number in range(points)]
    found = thinned(front)
    assert len(found) == kept
    assert (found[0], found[-1]) == (front[0], front[-1])
    assert [point["loss"] for point in found] == sorted({point["loss"] for point in found}, reverse=True)


def test_notes_are_cut_to_the_bound() -> None:
    assert bounded(["a", "b"], 2) == ["a", "b"]
    assert bounded([str(i) for i in range(100)], 64)[-2:] == ["62", "and 37 more"]
    assert bounded(["x" * 5000], 64) == ["x" * 4095 + "…"]


# the largest files that are accepted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("largest")
    write_largest(folder)
    for name in ("old.json", "new.json"):
        assert 0.9 * MAX_BYTES < (folder / name).stat().st_size <= MAX_BYTES
    return folder


@pytest.mark.parametrize("command", LARGEST)
def test_the_largest_files_take_bounded_work_and_300_mb(command: str, folder: Path, tmp_path: Path) -> None:
    """4,096 layers, 32,768 specs in fronts, 530 measures. To look at each pair of layers once takes 8 million lines more."""
    write_small(tmp_path)
    found = taken(command, folder, small=tmp_path)
    assert found.code in (0, 1)
    assert 3_000_000 < found.work < 11_000_000
    assert found.peak < 300 * 10**6


def test_tables_end_after_a_hundred_rows_and_say_so(folder: Path) -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "kvtuner_search", "show", "new.json"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert "more, which --json has" in done.stdout


# one digest for one content


def spelled(text: str, old: str, new: str) -> bytes:
    assert old in text
    return text.replace(old, new).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"clip": 1.0', '"clip": 1'),
        ('"clip": 1.0', '"clip": 1.000'),
        ('"clip": 1.0', '"clip": 10e-1'),
        ('"baseline": 0.0', '"baseline": 0'),
        ('"baseline": 0.0', '"baseline": -0.0'),
        ('"baseline": 0.0', '"baseline": 0e5'),
        ('"value": 0.02', '"value": 2e-2'),
        ('"value": 0.02', '"value": 0.0200000000000000001'),
        ('"bands": null,', ""),
        ('"centred": false,', ""),
        ('"notes": [],', ""),
        ('"validation": null', '"validation": null'),
        ('"name": "small"', '"name": "\\u0073mall"'),
        ("\n", " "),
    ],
)  # fmt: skip
def test_a_digest_does_not_depend_on_how_it_is_spelled(old: str, new: str) -> None:
    made = profile()
    data = spelled(dumps(made), old, new)
    assert loads(data, "x") == made
    body = json.loads(data)
    resealed = json.dumps(body | {"digest": digest_of(body)}).encode()
    assert loads(resealed, "x") == made, "nor on whether the file's own digest was of this spelling"


def test_spelling_does_not_make_a_block_stale() -> None:
    made = validated()
    data = spelled(dumps(made), '"clip": 1.0', '"clip": 1')
    assert loads(data, "x") == made
    body = json.loads(data)
    body["validation"]["profile_digest"] = digest_of(body | {"validation": None})
    found = loads(json.dumps(body | {"digest": digest_of(body)}).encode(), "x")
    assert found == made
    assert not is_stale(found)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"clip": 1.0', '"clip": 1'), ('"baseline": 0.0', '"baseline": 0'), ('"rotated": false,', ""), ('"symmetric": false', '"symmetric":false')],
)  # fmt: skip
def test_the_same_for_schema_version_1(old: str, new: str) -> None:
    text = (STORED / "v1.json").read_text()
    made = loads(text.encode(), "x")
    data = spelled(text, old, new)
    assert loads(data, "x") == made
    body = json.loads(data)
    body["validation"]["profile_digest"] = digest_of(body | {"validation": None})
    assert loads(json.dumps(body | {"digest": digest_of(body)}).encode(), "x") == made


@pytest.mark.parametrize("source", [dumps(profile()), (STORED / "v1.json").read_text()], ids=["current", "version-1"])
def test_other_numbers_have_other_digests(source: str) -> None:
    number = re.search(r'"value": (\d\.\d+)', source)
    assert number
    for data in (
        spelled(source, number[0], f'"value": {float(number[1]) * (1 + 1e-15)!r}'),
        spelled(source, '"clip": 1.0', '"clip": 0.99'),
    ):
        with pytest.raises(ProfileError, match="says digest"):
            loads(data, "x")


def test_a_count_that_is_spelled_as_a_fraction_stays_refused() -> None:
    with pytest.raises(ProfileError, match=r"quality\.0\.tokens"):
        loads(spelled(dumps(profile()), '"tokens": 51200', '"tokens": 51200.0'), "x")
    with pytest.raises(ProfileError, match=r"layers\.0\.key\.bits"):
        loads(spelled(dumps(profile()), '"bits": 8', '"bits": true'), "x")
    assert loads(spelled(dumps(profile()), '"bits": 8', '"bits": 8.0'), "x") == profile()


def test_negative_zero_is_zero() -> None:
    assert seal(content(quality=[measure(baseline=-0.0)])) == seal(content(quality=[measure(baseline=0.0)]))
    assert isinstance(profile(), Profile)
    assert canonical_json(profile().model_dump(mode="json")) == dumps(profile())
