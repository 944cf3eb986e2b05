"""Rows of data files and of the hub, and the text in their fields: plain, numbers, or the turns of a chat."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import DataError, UsageError, first_line
from kvtuner_search.profile.canonical import LFS_POINTER, lfs_message

Row = Mapping[str, object]
CHATS: Final = ("messages", "conversations", "conversation")  # fields that hold a chat, where no field is named
BATCH: Final = 1024  # rows of a parquet file that are read at a time


@dataclass
class Skipped:
    """Rows that hold null where text should be; they are left out."""

    rows: int = 0
    first: str = ""  # where the first one is

    def add(self, where: str) -> None:
        """Count one."""
        self.first = self.first or where
        self.rows += 1


def locate(location: str, fields: Collection[str]) -> Iterator[tuple[str, Row | None]]:
    """The rows of a file or hub dataset, each with where it is: the file and the line, or the number from 1 on.

    Args:
        location: a path, or ``hub:NAME[:CONFIG][:SPLIT]``.
        fields: the fields needed of each row; rows may have more.

    Raises:
        UsageError, DataError: if it cannot be read.
    """
    if not location.startswith("hub:"):
        path = Path(location)
        yield from READERS.get(path.suffix.lower(), _jsonl)(path, fields)
        return
    name, *rest = location.removeprefix("hub:").split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"source {location!r} is not hub:NAME[:CONFIG][:SPLIT]")
    config = rest[0] or None if rest else None
    for number, row in enumerate(hub_rows(name, config, rest[1] if len(rest) == 2 else "train"), start=1):
        yield f"{location}: row {number}", row


def hub_rows(name: str, config: str | None, split: str) -> Iterable[Row]:
    """The rows of a dataset of the Hugging Face hub (or of a local folder), downloaded once and cached by ``datasets``.

    Raises:
        DataError: if it cannot be reached, or has no such configuration or split.
    """
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise DataError(
            f"hub dataset {name!r} (configuration {config or 'default'}, split {split}) cannot be loaded: {reason}:"
            " check the names and the network, or give a local .jsonl file"
        ) from error
    return rows


def text_of(row: Row, field: str, where: str) -> str | None:
    """The text in a row's field: a number as it is written, the turns of a chat joined by blank lines; None for null.

    Raises:
        DataError: if there is no such field, or it holds something else, or half a character.
    """
    if field not in row:
        raise DataError(f"{where} has no field {field!r}, only {', '.join(map(repr, row))}: name one of these")
    value = row[field]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    turns = _turns(value)
    if turns is not None:
        contents = [_content(turn, f"{where}: turn {n} of {field!r}") for n, turn in enumerate(turns, start=1)]
        found = [content.strip() for content in contents if content is not None]
        if not found:
            return None
        value = "\n\n".join(found)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{where}: field {field!r} is {type(value).__name__}, not text: name a field that holds text, or a chat's turns"
        )
    text = str(value)
    check_characters(text, f"{where}: field {field!r}")
    return text


def check_characters(text: str, what: str) -> None:
    """Refuse half of a character, which JSON can express but no tokenizer accepts.

    Raises:
        DataError: if there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half a character ({text[error.start]!a} at {error.start}, a lone surrogate):"
            " write the whole character, or leave the row out"
        ) from error


def _turns(value: object) -> list[Mapping[str, Any]] | None:
    """The turns of a chat, as lists of objects or, as ``datasets`` has it, an object of lists; None for anything else."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if isinstance(value, list) and all(
        isinstance(turn, Mapping) and ("content" in turn or "value" in turn) for turn in value
    ):
        return value
    return None


def _content(turn: Mapping[str, Any], where: str) -> str | None:
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, list):  # parts
        wrong = [part for part in content if not isinstance(part, Mapping) or not isinstance(part.get("text"), str)]
        if wrong:
            raise DataError(f"{where} has a part that is not text: leave such chats out")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where} is {type(content).__name__}, not text: leave such chats out")
    return content


def _jsonl(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row | None]]:
    # StringIO splits at newlines only; str.splitlines would also cut inside JSON strings (U+2028).
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}): write one object a line") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{where} cannot be read ({str(error).partition(';')[0]}): leave it out") from error
        if row is not None and not isinstance(row, dict):
            raise DataError(f"{where} is {type(row).__name__}, not an object: write one object a line")
        yield where, row


def _check_file(path: Path) -> None:
    """Refuse anything but a regular file, and Git LFS pointers.

    Raises:
        DataError: with the remedy.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is not a regular file: give a file")
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # reading it gives the reason
    if pointer:
        raise DataError(lfs_message(path))


def _parquet(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row | None]]:
    import pyarrow
    import pyarrow.parquet

    _check_file(path)
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in fields]
            number = 0
            # If a needed column is missing, all columns are read, so that the error can name them.
            for batch in file.iter_batches(BATCH, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # also text that is not UTF-8
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{path}: cannot be read ({reason}): check that it is a parquet file") from error
    if number == 0:
        raise DataError(f"{path}: is empty: give a file with rows")


READERS: Final = {".jsonl": _jsonl, ".parquet": _parquet}  # files of rows, by suffix


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: if it cannot be read or is empty.
    """
    _check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}): convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the path") from error
    if not text.strip():
        raise DataError(f"{path}: is empty: give a file with text")
    return text
