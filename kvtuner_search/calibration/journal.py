"""Optuna's journal file with a checksum in every line, so that a changed, lost or repeated line is noticed.

Optuna replays a journal as it is: a changed digit would be another loss, and so another profile. Each line therefore has a hash of its
content and position. A line that a killed writer left half written is cut off when the file is next opened; that loses nothing, because
a writer continues only when the whole line is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

from kvtuner_search.errors import DataError

LOCK_GRACE: Final = 5  # seconds after which the journal's lock is taken from a worker that was killed while writing
STOPPED: Final = (
    60.0  # seconds to wait for a worker that was stopped while writing, and so still has the file's own lock
)
CHECK: Final = "check"  # field of a line
LOST: Final = "put it back as it was and continue with --resume, or start again"
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
        target = path.resolve()  # one lock, whatever links lead to it
        self.lock = JournalFileOpenLock(str(target), grace_period=LOCK_GRACE)
        self.lock_file = target.with_name(f"{target.name}.lock")
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
        """Add lines. What cannot be written whole, as on a full disk, is taken back, so that no line begins inside another."""
        with self._writing() as stream:
            self._same(stream.fileno())
            self._cut_torn_line(stream, self.offsets[-1], len(self.offsets))
            start = offset = stream.seek(0, os.SEEK_END)
            lines = []
            for log in logs:
                lines.append(_sealed(json.dumps(log, separators=(",", ":")).encode(), offset))
                offset += len(lines[-1])
            left = memoryview(b"".join(lines))
            try:
                while left:  # an almost full disk takes a part
                    left = left[stream.write(left) :]
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), start)
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[io.FileIO]:
        """The file, for this process alone.

        The lock file beside it is what other machines see, but it is taken from whoever has it for LOCK_GRACE, a worker that is stopped
        among them. So the file itself is locked as well, which the kernel undoes only when the worker ends.
        """
        if self.lock_file.is_symlink():
            raise DataError(f"{self.lock_file} is a link, which no run makes: delete it, and continue with --resume")
        self.lock.acquire()  # waits for a writer, and LOCK_GRACE at most for a dead one
        try:
            # Unbuffered: bytes that could not be written must not come after all when the file is closed.
            with self.path.open("r+b", buffering=0) as stream:
                self._lock(stream.fileno())
                yield stream
        finally:
            with contextlib.suppress(RuntimeError):  # it was taken from this process, which had been stopped
                self.lock.release()

    def _lock(self, handle: int) -> None:
        deadline = time.monotonic() + STOPPED
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"the study {self.path} is locked: a worker was stopped while it wrote, or another program has it:"
                        " let that go on or end it, then continue with --resume"
                    ) from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    return  # a file system without such locks
                raise

    def _same(self, handle: int) -> None:
        status = os.fstat(handle)
        if (status.st_dev, status.st_ino) != self.file:
            raise DataError(f"the study {self.path} was replaced while it was in use: {LOST}")
        if status.st_size < self.offsets[-1]:
            raise DataError(f"the study {self.path} was cut short while it was in use: {LOST}")

    def _drop_torn_line(self) -> None:
        if self.path.stat().st_size > 0:
            with self._writing() as stream:
                self._cut_torn_line(stream, 0, 1)

    def _cut_torn_line(self, stream: io.FileIO, offset: int, number: int) -> None:
        """A writer that was killed may have left half a line at the end; nothing of a file that is no journal is cut off.

        Args:
            stream: the file, locked.
            offset: where to begin to look: a place where a line begins.
            number: of that line, from 1.
        """
        stream.seek(offset)
        data = stream.read()
        first = data[: data.find(b"\n") + 1]
        if first:
            self._checked(first, offset, number)
        elif data and not data.startswith(_START):
            raise DataError(f"{self.path} is not a study: {DAMAGED}")
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            stream.truncate(offset + whole)

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
