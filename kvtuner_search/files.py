"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from kvtuner_search.errors import DataError, UsageError

FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to a temporary name beside ``path``, then rename it.

    Raises:
        UsageError: if the folder cannot be written to; the old file, if any, is untouched.
        DataError: if the disk is full; likewise.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
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
            raise DataError(f"cannot write {path}: {error.strerror}: make room on the disk") from error
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}: choose a folder that can be written to"
        ) from error
