"""Rows of jsonl and parquet files: chats, null rows, half characters, and what files are called."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from words import QUESTIONS, Words, load, write

from kvtuner_search.data import load_dataset_for, load_evaluation
from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import LFS_POINTER


@pytest.mark.parametrize("name", ["NOTES.TXT", "Notes.Md", "ROWS.JSONL", "Rows.Parquet"])
def test_suffixes_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"text": "one two three"}, {"text": "four five six"}]
    if "ROWS" in name:
        write(tmp_path, list(rows), name)
    elif "Parquet" in name:
        parquet(path, list(rows))
    else:
        path.write_text("one two three\n\nfour five six\n\n")
    words = Words()
    (sample,) = load_evaluation([str(path)], words, seed=0, samples=1, length=8).samples
    assert words.decode(sample.tokens).split() == ["one", "two", "three", "four", "five", "six"]
    assert sample.source == name


def test_a_file_name_that_is_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("one two three four")
    (sample,) = load_evaluation([path], Words(), seed=0, samples=1, length=4).samples
    assert sample.source == "caf\ufffd.txt"


@pytest.mark.parametrize(
    ("line", "options", "field"),
    [
        ('{"text": "cut \\ud83d here"}', "", "text"),
        ('{"body": "\\ude00"}', "#field=body", "body"),
        ('{"messages": [{"role": "user", "content": "so \\ud83d"}]}', "", "messages"),
        ('{"q": "fine", "a": "\\udfff"}', "#answer=a#template={q} {a}", "a"),
    ],
)
def test_half_a_character_is_named_with_file_and_line(line: str, options: str, field: str, tmp_path: Path) -> None:
    good = re.sub(r"\\ud...", r"\\ud83d\\ude00", line)  # a whole one
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(
        DataError, match=rf"rows\.jsonl: line 3: field '{field}' holds half a character .'.ud"
    ) as raised:
        load(str(tmp_path / "rows.jsonl") + options)
    assert str(raised.value).isascii()


def test_null_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"one two {letter}"} for letter in "abcdefgh"]
    nulls: list[object] = [{"text": None}, None, {"text": math.nan}, {"text": None, "other": 1}]
    mixed = write(tmp_path, [*rows[:2], *nulls, *rows[2:]])
    said: list[str] = []
    numbers = {"seed": 0, "search": 3, "selection": 2, "test": 2, "length": 4}
    dataset = load_dataset_for([mixed], Words(), **numbers, say=said.append)
    assert said == [f"source 'rows.jsonl': 4 rows of null (the first: {mixed}: line 3) left out"]
    plain = load(write(tmp_path, list(rows)), length=4)
    assert [split.digest for split in dataset] == [split.digest for split in plain]
    with pytest.raises(
        DataError, match=r"0 tokens.* besides 4 rows of null .the first: .*rows\.jsonl: line 1.; needed"
    ):
        load(write(tmp_path, nulls))


def test_a_null_answer_is_no_answer(tmp_path: Path) -> None:
    spec = write(tmp_path, [*QUESTIONS[:4], {"q": "what", "a": None}, {"q": None, "a": "it"}])
    said: list[str] = []
    sources = [spec + "#answer=a#template={q} {a}"]
    assert len(load_evaluation(sources, Words(), seed=0, samples=4, length=30, say=said.append).samples) == 4
    assert said == [f"source 'rows.jsonl': 2 rows of null (the first: {spec}: line 5) left out"]


def parquet(path: Path, rows: list[dict[str, object]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


def test_parquet_gives_the_same_samples_as_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "id": n,
            "text": None if n == 3 else f"one two {letter}",
            "messages": [{"role": "user", "content": f"say {letter}"}],
        }
        for n, letter in enumerate("abcdefghij")
    ]
    name = parquet(tmp_path / "rows.parquet", rows)
    lines = write(tmp_path, list(rows))
    for options, first in (
        ("", "one two a\n"),
        ("#field=messages", "say a\n\n"),
        ("#answer=text#template={id}: {text}", "0: one two a"),
    ):
        words = Words()
        found, same = (
            load_evaluation([path + options], words, seed=0, samples=4, length=6 if "answer" in options else 4).samples
            for path in (name, lines)
        )
        assert [(s.tokens, s.scored) for s in found] == [(s.tokens, s.scored) for s in same]
        assert words.decode(found[0].tokens) == first


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no parquet", "cannot be read .*parquet"), (b"", "cannot be read"), (None, "cannot be read .No such file")],
)
def test_what_is_no_parquet_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.parquet: {message}") as raised:
        load(str(tmp_path / "x.parquet"))
    assert "\n" not in str(raised.value)
    parquet(tmp_path / "good.parquet", [{"body": "a", "vector": [1.5]}])
    with pytest.raises(DataError, match=r"good\.parquet: row 1 has no field 'text', only 'body', 'vector'"):
        load(str(tmp_path / "good.parquet"))


CHAT = ["one two", "three", "four five"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": text} for text in CHAT]},
        {"id": 1, "conversations": [{"from": "human", "value": text} for text in CHAT]},
        {"conversation": [{"role": "user", "content": [{"type": "text", "text": text}]} for text in CHAT]},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": []},
                *({"content": f" {t}\n"} for t in CHAT),
            ]
        },
        {"messages": {"role": ["user"] * 3, "content": CHAT}},  # as datasets keeps lists of objects
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_are_read_turn_by_turn(row: dict[str, object], suffix: str, tmp_path: Path) -> None:
    name = str(tmp_path / f"rows.{suffix}")
    if suffix == "jsonl":
        write(tmp_path, [row])
    else:
        parquet(Path(name), [json.loads(json.dumps(row).replace("[]", "null"))])
    words = Words()
    (sample,) = load_evaluation([name], words, seed=0, samples=1, length=9).samples
    assert words.decode(sample.tokens) == "one two\n\nthree\n\nfour five"
    assert sample.scored == ((1, 9),)


def test_a_text_wins_over_a_chat_and_a_field_over_both(tmp_path: Path) -> None:
    spec = write(tmp_path, [{"text": "one two", "messages": [{"content": "three four"}], "body": "five six"}])
    for options, text in (("", "one two"), ("#field=messages", "three four"), ("#template={body}", "five six")):
        words = Words()
        (sample,) = load_evaluation([spec + options], words, seed=0, samples=1, length=2).samples
        assert words.decode(sample.tokens) == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"content": [{"type": "image_url", "image_url": "x"}]}]}, "turn 1 of 'messages' has a part"),
        ({"messages": [{"content": "a"}, {"content": 7}]}, "turn 2 of 'messages' is int"),
        ({"messages": ["a", "b"]}, "field 'messages' is list, not text"),
        ({"messages": {"a": 1}}, "field 'messages' is dict, not text"),
        ({"other": 1}, "has no field 'text', only 'other'"),
    ],
)
def test_chats_that_cannot_be_read_are_one_line(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl: line 1.*{message}"):
        load(write(tmp_path, [row]))


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000])
def test_json_beyond_what_python_reads_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {value}')
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2") as raised:
        load(str(tmp_path / "rows.jsonl"))
    assert len(str(raised.value)) < 300


def test_text_in_parquet_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    array = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        load_evaluation([str(tmp_path / "bad.parquet")], Words(), seed=0, samples=1, length=4)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_what_is_no_file_that_ends_and_what_git_left_in_its_place(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LFS_POINTER + b"v1\noid sha256:" + b"4d" * 32 + b"\nsize 123456\n")
    with pytest.raises(DataError, match=r"is a Git LFS pointer.*git lfs pull"):
        load_evaluation([str(path)], Words(), seed=0, samples=1, length=4)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is not a regular file"):
        load_evaluation([str(path)], Words(), seed=0, samples=1, length=4)
