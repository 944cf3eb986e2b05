"""What differs between the validation blocks of two profiles, and the rules that fire on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kvtuner_search.profile.changes import QualityChange, change_message, make_finding, measure_change, short
from kvtuner_search.profile.rules import Finding
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.validation import Capacity, Validation
from kvtuner_search.profile.validation_text import is_stale

_CAPACITY_STEP: Final = 0.01  # of the predicted capacity; the memory left free varies a little from start to start


def validation_changes(old: Profile, new: Profile) -> list[QualityChange]:
    """Likelihood and accuracy through a server, if both profiles have a validation block of their own."""
    if old.validation is None or new.validation is None or is_stale(old) or is_stale(new):
        return []
    sides = [{(m.metric, m.data): m for m in (*b.likelihood, *b.tasks)} for b in (old.validation, new.validation)]
    digests_of = [{d.name: d.digest for d in reversed(b.data)} for b in (old.validation, new.validation)]
    found = []
    for metric, data in dict.fromkeys([*sides[0], *sides[1]]):
        name = f"task {data}" if metric == "accuracy" else data
        digests = [side.get(name) for side in digests_of]
        other = None not in digests and digests[0] != digests[1]
        found.append(measure_change(sides[0].get((metric, data)), sides[1].get((metric, data)), other))
    return found


def validation_findings(old: Profile, new: Profile, changes: list[QualityChange]) -> Iterator[Finding]:
    """All findings about the two blocks; ``changes`` are those of :func:`validation_changes`."""
    a, b = old.validation, new.validation
    if b is None:
        if a is not None:
            message = "the old profile was validated on a server, the new one was not: run validate"
            yield make_finding("validation-dropped", new, "validation", message, old.digest, new.digest)
        return
    if is_stale(new):
        message = f"the validation block belongs to a profile with digest {short(b.profile_digest)}, not to this one: run validate again"
        yield make_finding("validation-stale", new, "validation", message, old.digest, new.digest)
        return
    if b.verdict == "fail" and (a is None or a.verdict != "fail"):
        failed = ", ".join(check.name for check in b.checks if not check.passed)
        message = f"the validation failed: {failed}"
        yield make_finding("validation-failed", new, "validation.checks", message, a and a.verdict, failed)
    if a is None or is_stale(old):
        return
    yield from _measures(new, changes)
    yield from _capacity(a.capacity, b.capacity, new)
    before, after = _server(a), _server(b)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            message = f"{name} is {after.get(name, 'none')}, it was {before.get(name, 'none')}"
            yield make_finding(
                "validation-server-changed", new, f"validation.{name}", message, before.get(name), after.get(name)
            )


def _measures(new: Profile, changes: list[QualityChange]) -> Iterator[Finding]:
    rules = {
        "regressed": "validation-regressed",
        "dropped": "validation-incomparable",
        "incomparable": "validation-incomparable",
    }
    for change in changes:
        rule = rules.get(change.verdict)
        if rule:
            before, after = (repr(m.delta) if m else "" for m in (change.old, change.new))
            yield make_finding(rule, new, f"validation.{change.name}", change_message(change), before, after)


def _capacity(old: Capacity | None, new: Capacity | None, profile: Profile) -> Iterator[Finding]:
    before, after = (c.ratio / c.predicted if c is not None and c.comparable else None for c in (old, new))
    if before is None or (after is not None and after > before - _CAPACITY_STEP):
        return
    now = "can no longer be compared with" if after is None else f"is {after:.4f} of"
    message = f"the server's token capacity {now} what the layout predicts; it was {before:.4f} of that"
    yield make_finding("validation-capacity-regressed", profile, "validation.capacity", message, before, after)


def _server(block: Validation) -> dict[str, str]:
    """What the measurement ran on, by name."""
    found = {f"server.{name}": str(value) for name, value in block.server.model_dump().items()}
    found |= {f"versions.{name}": version for name, version in block.versions.items()}
    return found | {"hardware": block.hardware, "semantics.method": block.semantics.method}
