"""A record's file: canonical JSON, written completely or not at all; anything doubtful is refused with one line. Neither torch nor SGLang is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from kvtuner_search.bench.record import FORMAT, VERSION, Record
from kvtuner_search.errors import DataError
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.canonical import canonical_json, first_error, parse_json, read_limited, refuse_newer

MAX_BYTES: Final = 16 * 2**20  # a record of the `full` preset takes about 200 KB


def dumps(record: Record) -> str:
    """The text of the record's file: sorted keys, two-space indent, final newline."""
    return canonical_json(record.model_dump(mode="json"))


def write(record: Record, path: Path) -> None:
    """Write the record atomically.

    Raises:
        UsageError: if the folder cannot be written to; an older file is untouched.
    """
    write_atomic(path, dumps(record))


def read(path: Path) -> Record:
    """Read and check a record.

    Raises:
        DataError: if the file is missing, too large, not JSON, not a record, of a newer version, or contradicts itself.
    """
    return loads(read_limited(path, "a benchmark record", MAX_BYTES), str(path))


def loads(data: bytes, source: str) -> Record:
    """Parse and check the bytes of a record; ``source`` is what errors call it.

    Raises:
        DataError: as for read.
    """
    content = parse_json(data, source, "benchmark record")  # pydantic's own parser lets the last of two equal keys win
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f'{source} has no "format": "{FORMAT}": it is not a benchmark record; `kvtuner-search bench` writes them,'
            " and a report to compare with goes after --claims"
        )
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise DataError(
            f"{source} says version {str(version)[:40]!r}, not a number: it was edited or damaged; run again"
        )
    refuse_newer(version, VERSION, source)
    try:
        return Record.model_validate_json(data)
    except ValidationError as error:
        found = first_error(error, "record")
        raise DataError(f"{source}: {found}: it was edited or damaged; restore it, or run again") from error


def json_schema() -> str:
    """The text of ``profiles/schema/bench-v1.json``: JSON Schema 2020-12 of a record."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kvtuner-search benchmark record"}
    return canonical_json({**Record.model_json_schema(), **head})
