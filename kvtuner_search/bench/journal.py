"""The raw requests of a run, JSON lines beside its record: ``FOLDER/requests.jsonl``. Neither torch nor SGLang is imported here.

A line is one of
``{"server": {...}}``: who answers from here on;
``{"cell": key, "begin": {"section": ..., "shape": {...}}}``: an attempt at a cell; what stands of that cell before is void;
``{"cell": key, "result": {...}}``: one request, a ``client.RequestResult`` as JSON;
``{"cell": key, "reading": {...}}``: free slots and memory between two rounds;
``{"cell": key, "end": true}``: the attempt is complete; a cell without it is measured again;
``{"session": {"checks": [...], "scrapes": [...]}}``: the state at the end of a session with a server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.record import Reading, Section, Shape
from kvtuner_search.errors import DataError
from kvtuner_search.json_lines import JsonLines, whole_lines

REQUESTS: Final = "requests.jsonl"


@dataclass
class CellLog:
    """The latest attempt at one cell in the journal."""

    section: Section
    shape: Shape
    results: list[RequestResult] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  # before the first round, and after each
    done: bool = False  # the attempt was finished


def cell_key(section: Section, shape: Shape) -> str:
    """Names a cell: its section, prompt and answer tokens, concurrency, and requests."""
    return f"{section}/{shape.input_tokens}/{shape.output_tokens}/{shape.concurrency}/{shape.requests}"


@dataclass
class Contents:
    """The content of a journal."""

    server: dict[str, Any] | None = None  # the latest server's account
    cells: dict[str, CellLog] = field(default_factory=dict)  # by key, in the order of their latest attempts
    sessions: list[dict[str, Any]] = field(default_factory=list)
    length: int = 0  # bytes up to the end of the last whole line

    def take(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if "server" in line:
            self.server = line["server"]
        elif "session" in line:
            self.sessions.append(line["session"])
        elif "begin" in line:
            self.cells.pop(line["cell"], None)
            begin = line["begin"]
            self.cells[line["cell"]] = CellLog(begin["section"], Shape.model_validate(begin["shape"]))
        elif "result" in line:
            self.cells[line["cell"]].results.append(RequestResult.from_json(line["result"]))
        elif "reading" in line:
            self.cells[line["cell"]].readings.append(Reading.model_validate(line["reading"]))
        else:
            self.cells[line["cell"]].done = line["end"] is True


def read(path: Path) -> dict[str, CellLog]:
    """The cells of a journal by key; errors as for ``open_contents``."""
    return open_contents(path).cells


def open_contents(path: Path) -> Contents:
    """The content of a journal. A line truncated by a kill ends it; a missing file counts as empty.

    Raises:
        DataError: if a line is not of the form above.
    """
    contents = Contents()
    for number, (line, end) in enumerate(whole_lines(path), 1):
        try:
            contents.take(line)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}, does not belong to a benchmark ({type(error).__name__}: {error}): it was edited or"
                " damaged; run again with --overwrite"
            ) from error
        contents.length = end
    return contents


class RequestJournal:
    """Appends to the journal of a run; each line is handed to the system before the next is written."""

    def __init__(self, path: Path) -> None:
        self.contents = open_contents(path)
        self._lines = JsonLines(path, self.contents.length)

    @property
    def cells(self) -> dict[str, CellLog]:
        """By key."""
        return self.contents.cells

    def identify(self, server: dict[str, Any]) -> None:
        """Keep what the server that answers from here on says of itself."""
        self._lines.write({"server": server})
        self.contents.server = server

    def begin(self, key: str, section: Section, shape: Shape) -> CellLog:
        """Start an attempt at a cell."""
        self._lines.write({"cell": key, "begin": {"section": section, "shape": shape.model_dump()}})
        self.cells.pop(key, None)
        self.cells[key] = CellLog(section, shape)
        return self.cells[key]

    def result(self, key: str, result: RequestResult) -> None:
        """Keep one request."""
        self._lines.write({"cell": key, "result": result.to_json()})
        self.cells[key].results.append(result)

    def reading(self, key: str, reading: Reading) -> None:
        """Keep a reading between two rounds."""
        self._lines.write({"cell": key, "reading": reading.model_dump()})
        self.cells[key].readings.append(reading)

    def end(self, key: str) -> None:
        """The attempt is finished."""
        self._lines.write({"cell": key, "end": True})
        self.cells[key].done = True

    def session(self, found: dict[str, Any]) -> None:
        """Keep what was known at the end of a session."""
        self._lines.write({"session": found})
        self.contents.sessions.append(found)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
