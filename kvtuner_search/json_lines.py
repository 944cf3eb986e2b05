"""The one journal format: a JSON object a line, each handed to the system before the next is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtuner_search.files import refuse_unusual


def whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line that is whole, with the offset of its end; what follows the first broken one is ignored. A file that is not there is empty.

    Raises:
        UsageError: if it is a pipe, device, socket or folder.
    """
    if not path.exists():
        return
    refuse_unusual(path)
    end = 0
    with path.open("rb") as stream:
        for raw in stream:
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                return
            end += len(raw)
            yield line, end


class JsonLines:
    """Appends lines to a file.

    Args:
        path: made if it does not exist.
        keep: bytes of it that are kept, up to the end of the last whole line; a line that a kill cut short goes.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._stream = path.open("ab")
        self._stream.truncate(keep)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
