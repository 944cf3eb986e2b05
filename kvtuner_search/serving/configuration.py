"""The configuration that every process of a server needs, passed from the launcher to its children in one environment variable.

SGLang spawns its processes, so nothing but the environment reaches them. Each one reads the profile again and compares its
digest, so that no two of them can serve different files. Neither torch nor SGLang is imported here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from kvtuner_search.errors import ProfileError, UsageError
from kvtuner_search.profile.canonical import load as load_profile
from kvtuner_search.profile.schema import Profile
from kvtuner_search.transforms import check_transforms, folder_of

ENVIRONMENT: Final = "KVTUNER_SERVING"


@dataclass(frozen=True)
class ServingConfiguration:
    """How a server stores its cache. The profile has the layers themselves."""

    profile: str  # absolute path of the profile's file, which every node has
    digest: str  # the profile's digest; a file with another one is refused
    as_stored: bool = False  # a prompt's own keys and values are read as stored too, as in decode; else unquantized

    @classmethod
    def of(cls, path: Path, *, as_stored: bool = False) -> Self:
        """The configuration for the profile at ``path``.

        Raises:
            ProfileError: if the profile or its transforms file cannot be used.
        """
        profile, _ = load(path)
        return cls(str(path.resolve()), profile.digest, as_stored)

    def to_environment(self) -> dict[str, str]:
        """The variable to set before the server's first process starts."""
        return {ENVIRONMENT: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The inverse of :meth:`to_environment`; None if no profile is requested.

        Raises:
            UsageError: if the variable holds something else.
        """
        text = environment.get(ENVIRONMENT)
        if not text:
            return None
        try:
            fields = json.loads(text)
            found = cls(**fields)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{ENVIRONMENT}={text[:80]!r} is not a serving configuration: unset it") from error
        if not (isinstance(found.profile, str) and isinstance(found.digest, str) and isinstance(found.as_stored, bool)):
            raise UsageError(f"{ENVIRONMENT}={text[:80]!r} has a field of the wrong type: unset it")
        return found

    def open(self) -> tuple[Profile, bytes | None]:
        """The profile that this configuration names, and the content of its transforms file, checked; None if it has none.

        Raises:
            ProfileError: if the file cannot be used, or is not the one that the server was started with.
        """
        profile, transforms = load(Path(self.profile))
        if profile.digest != self.digest:
            raise ProfileError(
                f"{self.profile} has digest {profile.digest[:19]}…, the server was started with {self.digest[:19]}…:"
                " put the same file on every node, and do not change it while a server starts"
            )
        return profile, transforms


def load(path: Path) -> tuple[Profile, bytes | None]:
    """A profile and the content of its transforms file, both checked; None if it has none.

    Raises:
        ProfileError: if the profile or its transforms file is missing, damaged, or of another layout.
    """
    profile = load_profile(path)
    return profile, check_transforms(profile, folder_of(path, profile))
