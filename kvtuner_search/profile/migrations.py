"""Bringing profiles of older schema versions up to date, one version at a time.

A new version adds its function to ``MIGRATIONS`` and a file of the version before to ``tests/search/profile/stored``; a test refuses
a migration that has no stored file. A migration keeps the relation of a validation block to its profile: a block that named the old
content's digest names the new content's, any other block stays as stale as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.digest import digest_of
from kvtuner_search.profile.schema import SCHEMA_VERSION

Migration = Callable[[dict[str, Any]], dict[str, Any]]


def _add_bands(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 to 2: tensors may have bands, and layout version 2 stores what version 1 stores in the same bytes.

    Raises:
        ValueError: if a tensor has bands already, which version 1 never had.
    """
    new = dict(content)
    if type(content.get("layout_version")) is int and content["layout_version"] == 1:
        new["layout_version"] = 2
    layers = content.get("layers")
    if isinstance(layers, list):
        new["layers"] = [_with_bands(layer) if isinstance(layer, dict) else layer for layer in layers]
    return new


def _with_bands(layer: dict[str, Any]) -> dict[str, Any]:
    new = dict(layer)
    for part, entry in layer.items():
        if isinstance(entry, dict):
            if "bands" in entry:
                raise ValueError("schema version 1 has no bands: the file was edited by hand; calibrate again")
            new[part] = {**entry, "bands": None}
    return new


MIGRATIONS: Final[dict[int, Migration]] = {  # version -> function from that version's content to the next version's
    1: _add_bands,
}


_LATER: Final = ("bands",)  # fields that version 1 did not have, wherever they are now


def migrate(
    content: dict[str, Any],
    source: str,
    registry: Mapping[int, Migration] = MIGRATIONS,
    target: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """The same profile as version ``target``; the caller has checked its digest and computes the new one.

    Raises:
        ProfileError: for a version that never existed, or content that its version never had.
    """
    while (version := content["schema_version"]) < target:
        step = registry.get(version)
        if step is None:
            raise ProfileError(
                f"{source} has schema version {version}, which never existed: the file was edited by hand"
            )
        try:
            new = {**step(content), "schema_version": version + 1}
        except ValueError as error:
            raise ProfileError(f"{source}: {error}") from error
        content = same_validation(content, new)
    return content


def same_validation(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with a validation block that names it, if the block of ``old`` named ``old``."""
    block = new.get("validation")
    if not isinstance(block, dict) or block.get("profile_digest") != digest_of(old | {"validation": None}):
        return new
    return new | {"validation": {**block, "profile_digest": digest_of(new | {"validation": None})}}


def respelled(old: Any, new: Any) -> Any:
    """Content of an older version with numbers spelled, and defaults written, as in its migrated normal form ``new``.

    Fields that the older version did not have are not added.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        filled = {key: respelled(value, new[key]) if key in new else value for key, value in old.items()}
        return {key: value for key, value in new.items() if key not in _LATER} | filled
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [respelled(a, b) for a, b in zip(old, new, strict=True)]
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return new if numbers and old == new else old
