"""Optuna's journal file with a checksum in every line, so that a changed, lost or repeated line is noticed.

Optuna replays a journal as it is: a changed digit would be another loss, and so another profile. Each line therefore has a hash of its
content and position. A line that a killed writer left half written is cut off when the file is next opened; that loses nothing, because
a writer continues only when the whole line is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

from kvtuner_search.errors import DataError

LOCK_GRACE: Final = 5  # seconds after which the journal's lock is taken from a worker that was killed while writing
CHECK: Final = "check"  # field of a line
DAMAGED: Final = "name another file, restore this one from a copy, or delete it and start again"


class CheckedJournal(BaseJournalBackend):
    """A journal in one file that several processes may share.

    Args:
        path: the file; it is created if necessary, but its folder must exist.

    Raises:
        DataError: if the file is not such a journal; it is left unchanged.
        OSError: if it cannot be read or written.

    Example:
        ``optuna.storages.JournalStorage(CheckedJournal(Path("study.journal")))``
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = JournalFileOpenLock(str(path), grace_period=LOCK_GRACE)
        self.offsets = [0]  # of each line that was read, and of what follows the last one
        path.open("ab").close()
        self._drop_torn_line()
        status = path.stat()
        self.file = (status.st_dev, status.st_ino)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The lines from one number on; a last line that another process is still writing is left for the next call."""
        with self.path.open("rb") as stream:
            self._same(stream.fileno())
            number = min(log_number_from, len(self.offsets) - 1)
            stream.seek(self.offsets[number])
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                offset = self.offsets[number]
                number += 1
                if number == len(self.offsets):
                    self.offsets.append(offset + len(line))
                if number > log_number_from:
                    yield self._checked(line, offset, number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines. Lines that cannot be written completely, as on a full disk, are removed again, so that no line begins inside another."""
        self.lock.acquire()
        try:
            with self.path.open("r+b") as stream:
                self._same(stream.fileno())
                start = offset = stream.seek(0, os.SEEK_END)
                lines = []
                for log in logs:
                    lines.append(_sealed(json.dumps(log, separators=(",", ":")).encode(), offset))
                    offset += len(lines[-1])
                try:
                    stream.write(b"".join(lines))
                    stream.flush()
                    os.fsync(stream.fileno())
                except OSError:
                    os.ftruncate(stream.fileno(), start)
                    raise
        finally:
            self.lock.release()

    def _same(self, handle: int) -> None:
        status = os.fstat(handle)
        if (status.st_dev, status.st_ino) != self.file:
            raise DataError(
                f"the study {self.path} was replaced while it was in use: start again with the current file"
            )

    def _drop_torn_line(self) -> None:
        """Remove the half line and the lock that a killed writer may have left."""
        if self.path.stat().st_size == 0:
            return
        self.lock.acquire()  # waits for a writer, and LOCK_GRACE at most for a dead one
        try:
            with self.path.open("r+b") as stream:
                data = stream.read()
                whole = data.rfind(b"\n") + 1
                first = data[: data.find(b"\n") + 1]
                if first:
                    self._checked(first, 0, 1)  # nothing of a file that is not a journal is cut off
                elif not data.startswith(_START):
                    raise DataError(f"{self.path} is not a study: {DAMAGED}")
                if whole < len(data):
                    stream.truncate(whole)
        finally:
            self.lock.release()

    def _checked(self, line: bytes, offset: int, number: int) -> dict[str, Any]:
        try:
            log = json.loads(line)
        except ValueError:
            log = None
        if not isinstance(log, dict) or "op_code" not in log:
            raise DataError(f"{self.path}: line {number} does not belong to a study: {DAMAGED}")
        if CHECK not in log:
            raise DataError(
                f"{self.path}: line {number} has no checksum, so the study belongs to another program or an earlier version: {DAMAGED}"
            )
        del log[CHECK]
        body = line[: line.rfind(f',"{CHECK}":"'.encode())] + b"}"
        if _sealed(body, offset) != line:
            raise DataError(f"{self.path}: line {number} was changed after it was written: {DAMAGED}")
        return log


_START: Final = b'{"op_code":'  # of every line that Optuna writes


def _sealed(body: bytes, offset: int) -> bytes:
    """One line of the file; its checksum covers its position, so that removed or repeated lines are detected."""
    check = hashlib.sha256(b"%d %s" % (offset, body)).hexdigest()[:16]
    return body[:-1] + f',"{CHECK}":"{check}"}}\n'.encode()
