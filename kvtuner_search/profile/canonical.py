"""The canonical form of a profile, its digest, and reading and writing it. Fail closed: nothing doubtful is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search.errors import ProfileError
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.schema import SCHEMA_VERSION, Profile

MAX_BYTES: Final = 16 * 2**20  # a 128-layer profile with a long front takes about 1 MB
MAX_DEPTH: Final = 32


def canonical_json(content: Any) -> str:
    """One byte sequence for one content: sorted keys, two-space indent, no NaN, final newline."""
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(content: dict[str, Any]) -> str:
    """``sha256:...`` of the canonical form of a profile's content without its digest field."""
    body = {key: value for key, value in content.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(canonical_json(body).encode()).hexdigest()


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


def read_limited(path: Path) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES; anything else is refused before it is read."""
    try:
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "does not exist"
            raise ProfileError(f"{path} {reason}: give the path of a profile written by calibrate")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}: check the path and its permissions"
        ) from error
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{path} is larger than {MAX_BYTES} bytes: no profile is; check the path")
    return data


def loads(data: bytes, source: str) -> Profile:
    """Parse and check the bytes of a profile; ``source`` is what error messages call it.

    Raises:
        ProfileError: as for load.
    """
    content = parse_json(data, source)
    if not isinstance(content, dict):
        raise ProfileError(f"{source} holds a JSON {type(content).__name__}, not an object: it is no profile")
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProfileError(f"{source} has no schema_version: it is no profile, or was edited by hand")
    if version > SCHEMA_VERSION:
        raise ProfileError(
            f"{source} has schema version {version}, this kvtuner-search reads up to {SCHEMA_VERSION}: upgrade it"
        )
    if version != SCHEMA_VERSION:
        raise ProfileError(f"{source} has schema version {version}, which never existed: it was edited by hand")
    profile = _validate(content, source)
    actual = digest_of(content)
    if profile.digest != actual:
        raise ProfileError(
            f"{source} says digest {profile.digest[:19]}…, its content gives {actual[:19]}…: it was edited or damaged;"
            " restore it, or calibrate again"
        )
    if profile.layout_version != LAYOUT_VERSION:
        raise ProfileError(
            f"{source} has layout version {profile.layout_version}, these kernels store version {LAYOUT_VERSION}:"
            " calibrate again, or install the kvtuner-search that wrote it"
        )
    return profile


def parse_json(data: bytes, source: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN, bounded depth.

    Raises:
        ProfileError: with where and why.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"{source} is not UTF-8 text (byte {error.start}): it is no profile, or is damaged"
        ) from error
    if _depth(text) > MAX_DEPTH:
        raise ProfileError(f"{source} nests deeper than {MAX_DEPTH} levels: it is no profile")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise ProfileError(f"{source} is no valid JSON: {error}: restore the file") from error


def _depth(text: str) -> int:
    """An upper bound of the nesting depth: brackets inside strings count too, which no profile has many of."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _validate(content: dict[str, Any], source: str) -> Profile:
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        value = repr(first.get("input"))
        shown = value if len(value) <= 60 else value[:57] + "..."
        got = "" if first["type"] in ("missing", "value_error") else f", got {shown}"
        raise ProfileError(
            f"{source}: {where}: {first['msg']}{got}{more}: restore the file, or calibrate again"
        ) from error
