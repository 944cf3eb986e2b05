"""The canonical form of a profile, its digest, and reading and writing it. Fail closed: nothing doubtful is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search import __version__
from kvtuner_search.errors import DataError, ProfileError
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.digest import digest_of as digest_of
from kvtuner_search.profile.migrations import migrate, respelled, same_validation
from kvtuner_search.profile.schema import SCHEMA_VERSION, Profile
from kvtuner_search.profile.text import quoted, shortened

MAX_BYTES: Final = 4 * 2**20  # a 128-layer profile with a long front takes about 1 MB, with the longest 2
MAX_DEPTH: Final = 32

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins

_BRACKET: Final = re.compile(r"[\[\]{}]")
# What a reviewed file must not contain unescaped: DEL and C1, invisible characters, marks that change text direction, and what CI
# services take for a command when the file is printed. A fixed list: Python's tables of characters change with its version.
_UNSAFE: Final = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]|#(?=#\\w{0,32}\\[)"
)
_SURROGATE: Final = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def canonical_json(content: Any) -> str:
    """One byte sequence for one content: sorted keys, two-space indent, no NaN, final newline, and nothing that controls its reader."""
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1] if match[0] != "#" else "\\u0023", text)


def digest_without_validation(profile: Profile) -> str:
    """The digest that the profile has, or would have, without a validation block: what a validation refers to."""
    return digest_of(profile.model_dump(mode="json") | {"validation": None})


def seal(content: dict[str, Any]) -> Profile:
    """Validate a profile's content, given without a digest, and add the digest.

    Raises:
        ProfileError: if the content is invalid.
    """
    draft = _validate({**content, "digest": "sha256:" + "0" * 64}, "the new profile")
    body = draft.model_dump(mode="json")
    return _validate({**body, "digest": digest_of(body)}, "the new profile")


def dumps(profile: Profile) -> str:
    """The text of the profile's file."""
    return canonical_json(profile.model_dump(mode="json"))


def save(profile: Profile, path: Path) -> None:
    """Write the profile in its canonical form, atomically."""
    write_atomic(path, dumps(profile))


def load(path: Path) -> Profile:
    """Read and check a profile file.

    Raises:
        ProfileError: if the file is missing, too large, no JSON, invalid, from a newer version, or its digest is wrong.
    """
    return loads(read_limited(path), str(path))


def read_limited(path: Path, what: str = "a profile", limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; everything else is refused before it is read.

    Raises:
        ProfileError: if there is no such file, or it is a folder, a device, a pipe or too large.
    """
    with open_limited(path, what, limit) as stream:
        data = stream.read(limit + 1)
        if len(data) > limit:
            raise ProfileError(_too_large(path, what, limit))
    refuse_pointer(data, path)
    return data


@contextlib.contextmanager
def open_limited(path: Path, what: str, limit: int) -> Iterator[BufferedReader]:
    """The same, open for reading; failures to read it inside the block are named, too."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not wait. fstat, not stat: the name may change its target.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ProfileError(f"{path} is not a regular file: give the path of {what}")
            if status.st_size > limit:
                raise ProfileError(_too_large(path, what, limit))
            yield stream
    except FileNotFoundError as error:
        raise ProfileError(f"{path} does not exist: give the path of {what}") from error
    except IsADirectoryError as error:
        raise ProfileError(f"{path} is not a regular file: give the path of {what}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"cannot read {path}: {reason}: check the path and its permissions") from error


def _too_large(path: Path, what: str, limit: int) -> str:
    return f"{path} has more than {limit} bytes, too many for {what}; check the path"


def lfs_message(source: Path | str) -> str:
    """Why a Git LFS pointer cannot be read."""
    return (
        f"{source} is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its repository"
        " (in CI, check out with lfs: true)"
    )


def refuse_pointer(data: bytes, source: Path | str) -> None:
    """Refuse what git left in place of a file: a Git LFS pointer, or a link that was checked out as text.

    Raises:
        ProfileError: with the command that brings the file.
    """
    if data.startswith(LFS_POINTER):
        raise ProfileError(lfs_message(source))
    if re.fullmatch(rb"[\w./-]{0,250}/[\w.-]{1,250}\.(?:json|safetensors)\n?", data):
        raise ProfileError(
            f"{source} holds the path {data.decode().strip()} and nothing else: it is a link that git checked out as text;"
            " set core.symlinks and check it out again, or name the file itself"
        )


def loads(data: bytes, source: str, *, any_layout: bool = False) -> Profile:
    """Parse and check the bytes of a profile; ``source`` is what error messages call it.

    ``any_layout`` accepts a profile of another layout version, whose bytes then cannot be checked; only ``diff`` asks for it,
    to say that two profiles cannot be compared.

    Raises:
        ProfileError: as for load.
    """
    content = parse_json(data, source)
    if not isinstance(content, dict):
        raise ProfileError(f"{source} holds a JSON {type(content).__name__}, not an object: it is not a profile")
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProfileError(f"{source} has no schema_version: it is not a profile, or was edited by hand")
    if version > SCHEMA_VERSION:
        raise ProfileError(
            f"{source} has schema version {version}, this kvtuner-search {__version__} reads up to {SCHEMA_VERSION}:"
            f" install {_writer(content)}"
        )
    profile = _normal(content, version, source)
    if profile.layout_version != LAYOUT_VERSION and not any_layout:
        raise ProfileError(
            f"{source} has layout version {profile.layout_version}, these kernels store version {LAYOUT_VERSION}:"
            " calibrate again, or install the kvtuner-search that wrote it"
        )
    return profile


def _normal(content: dict[str, Any], version: int, source: str) -> Profile:
    """The profile with the digest of its normal form, however its file spells numbers and whether it writes defaults.

    The file's own digest must be that of the content as the file spells it, or as its schema version would write it.
    """
    stated, spelled = content.get("digest"), digest_of(content)
    current = content
    if version < SCHEMA_VERSION:
        if stated != spelled and not _digest_of_normal(content, source, stated):
            _refuse_digest(stated, spelled, source)
        current = migrate(content, source) | {"digest": "sha256:" + "0" * 64}
    profile = _validate(current, source)
    body = profile.model_dump(mode="json")
    digest = digest_of(body)
    if version == SCHEMA_VERSION:
        if profile.digest not in (digest, spelled):
            _refuse_digest(stated, digest, source)
        if profile.digest == digest == spelled:
            return profile
    body = same_validation(current, body)
    # Already valid, whatever its digests say; checking a long front again would take as long as everything else.
    changed: dict[str, Any] = {"digest": digest_of(body)}
    if profile.validation is not None:
        named = body["validation"]["profile_digest"]
        changed["validation"] = profile.validation.model_copy(update={"profile_digest": named})
    return profile.model_copy(update=changed)


def _digest_of_normal(content: dict[str, Any], source: str, stated: object) -> bool:
    """Whether a profile of an older version has the digest of its content as that version would have written it.

    If so, ``content`` is brought to that form.
    """
    try:
        profile = _validate(migrate(content, source) | {"digest": "sha256:" + "0" * 64}, source)
    except ProfileError:
        return False
    normal = respelled(content, profile.model_dump(mode="json"))
    if digest_of(normal) != stated:
        return False
    content.update(normal)
    return True


def _refuse_digest(stated: object, actual: str, source: str) -> NoReturn:
    raise ProfileError(
        f"{source} says digest {str(stated)[:19]}…, its content gives {actual[:19]}…: it was edited or damaged;"
        " restore it, or calibrate again"
    )


def _writer(content: dict[str, Any]) -> str:
    """The release that wrote a newer profile, and can therefore read it."""
    provenance = content.get("provenance")
    tool = provenance.get("tool") if isinstance(provenance, dict) else None
    known = isinstance(tool, str) and re.fullmatch(r"kvtuner-search \d{1,6}(\.\w{1,12}){1,3}", tool, re.ASCII)
    return f"{tool}, which wrote it, or a newer one" if known else "the kvtuner-search that wrote it, or a newer one"


def refuse_newer(version: int, newest: int, source: str) -> None:
    """Refuse a record whose schema is newer than this program's.

    Raises:
        DataError: with both versions and the remedy.
    """
    if version > newest:
        raise DataError(
            f"{source} has version {version} of the record's schema, this kvtuner-search reads up to {newest}:"
            " install the one that wrote it, or a newer one"
        )


def parse_json(data: bytes, source: str, what: str = "profile") -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no lone surrogates, bounded depth. ``what`` names the file's kind in errors.

    Raises:
        ProfileError: with where and why.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"{source} is not UTF-8 text (byte {error.start}): it is not a {what}, or is damaged"
        ) from error
    if _depth(text) > MAX_DEPTH:
        raise ProfileError(f"{source} nests deeper than {MAX_DEPTH} levels: it is not a {what}")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # pairs were joined; a lone one cannot be encoded
    except UnicodeEncodeError as error:
        raise ProfileError(f"{source} has half of a surrogate pair in a string: restore the file") from error
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise ProfileError(f"{source} is not valid JSON: {error}: restore the file") from error
    return content


def _depth(text: str) -> int:
    """An upper bound of the nesting depth: brackets inside strings count too; profiles have few of them."""
    depth = deepest = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {quoted(key)} is given twice in one object")
            seen.add(key)
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the range of a double")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _validate(content: dict[str, Any], source: str) -> Profile:
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise ProfileError(f"{source}: {first_error(error)}: restore the file, or calibrate again") from error


def first_error(error: ValidationError, what: str = "profile") -> str:
    """The first of pydantic's complaints in one line: where, why, and the value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(shortened(part) for part in first["loc"]) or what  # keys are the file's, too
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else value[:57] + "..."
    got = "" if first["type"] in ("missing", "value_error") else f", got {shown}"
    return f"{shortened(where, 200)}: {first['msg']}{got}{more}"


def json_schema() -> str:
    """The text of ``profiles/schema/v2.json``: JSON Schema 2020-12 of a profile of the current version."""
    schema = Profile.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kvtuner-search profile"}
    return canonical_json({**schema, **head})
