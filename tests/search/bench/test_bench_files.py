"""A record's file: written whole, read with one line of error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvtuner_search.bench import files
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, UsageError
from tests.search.bench import record_factory as made


def test_write_and_read(tmp_path: Path) -> None:
    record, path = made.record(), tmp_path / "new" / "record.json"
    files.write(record, path)
    assert files.read(path) == record
    assert path.read_text() == files.dumps(record)
    assert path.read_text().endswith("}\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"], "no temporary file stays"


def test_a_record_of_the_preset_seed_is_one_of_legacy(tmp_path: Path) -> None:
    record, path = made.record(small=True), tmp_path / "record.json"
    path.write_text(files.dumps(record).replace('"preset": "legacy"', '"preset": "seed"'))
    assert files.read(path) == record
    assert run(["bench", "compare", str(path), str(path)]) == 0
    assert run(["bench", "report", str(path), "--html", str(tmp_path / "page.html")]) == 0
    assert "preset legacy" in (tmp_path / "page.html").read_text()


def test_the_text_is_canonical() -> None:
    text = files.dumps(made.record(small=True))
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def test_a_failed_write_loses_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("kept")
    with pytest.raises(UsageError, match=r"cannot write .*choose a folder"):
        files.write(made.record(small=True), blocked / "record.json")
    assert blocked.read_text() == "kept"


def damaged() -> dict[str, tuple[bytes, str]]:
    good = files.dumps(made.record(small=True))
    body = json.loads(good)
    older = body | {"version": "1"}
    newer = body | {"version": 2, "unheard-of": {}}
    unknown = body | {"unheard-of": {}}
    return {
        "empty": (b"", "is not valid JSON"),
        "binary": (b"\xff\xfe", "it is not a benchmark record, or is damaged"),
        "cut": (good[:-100].encode(), "is not valid JSON"),
        "twice": (good.replace('"version": 1', '"version": 1, "version": 1').encode(), "is given twice"),
        "nan": (good.replace('"mean": ', '"mean": NaN, "was": ', 1).encode(), "NaN is not a JSON number"),
        "deep": (b"[" * 100, "it is not a benchmark record"),
        "profile": (b'{"schema_version": 1}', "it is not a benchmark record; .*goes after --claims"),
        "list": (b"[]", "it is not a benchmark record"),
        "version": (json.dumps(older).encode(), "says version '1', not a number"),
        "newer": (json.dumps(newer).encode(), "has version 2 .* reads up to 1"),
        "unknown field": (json.dumps(unknown).encode(), "unheard-of: Extra inputs"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_anything_doubtful_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    data, message = damaged()[kind]
    path = tmp_path / "record.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        files.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == data


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    big = tmp_path / "big"
    with big.open("wb") as stream:
        stream.truncate(files.MAX_BYTES + 1)
    for path, message in (
        (tmp_path / "none", "does not exist: give the path of a benchmark record"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (big, "has more than"),
    ):
        with pytest.raises(DataError, match=message):
            files.read(path)
