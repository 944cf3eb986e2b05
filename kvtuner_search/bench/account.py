"""The journal's description of the server, so that a resumed run continues with the same one."""

from __future__ import annotations

from typing import Any, Final

from kvtuner_search.bench.record import Cache, Check, Hardware, Model, Scrape, Served
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.fields import Name, Number, Strict

_VARYING: Final = ("token_capacity", "cache_gib")  # may differ between two starts of the same server


class Account(Strict):
    """A server, and the checks before it was measured."""

    served: Served
    """How it serves."""
    cache: Cache
    """With which cache."""
    model: Model
    """What it serves."""
    hardware: Hardware | None
    """On what."""
    versions: dict[Name, Name]
    """Of packages."""
    checks: list[Check]
    """Of correctness, before any cell."""

    @property
    def correct(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def differences(self, other: Account) -> list[str]:
        """Names of fields that differ, except checks and fields that vary between two starts."""
        ours, theirs = (one.model_dump(exclude={"checks": True, "served": set(_VARYING)}) for one in (self, other))
        return [name for name in ours if ours[name] != theirs[name]]


class SessionRecord(Strict):
    """The state at the end of a session with a server."""

    checks: list[Check]
    """Of all that it had answered."""
    scrapes: list[Scrape]
    """Its metrics."""
    cross_check: dict[Name, Number]
    """One cell's load through the engine's own client: figure -> ours over theirs."""


def account_of(content: dict[str, Any]) -> Account:
    """An account that the journal has."""
    return Account.model_validate(content)


def refuse_another(before: Account, now: Account, where: object) -> None:
    """Answers of different servers are never mixed.

    Raises:
        UsageError: names what differs.
    """
    differing = before.differences(now)
    if differing:
        raise UsageError(
            f"{where} has answers of a server with other {', '.join(differing)}: use --overwrite or another folder"
        )
