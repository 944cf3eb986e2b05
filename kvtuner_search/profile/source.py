"""Where ``diff``, ``show`` and ``export`` take a profile from: a file, ``REF:path`` in git, or ``-`` for standard input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvtuner_search.errors import ProfileError
from kvtuner_search.profile import git
from kvtuner_search.profile.canonical import LFS_POINTER, MAX_BYTES, loads, read_limited, refuse_pointer
from kvtuner_search.profile.schema import Profile

_WHAT = "a profile"


def load_from(text: str, *, any_layout: bool = False) -> Profile:
    """The profile that ``text`` names. ``REF:path`` means git if the revision exists; a file of such a name is ``./REF:path``.

    Raises:
        ProfileError: if it cannot be read, or is invalid.
        UsageError: if a revision starts with ``-``.
    """
    place = place_in_git(text)
    if place is None:
        return loads(_file(text), "standard input" if text == "-" else text, any_layout=any_layout)
    data = git.read(place, _WHAT, MAX_BYTES)
    if data is None:
        raise ProfileError(
            f"{text} is neither a file nor in git: {place.ref} has no {place.path}: check the path, or fetch the revision"
        )
    return _loads(data, text, any_layout)


def load_old(text: str, new: str) -> Profile | None:
    """The same for the old side of a comparison, of any layout; None if the revision does not have the path of ``new`` yet."""
    place = place_in_git(text)
    if place is not None:
        data = git.read(place, _WHAT, MAX_BYTES)
        if data is not None:
            return _loads(data, text, True)
        if git.same_path(place, new):
            return None
    return load_from(text, any_layout=True)


def place_in_git(text: str) -> git.GitPath | None:
    """The file in git that ``text`` names; None if it names a file, or standard input.

    Raises:
        ProfileError: if there is neither such a revision nor such a file, or git cannot say.
    """
    place = None if text == "-" or git.is_file_name(text) else git.parse(text)
    if place is None:
        return None
    present = os.path.lexists(text)
    if not present:
        git.check_name(place)
    if git.named_well(place) and git.ref_exists(place):
        return place
    if present:
        return None
    raise ProfileError(
        f"{text} is neither a file nor in git: there is no revision {place.ref} here: check the path, or fetch the revision"
    )


def _loads(data: bytes, text: str, any_layout: bool) -> Profile:
    if data.startswith(LFS_POINTER):  # git lfs pull changes files, not what a revision holds
        raise ProfileError(
            f"{text} is a Git LFS pointer, and a revision holds nothing else of that file: write it with"
            f" `git cat-file blob {text} | git lfs smudge > old.json`, after `git lfs pull`, and name old.json"
        )
    refuse_pointer(data, text)
    return loads(data, text, any_layout=any_layout)


def _file(text: str) -> bytes:
    if text != "-":
        return read_limited(Path(text))
    if sys.stdin is None:
        raise ProfileError("standard input is closed: pipe a profile into it")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ProfileError(f"standard input has more than {MAX_BYTES} bytes, too many for a profile; check the pipe")
    return data
