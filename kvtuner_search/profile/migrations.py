"""Bringing profiles of older schema versions up to date, one version at a time.

Version 1 is the first, so there is nothing to migrate yet. A new version adds its function to ``MIGRATIONS`` and a file of the
version before to ``tests/search/profile/stored``; a test refuses a migration that has no stored file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.schema import SCHEMA_VERSION

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: Final[dict[int, Migration]] = {}  # version -> function from that version's content to the next version's


def migrate(
    content: dict[str, Any],
    source: str,
    registry: Mapping[int, Migration] = MIGRATIONS,
    target: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """The same profile as version ``target``; the caller has checked its digest and computes the new one.

    Raises:
        ProfileError: for a version that never existed.
    """
    while (version := content["schema_version"]) < target:
        step = registry.get(version)
        if step is None:
            raise ProfileError(f"{source} has schema version {version}, which never existed: it was edited by hand")
        content = {**step(content), "schema_version": version + 1}
    return content
