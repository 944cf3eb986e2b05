"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from kvtuner_search.errors import DataError, UsageError

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def make_room(code: int | None) -> str:
    """What helps against an error of :data:`FULL`."""
    return "raise the limit on the size of files (ulimit -f)" if code == errno.EFBIG else "make room on the disk"


def unusual(path: Path) -> str | None:
    """What stands where a file should: "a folder", "a pipe", "a socket", "a device". None for a file, a link to one, or nothing.

    Opening a pipe may wait for ever, what a device is given is lost, and renaming a file over either would take it from other programs.

    Example:
        ``unusual(Path("/dev/null")) == "a device"``
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return None  # whoever opens it says why it cannot


def refuse_unusual(path: Path) -> None:
    """Refuse what is there and is no file, before it is opened.

    Raises:
        UsageError: with what it is.
    """
    kind = unusual(path)
    if kind is not None:
        raise UsageError(f"{path} is {kind}: name a file")


def check_writable(*paths: Path | None) -> None:
    """Find out before the work whether its results can be written; None is passed over.

    Raises:
        UsageError, DataError: as ``write_atomic``; what is there is untouched.
    """
    for path in paths:
        if path is not None:
            refuse_unusual(path)
            probe = path.with_name(".writable")
            write_atomic(probe, "")
            probe.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to a temporary name beside ``path``, then rename it.

    Raises:
        UsageError: if the folder cannot be written to, or the path is of something else than a file; what is there is untouched.
        DataError: if the disk is full; likewise.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    refuse_unusual(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        if error.errno in FULL:
            raise DataError(f"cannot write {path}: {error.strerror}: {make_room(error.errno)}") from error
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}: choose a folder that can be written to"
        ) from error


def current_folder() -> Path:
    """The current folder.

    Raises:
        DataError: if it was deleted.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise DataError(f"the current folder cannot be used ({error.strerror}): change to another one") from error
