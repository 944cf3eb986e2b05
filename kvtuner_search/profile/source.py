"""Where ``diff`` and ``show`` take a profile from: a file, ``REF:path`` in git, or ``-`` for standard input."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from kvtuner_search.errors import ProfileError, UsageError
from kvtuner_search.profile.canonical import MAX_BYTES, loads, read_limited
from kvtuner_search.profile.schema import Profile

_TIMEOUT: Final = 30  # seconds; a local object database answers at once


def load_from(text: str, *, any_layout: bool = False) -> Profile:
    """The profile that ``text`` names. A file of that very name wins over ``REF:path``.

    Raises:
        ProfileError: if it cannot be read, or is invalid.
        UsageError: if a revision starts with ``-``.
    """
    if text == "-":
        if sys.stdin is None:
            raise ProfileError("standard input is closed: pipe a profile into it")
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ProfileError(f"standard input has more than {MAX_BYTES} bytes: no profile has; check the pipe")
        return loads(data, "standard input", any_layout=any_layout)
    path = Path(text)
    if ":" in text and not os.path.lexists(path):
        return loads(_git_blob(text), text, any_layout=any_layout)
    return loads(read_limited(path), text, any_layout=any_layout)


def _git_blob(spec: str) -> bytes:
    """The bytes of ``REF:path``, whose size is asked for before they are read."""
    if spec.startswith("-"):
        raise UsageError(f"{spec!r} starts with a dash: git would take it for an option; name the revision another way")
    if spec.startswith(":"):
        raise UsageError(f"{spec!r} names no revision: write REF:path, e.g. HEAD:profiles/model.json")
    kind = _git("cat-file", "-t", spec).strip()
    if kind != b"blob":
        raise ProfileError(f"{spec} is a git {kind.decode(errors='replace')}, not a file: name a profile's path")
    size = _git("cat-file", "-s", spec).strip()
    if not size.isdigit() or int(size) > MAX_BYTES:
        raise ProfileError(f"{spec} has more than {MAX_BYTES} bytes: no profile has; check the path")
    return _git("cat-file", "blob", spec)


def _git(command: str, kind: str, spec: str) -> bytes:
    import subprocess

    # cat-file, unlike show, runs no text conversion or external diff that the repository's configuration may name.
    environment = os.environ | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }
    arguments = ["git", command, kind, spec]
    try:
        result = subprocess.run(arguments, capture_output=True, timeout=_TIMEOUT, env=environment, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ProfileError(f"cannot ask git for {spec}: {error}: is git installed?") from error
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"git ended with {result.returncode}"
        raise ProfileError(
            f"{spec} is neither a file nor in git: {reason.removeprefix('fatal: ')}: check the path, or fetch the revision"
        )
    return result.stdout
