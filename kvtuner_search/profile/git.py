"""Files of a revision in git: read without running anything that the repository names, and without touching the network."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtuner_search.errors import ProfileError, UsageError
from kvtuner_search.files import current_folder
from kvtuner_search.profile.text import quoted

if TYPE_CHECKING:
    import subprocess

_TIMEOUT: Final = 30  # seconds; a local object database answers at once
_FATAL: Final = re.compile(r"^(?:fatal|error): (.*)$", re.MULTILINE)
_AMBIGUOUS: Final = re.compile(r"^warning: refname '(.*)' is ambiguous", re.MULTILINE)
_SUFFIX: Final = re.compile(r"[~^]|@\{")  # what follows the name of a revision
_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_OWNER: Final = re.compile(r"dubious ownership in repository at '(.*)'")


@dataclass(frozen=True)
class GitPath:
    """A file in a revision, as ``REF:path`` names it; a path that starts with ``./`` or ``../`` starts in the current folder."""

    ref: str
    path: str

    def __str__(self) -> str:
        return f"{self.ref}:{self.path}"


def parse(text: str) -> GitPath | None:
    """``REF:path`` in its two parts; None if there is no colon outside of braces, which is where git looks for it.

    >>> parse("HEAD:a/b.json")
    GitPath(ref='HEAD', path='a/b.json')
    """
    depth = 0
    for index, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        elif character == ":" and not depth:
            return GitPath(text[:index], text[index + 1 :])
    return None


def check_name(place: GitPath) -> None:
    """Refuse names that git would not take for a revision.

    Raises:
        UsageError: if the revision is empty or starts with ``-``, or the name has a line break.
    """
    shown = quoted(str(place), 200)
    if place.ref.startswith("-"):
        raise UsageError(f"{shown} starts with a dash: git would take it for an option; name the revision another way")
    if not place.ref:
        raise UsageError(f"{shown} names no revision: write REF:path, e.g. HEAD:profiles/model.json")
    if not named_well(place):
        raise UsageError(f"{shown} has a line break or a null: git cannot be asked for it")


def named_well(place: GitPath) -> bool:
    """Whether git can be queried for it: the revision is named and is not an option, and the name is one line."""
    return place.ref[:1] not in ("", "-") and not re.search(r"[\x00\n]", str(place))


def ref_exists(place: GitPath) -> bool:
    """Whether the revision is in the repository of the current folder; False outside of any repository.

    Raises:
        ProfileError: if git cannot say, e.g. because the repository is someone else's, or if the name means two revisions.
    """
    _refuse_embedded(place)
    done = _git(place, "rev-parse", "--verify", "--quiet", f"{place.ref}^{{}}")
    if done.returncode == 0:
        return _is_the_one(place)
    if done.returncode == 1:
        return False
    reason = _reason(done)
    if "not a git repository" in reason or "Needed a single revision" in reason:
        return False
    raise _refused(place, reason)


def _refuse_embedded(place: GitPath) -> None:
    """Refuse a bare repository whose files are tracked in a working tree: whoever may commit files can commit one, and git reads its revisions there.

    Raises:
        ProfileError: if git takes the current folder, or one above it, for such a repository.
    """
    if "GIT_DIR" in os.environ:
        return
    current = current_folder()
    folders = (current, *current.parents)
    top = next((index for index, folder in enumerate(folders) if os.path.lexists(folder / ".git")), 0)
    suspects = [folder for folder in folders[:top] if os.path.lexists(folder / "HEAD")]
    if not suspects or ".git" in current.parts:  # what lies in a .git is not committed
        return
    asked = _git(place, "rev-parse", "--absolute-git-dir")
    found = asked.stdout.decode(errors="surrogateescape").rstrip("\n")
    if asked.returncode or not any(os.path.realpath(folder) == os.path.realpath(found) for folder in suspects):
        return
    tracked = _git(place, "-C", str(folders[top]), "ls-files", "-z", "--", found)
    if tracked.returncode or tracked.stdout:
        raise ProfileError(
            f"git takes {found} for a repository of its own, but its files are tracked in {folders[top]}, so that whoever changes them"
            f" decides what {place} is: ask for it in {folders[top]}"
        )


def _is_the_one(place: GitPath) -> bool:
    """Whether the name means what it says, where git would take a tag of that name: whoever may push tags could name one ``origin/main``.

    Raises:
        ProfileError: if a branch and a tag, or a ref and a shortened hash, have the name.
    """
    name = _SUFFIX.split(place.ref)[0]
    if name.startswith("refs/"):  # not refs/tags/refs/…, which git tries next
        return _git(place, "show-ref", "--verify", "--quiet", name).returncode == 0
    done = _git(place, "-c", "core.warnAmbiguousRefs=true", "rev-parse", "--verify", f"{place.ref}^{{}}")
    found = _AMBIGUOUS.search(done.stderr.decode(errors="replace"))
    if found is not None and found[1] not in ("HEAD", "@") and not _HASH.fullmatch(found[1]):  # those win for git, too
        raise ProfileError(
            f"{quoted(found[1], 200)} is the name of several revisions here, e.g. of a branch and a tag: write the one that is meant"
            " in full, as refs/remotes/…, refs/heads/… or refs/tags/…, or its whole hash"
        )
    return True


def read(place: GitPath, what: str, limit: int) -> bytes | None:
    """The bytes of a file in a revision that exists; None if that revision has no such file. Links inside the revision are followed.

    The size is queried before anything is read. ``cat-file`` runs no text conversion and no external diff, and a partial clone
    is not filled from its remote.

    Args:
        what: what an error calls such a file, e.g. ``a profile``.
        limit: bytes.

    Raises:
        ProfileError: if it is not a file, too large, or its content is not in this clone.
    """
    done = _git(
        place, "cat-file", "--batch-check", "--follow-symlinks", send=f"{place}\n".encode(errors="surrogateescape")
    )
    words = done.stdout.split(b"\n")[0].split()
    if done.returncode == 0 and len(words) == 3 and words[2].isdigit():
        name, kind, size = (word.decode(errors="replace") for word in words)
        if kind != "blob":
            raise ProfileError(f"{place} is a git {kind}, not a file: name the path of {what}")
        if int(size) > limit:
            raise ProfileError(f"{place} has more than {limit} bytes, too many for {what}; check the path")
        content = _git(place, "cat-file", "blob", name)
        if content.returncode == 0:
            return content.stdout
        raise _unreadable(place, content)
    if done.returncode == 0 and len(words) == 2 and words[0] in (b"symlink", b"dangling", b"loop", b"notdir"):
        raise ProfileError(f"{place} is a link that leads to no file of that revision: name the path of {what}")
    if _absent(place):
        return None
    raise _unreadable(place, done)


def same_path(place: GitPath, other: str) -> bool:
    """Whether ``other``, a file or ``REF:path``, is at the path in the repository that ``place`` has in its revision."""
    prefix = _git(place, "rev-parse", "--show-prefix").stdout.decode(errors="surrogateescape").rstrip("\n")
    found = parse(other)
    if found is not None and not is_file_name(other) and ref_exists(found):
        theirs = _from_root(found.path, prefix)
    else:
        file = Path(other)
        folder = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(Path.cwd()))
        theirs = posixpath.normpath(posixpath.join(prefix, folder, file.name))
    return theirs == _from_root(place.path, prefix)


def prefix_of(place: GitPath) -> str:
    """The current folder, from the root of the repository: empty or with a slash at its end."""
    done = _git(place, "rev-parse", "--show-prefix")
    if done.returncode:
        raise _refused(place, _reason(done))
    return done.stdout.decode(errors="surrogateescape").rstrip("\n")


def is_file_name(text: str) -> bool:
    """Whether the text can only be a file's name: it is absolute, or says that it starts in the current folder."""
    return text.startswith(("/", "./", "../"))


def _from_root(path: str, prefix: str) -> str:
    return posixpath.normpath(posixpath.join(prefix, path) if path.startswith(("./", "../")) else path)


def _absent(place: GitPath) -> bool:
    """True if the revision's trees are here and have no such path."""
    options = [] if place.path.startswith(("./", "../")) else ["--full-tree"]
    done = _git(place, "ls-tree", "-z", *options, place.ref, "--", place.path or ".")
    return done.returncode == 0 and not done.stdout


def _unreadable(place: GitPath, done: subprocess.CompletedProcess[bytes]) -> ProfileError:
    partial = _git(place, "config", "--get-regexp", r"^(extensions\.partialclone|remote\..*\.promisor)$")
    if partial.returncode == 0:
        return ProfileError(
            f"{place} is not in this partial clone, which was made without file contents: fetch it with"
            f" `git cat-file -e {place}`, or clone without --filter"
        )
    return _refused(place, _reason(done))


def _refused(place: GitPath, reason: str) -> ProfileError:
    owner = _OWNER.search(reason)
    if owner:
        return ProfileError(
            f"git does not read {place}: {reason}: if you trust it, run `git config --global --add safe.directory {owner[1]}`"
        )
    return ProfileError(f"{place} is neither a file nor in git: {reason}: check the path, or fetch the revision")


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Git's reason: its first ``fatal:`` or ``error:`` line, because the rest is advice."""
    text = done.stderr.decode(errors="replace").strip()
    found = _FATAL.search(text)
    return found[1] if found else text.partition("\n")[0] or f"git ended with {done.returncode}"


def _git(place: GitPath, *arguments: str, send: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    import subprocess

    environment = os.environ | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "",  # versions of git that do not know the line above
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",  # refs/replace/… would put another file in the place of the one that is named
        "GIT_LITERAL_PATHSPECS": "1",
        "LC_ALL": "C",
    }
    try:
        return subprocess.run(
            ["git", *arguments], input=send, capture_output=True, timeout=_TIMEOUT, env=environment, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ProfileError(f"cannot ask git for {place}: {error}: is git installed?") from error
