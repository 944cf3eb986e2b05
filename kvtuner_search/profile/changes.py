"""One measure before and after, and one finding: the parts of every comparison.

Quality is compared as the difference between the two changes against the 16-bit cache. Its interval comes from the two given
intervals by MOVER (Zou and Donner, Statistics in Medicine 27, 2008), which assumes independent estimates; both were measured
on the same samples, so it is wider than necessary and errs towards "inconclusive".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.rules import RULES, Finding
from kvtuner_search.profile.schema import Profile

_ROUNDING: Final = 1e-12  # nats or a fraction; what subtracting baselines leaves of equal changes
Verdict = Literal["same", "improved", "regressed", "inconclusive", "incomparable", "added", "dropped"]


@dataclass(frozen=True)
class QualityChange:
    """One measure before and after; figures are absent where nothing can be compared."""

    metric: str
    data: str
    split: str
    old: Measure | None
    new: Measure | None
    verdict: Verdict
    difference: float | None = (
        None  # change of (value - baseline); positive is a higher value, in nats or as a fraction
    )
    low: float | None = None
    high: float | None = None
    reason: str = ""  # why it is incomparable

    @property
    def name(self) -> str:
        return f"{self.metric}.{self.data}.{self.split}"

    @property
    def loss_increase(self) -> float | None:
        """The difference in nats if this is a loss that can be compared."""
        return self.difference if self.metric in ("kl", "nll") else None


def measure_change(old: Measure | None, new: Measure | None, other_data: bool) -> QualityChange:
    """Compare a measure that at least one side has; ``other_data``: the digests say that the data differ."""
    known = old or new
    assert known is not None
    metric, data, split = known.metric, known.data, known.split
    if old is None or new is None:
        return QualityChange(metric, data, split, old, new, "added" if old is None else "dropped")
    differing = [name for name in ("samples", "tokens", "confidence") if getattr(old, name) != getattr(new, name)]
    if other_data:
        differing.append("data digest")
    if differing:
        return QualityChange(metric, data, split, old, new, "incomparable", reason=f"other {', '.join(differing)}")
    difference = new.delta - old.delta
    if not (old.has_interval and new.has_interval):
        same = abs(difference) < _ROUNDING
        return QualityChange(metric, data, split, old, new, "same" if same else "inconclusive", difference)
    low = difference - math.hypot(max(0.0, new.delta - new.ci_low), max(0.0, old.ci_high - old.delta))
    high = difference + math.hypot(max(0.0, new.ci_high - new.delta), max(0.0, old.delta - old.ci_low))
    verdict: Verdict = "inconclusive"
    if abs(difference) < _ROUNDING:
        verdict = "same"
    elif low > 0 or high < 0:
        verdict = "regressed" if (low > 0) == (metric != "accuracy") else "improved"
    return QualityChange(metric, data, split, old, new, verdict, difference, low, high)


def change_message(change: QualityChange) -> str:
    """A change in one line."""
    if change.verdict == "dropped":
        return f"{change.name} is no longer measured"
    if change.verdict == "incomparable":
        return f"{change.name} cannot be compared: {change.reason}"
    assert change.difference is not None
    if change.low is None:
        return (
            f"{change.name} changed by {change.difference:+.6g} on one sample, which has no interval: {change.verdict}"
        )
    interval = f"[{change.low:+.6g}, {change.high:+.6g}]"
    return f"{change.name} changed by {change.difference:+.6g}, interval {interval}: {change.verdict}"


def make_finding(rule: str, new: Profile, where: str, message: str, before: object = "", after: object = "") -> Finding:
    """A finding with its rule's severity."""
    return Finding(rule, RULES[rule].severity, where, message, str(before), str(after), new.model.id)


def short(value: object) -> str:
    """A value, with digests shortened for reading."""
    text = "none" if value in (None, "-") else str(value)
    start = text.find("sha256:")
    return text if start < 0 else text[: start + 19] + "…"
