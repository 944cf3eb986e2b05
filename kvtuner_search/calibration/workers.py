"""The workers of a study, and whether a worker has certainly ended.

A worker has a random id. Host names, process ids and clocks prove little: containers share host names and start process ids from 1,
and a worker that is stopped for an hour is not gone. So only proof counts. A worker holds a lock on a file of its own beside the study's
file, which the kernel lets go when the worker ends, however it ends and in whatever container it ran. Where the study is in a database
server, there is no such file, and a process is looked up if it is one of the same kernel and process id namespace.

A worker that cannot be seen in any of these ways, as on another machine, is heard: each counts up a number in the study every BEAT seconds.
Who looks at one that does not change for SILENCE seconds takes that worker for gone. No clocks are compared: what counts is how often
somebody looked and found the same number, so that neither a clock that is wrong, nor a study that nobody could reach for an hour, nor an
hour's sleep of whoever looks makes a worker silent. If one comes back after all, what it found counts (Study.run).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

# File systems used by a single kernel, so that a free lock means that nobody anywhere holds it.
LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
BEAT: Final = 30.0  # seconds from one sign of life to the next
SILENCE: Final = 900.0  # seconds without any, after which a worker that can be seen in no other way is taken for gone
GONE: Final = ("Z", "X", "x")  # states of a process that has ended but was not waited for


class Worker:
    """This process's part in a study, while it is at work.

    Args:
        file: the study's file; None if it is in a database server.
    """

    def __init__(self, file: Path | None) -> None:
        self.id = uuid.uuid4().hex
        self.locks = _locks(file) if file is not None else None
        self._lock: int | None = None
        self._beats = 0
        self._heard: dict[str, int] = {}  # the latest number of each other worker
        self._silence: dict[str, float] = {}  # for how many seconds it has been the same
        self._looked = time.monotonic()

    def begin(self) -> dict[str, Any]:
        """Take the lock and return what other workers have to know, as plain JSON."""
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
        return self._description()

    def _description(self) -> dict[str, Any]:
        pid = os.getpid()
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "boot": _boot(),
            "processes": _namespace(),
            "pid": pid,
            "started": _started(pid),
            "locked": self._lock is not None,
            "beat": self._beats,
        }

    def beat(self) -> dict[str, Any]:
        """The next sign of life, in place of what :meth:`begin` returned."""
        self._beats += 1
        return self._description()

    def listen(self, others: Iterable[Any]) -> None:
        """Take note of the signs of life of all workers, as the study has them now; to be called every BEAT seconds."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, BEAT), now  # more was not looked at
        for other in others:
            if not isinstance(other, dict) or not isinstance(other.get("beat"), int):
                continue
            name = str(other.get("id"))
            if self._heard.get(name) == other["beat"]:
                self._silence[name] += passed
            else:
                self._heard[name], self._silence[name] = other["beat"], 0.0

    def end(self) -> None:
        """Release the lock."""
        if self._lock is not None and self.locks is not None:
            with contextlib.suppress(OSError):
                (self.locks / self.id).unlink()
                self.locks.rmdir()  # the last one; fails as long as there are others
            os.close(self._lock)
            self._lock = None

    def holds(self, other: Any) -> bool:
        """Whether another worker's lock shows that it is alive."""
        return self.locks is not None and isinstance(other, dict) and _free(self.locks, other.get("id")) is False

    def ended(self, other: Any) -> bool:
        """Whether another worker, as its ``begin`` described it, has said that it ended (None), is proved to have, or is silent where only
        signs of life tell."""
        if other is None:
            return True
        try:
            same_kernel = other["boot"] is not None and other["boot"] == _boot()
            if other["id"] == self.id:
                return False
            if other["locked"] and self.locks is not None and (same_kernel or _local(self.locks)):
                found = _free(self.locks, other["id"])
                if found is not None:
                    return found
            place = (socket.gethostname(), _namespace())
            if not same_kernel or place[1] is None or (other["host"], other["processes"]) != place:
                return self._silence.get(other["id"], 0.0) >= SILENCE
            return not _running(int(other["pid"]), other["started"])
        except (KeyError, TypeError, ValueError):
            return False  # not written by this program


def at_work(file: Path) -> bool:
    """Whether a worker of this machine is at work on a study's file."""
    folder = _locks(file)
    with contextlib.suppress(OSError):
        return any(_free(folder, path.name) is False for path in folder.iterdir())
    return False


def _locks(file: Path) -> Path:
    file = file.resolve()  # whatever links lead to it
    return file.with_name(f"{file.name}.workers")


def _free(folder: Path, name: Any) -> bool | None:
    """Whether nobody holds a worker's lock; None if there is no such file any more."""
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name):
        return None  # whoever can write to the study does not say which files are opened and deleted here
    path = folder / name
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
