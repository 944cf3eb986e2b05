"""The workers of a study, and whether a worker has certainly ended.

A worker has a random id. Host names, process ids and clocks prove little: containers share host names and start process ids from 1,
and a worker that is stopped for an hour is not gone. So only proof counts. A worker holds a lock on a file of its own beside the study's
file, which the kernel releases when the worker ends, for whatever reason and in whatever container. For a study in a database
server there is no such file; a process is looked up if it has the same kernel and process id namespace. A worker that cannot be checked
counts as alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import uuid
from pathlib import Path
from typing import Any, Final

# File systems used by a single kernel, so that a free lock means that nobody anywhere holds it.
LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
GONE: Final = ("Z", "X", "x")  # states of a process that has ended but was not reaped


class Worker:
    """This process's part in a study, while it is at work.

    Args:
        file: the study's file; None if it is in a database server.
    """

    def __init__(self, file: Path | None) -> None:
        self.id = uuid.uuid4().hex
        self.locks = file.with_name(f"{file.name}.workers") if file is not None else None
        self._lock: int | None = None

    def begin(self) -> dict[str, Any]:
        """Take the lock and return the description that other workers need, as plain JSON."""
        pid = os.getpid()
        if self.locks is not None and self._lock is None:
            with contextlib.suppress(
                OSError
            ):  # without a lock, other workers assume that this one is alive, or look for its process
                self.locks.mkdir(exist_ok=True)
                handle = os.open(self.locks / self.id, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(handle)
                    raise
                self._lock = handle
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "boot": _boot(),
            "processes": _namespace(),
            "pid": pid,
            "started": _started(pid),
            "locked": self._lock is not None,
        }

    def end(self) -> None:
        """Release the lock."""
        if self._lock is not None and self.locks is not None:
            with contextlib.suppress(OSError):
                (self.locks / self.id).unlink()
                self.locks.rmdir()  # the last one; fails as long as there are others
            os.close(self._lock)
            self._lock = None

    def ended(self, other: Any) -> bool:
        """Whether another worker, described by its ``begin``, has reported its end (None), or has provably ended."""
        if other is None:
            return True
        try:
            same_kernel = other["boot"] is not None and other["boot"] == _boot()
            if other["id"] == self.id:
                return False
            if other["locked"] and self.locks is not None and (same_kernel or _local(self.locks)):
                found = _free(self.locks / other["id"])
                if found is not None:
                    return found
            place = (socket.gethostname(), _namespace())
            if not same_kernel or place[1] is None or (other["host"], other["processes"]) != place:
                return False
            return not _running(int(other["pid"]), other["started"])
        except (KeyError, TypeError, ValueError):
            return False  # not written by this program


def _free(path: Path) -> bool | None:
    """Whether nobody holds a worker's lock; None if the file no longer exists."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        with contextlib.suppress(OSError):
            path.unlink()
        return True
    finally:
        os.close(handle)


def _running(pid: int, started: str | None) -> bool:
    """Whether a process of this namespace exists and is the same one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    now, state = _started(pid), _stat(pid)
    if state is not None and state[0] in GONE:
        return False
    return now is None or started is None or now == started


def _stat(pid: int) -> list[str] | None:
    """The state of a process and the fields after it in its ``stat``."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which detects a reused process id."""
    found = _stat(pid)
    return found[19] if found is not None and len(found) > 19 else None


def _boot() -> str | None:
    """This kernel's boot id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    """The namespace of process ids; each container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _local(path: Path) -> bool:
    """Whether only this kernel uses the file system."""
    try:
        device = path.stat().st_dev
        rows = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    kinds = {row.partition(" - ")[2].split()[0] for row in rows if row.split()[2] == name}
    return bool(kinds) and kinds <= LOCAL
