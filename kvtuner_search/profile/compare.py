"""What differs between two profiles: figures layer by layer and in total, and the rules that fire.

Quality is compared as the difference between the two changes against the 16-bit cache. Its interval comes from the two given
intervals by MOVER (Zou and Donner, Statistics in Medicine 27, 2008), which assumes independent estimates; both were measured
on the same samples, so it is wider than need be and errs towards "inconclusive".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.profile.rules import RULES, Finding
from kvtuner_search.profile.schema import Measure, Profile

_ROUNDING: Final = 1e-12  # nats or a fraction; what subtracting baselines leaves of equal changes
Verdict = Literal["same", "improved", "regressed", "inconclusive", "incomparable", "added", "dropped"]


@dataclass(frozen=True)
class Budgets:
    """Limits that were asked for."""

    max_bytes_per_token: int | None = None  # bytes, all layers
    max_loss_increase: float | None = None  # nats, new minus old, for kl and nll


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after."""

    index: int
    old: LayerSpec
    new: LayerSpec
    old_bytes: int  # per token
    new_bytes: int
    old_bits: float  # effective
    new_bits: float

    @property
    def changed(self) -> bool:
        return self.old != self.new


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


@dataclass(frozen=True)
class Comparison:
    """Everything that ``diff`` reports."""

    old: Profile
    new: Profile
    budgets: Budgets
    findings: list[Finding]
    layers: list[LayerChange] = field(default_factory=list)
    quality: list[QualityChange] = field(default_factory=list)
    provenance: list[tuple[str, str, str]] = field(default_factory=list)  # field, old, new: only what differs

    @property
    def comparable(self) -> bool:
        return not any(RULES[finding.rule].fixed for finding in self.findings)


def compare(old: Profile, new: Profile, budgets: Budgets | None = None) -> Comparison:
    """Compare two valid profiles; findings carry the catalogue's severities."""
    budgets = budgets or Budgets()
    blocking = list(_incomparable(old, new))
    if blocking:
        return Comparison(old, new, budgets, blocking)
    quality = [_quality_change(old, new, *key) for key in _quality_keys(old, new)]
    draft = Comparison(old, new, budgets, [], list(_layers(old, new)), quality, _provenance(old, new))
    findings = [
        *_model(old, new),
        *_storage(draft),
        *_quality(draft),
        *_origins(draft),
    ]
    return Comparison(old, new, budgets, findings, draft.layers, draft.quality, draft.provenance)


def stored_differently(old: Profile, new: Profile) -> bool:
    """True if the two caches hold different bytes for the same tokens."""
    vectors = [profile.transforms.digest if profile.transforms else None for profile in (old, new)]
    return old.layers != new.layers or vectors[0] != vectors[1]


def _finding(rule: str, new: Profile, where: str, message: str, before: object = "", after: object = "") -> Finding:
    return Finding(rule, RULES[rule].severity, where, message, str(before), str(after), new.model.id)


def _incomparable(old: Profile, new: Profile) -> Iterator[Finding]:
    for name in ("architecture", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim"):
        before, after = getattr(old.model, name), getattr(new.model, name)
        if before != after:
            yield _finding(
                "incomparable-model", new, f"model.{name}", f"{name} is {before} and {after}: two models", before, after
            )
    before, after = old.model.config_digest, new.model.config_digest
    if before and after and before != after:
        message = "the config digests differ: attention is computed in another way"
        yield _finding("incomparable-model", new, "model.config_digest", message, before, after)
    if old.layout_version != new.layout_version:
        message = f"layout versions {old.layout_version} and {new.layout_version} store different bytes"
        yield _finding("incomparable-layout", new, "layout_version", message, old.layout_version, new.layout_version)


def _model(old: Profile, new: Profile) -> Iterator[Finding]:
    a, b = old.model, new.model
    if a.id != b.id:
        yield _finding("model-renamed", new, "model.id", f"the model is called {b.id}, it was {a.id}", a.id, b.id)
    if (a.config_digest is None) != (b.config_digest is None):
        side = "old" if a.config_digest is None else "new"
        message = f"the {side} profile has no config digest: only the shapes were compared"
        yield _finding("model-unverified", new, "model.config_digest", message, a.config_digest, b.config_digest)
    for name in ("revision", "weights_digest"):
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            message = f"the model's {name.replace('_', ' ')} is {_short(after)}, it was {_short(before)}"
            yield _finding("weights-changed", new, f"model.{name}", message, before, after)


def _layers(old: Profile, new: Profile) -> Iterator[LayerChange]:
    heads, dim = new.model.num_kv_heads, new.model.head_dim
    for index, (a, b) in enumerate(zip(old.layer_specs(), new.layer_specs(), strict=True)):
        yield LayerChange(
            index,
            a,
            b,
            a.bytes_per_token(heads, dim),
            b.bytes_per_token(heads, dim),
            a.effective_bits(heads, dim),
            b.effective_bits(heads, dim),
        )


def _storage(comparison: Comparison) -> Iterator[Finding]:
    old, new = comparison.old, comparison.new
    for layer in comparison.layers:
        if not layer.changed:
            continue
        pairs = [(layer.old.key.bits, layer.new.key.bits), (layer.old.value.bits, layer.new.value.bits)]
        if any(after < before for before, after in pairs):
            rule = "layer-bits-lowered"
        elif any(after > before for before, after in pairs):
            rule = "layer-bits-raised"
        else:
            rule = "layer-scheme-changed"
        message = f"layer {layer.index}: {layer.old} becomes {layer.new}"
        yield _finding(rule, new, f"layers.{layer.index}", message, layer.old, layer.new)
    digests = [profile.transforms.digest if profile.transforms else None for profile in (old, new)]
    if digests[0] != digests[1]:
        message = f"the centring vectors are {_short(digests[1])}, they were {_short(digests[0])}"
        yield _finding("transforms-changed", new, "transforms", message, *digests)
    before, after = old.storage.bytes_per_token, new.storage.bytes_per_token
    if before != after:
        rule = "bytes-per-token-increased" if after > before else "bytes-per-token-decreased"
        message = f"a token takes {after} bytes, it took {before} ({(after - before) / before:+.1%})"
        yield _finding(rule, new, "storage.bytes_per_token", message, before, after)
    limit = comparison.budgets.max_bytes_per_token
    if limit is not None and after > limit:
        message = f"a token takes {after} bytes, {after - limit} over the budget of {limit}"
        yield _finding("bytes-over-budget", new, "storage.bytes_per_token", message, limit, after)


def _quality_keys(old: Profile, new: Profile) -> list[tuple[str, str, str]]:
    keys = [(measure.metric, measure.data, measure.split) for measure in (*old.quality, *new.quality)]
    return list(dict.fromkeys(keys))


def _quality_change(old: Profile, new: Profile, metric: str, data: str, split: str) -> QualityChange:
    a, b = (
        next((m for m in profile.quality if (m.metric, m.data, m.split) == (metric, data, split)), None)
        for profile in (old, new)
    )
    if a is None or b is None:
        return QualityChange(metric, data, split, a, b, "added" if a is None else "dropped")
    differing = [name for name in ("samples", "tokens", "confidence") if getattr(a, name) != getattr(b, name)]
    digests = [
        next((d.digest for d in profile.provenance.data if (d.name, d.split) == (data, split)), None)
        for profile in (old, new)
    ]
    if None not in digests and digests[0] != digests[1]:
        differing.append("data digest")
    if differing:
        return QualityChange(metric, data, split, a, b, "incomparable", reason=f"other {', '.join(differing)}")
    difference = b.delta - a.delta
    low = difference - math.hypot(max(0.0, b.delta - b.ci_low), max(0.0, a.ci_high - a.delta))
    high = difference + math.hypot(max(0.0, b.ci_high - b.delta), max(0.0, a.delta - a.ci_low))
    verdict: Verdict = "inconclusive"
    if abs(difference) < _ROUNDING:
        verdict = "same"
    elif low > 0 or high < 0:
        verdict = "regressed" if (low > 0) == (metric != "accuracy") else "improved"
    return QualityChange(metric, data, split, a, b, verdict, difference, low, high)


def _quality(comparison: Comparison) -> Iterator[Finding]:
    old, new, budgets = comparison.old, comparison.new, comparison.budgets
    differs = stored_differently(old, new)
    if differs and not new.quality:
        message = (
            "what is stored differs, and nothing was measured: evaluate the profile, or accept it by this fingerprint"
        )
        yield _finding("quality-unproven", new, "quality", message, old.digest, new.digest)
    rules = {
        "regressed": "quality-regressed",
        "improved": "quality-improved",
        "inconclusive": "quality-inconclusive",
        "incomparable": "quality-incomparable",
        "dropped": "quality-dropped",
    }
    for change in comparison.quality:
        where = f"quality.{change.name}"
        before, after = (repr(m.delta) if m else "" for m in (change.old, change.new))
        rule = rules.get(change.verdict)
        if rule:
            yield _finding(rule, new, where, _quality_message(change), before, after)
        increase, limit = change.loss_increase, budgets.max_loss_increase
        if limit is not None and increase is not None and increase > limit:
            message = f"{change.name} rose by {increase:.6g} nats, {increase - limit:.6g} over the budget of {limit:g}"
            yield _finding("loss-over-budget", new, where, message, before, after)
    proven = any(change.loss_increase is not None for change in comparison.quality)
    if budgets.max_loss_increase is not None and differs and not proven:
        message = "a loss budget is set, but no kl or nll was measured alike in both profiles: evaluate both"
        yield _finding("loss-budget-unproven", new, "quality", message, old.digest, new.digest)


def _quality_message(change: QualityChange) -> str:
    if change.verdict == "dropped":
        return f"{change.name} was measured, and no longer is"
    if change.verdict == "incomparable":
        return f"{change.name} cannot be compared: {change.reason}"
    assert change.difference is not None
    interval = f"[{change.low:+.6g}, {change.high:+.6g}]"
    return f"{change.name} changed by {change.difference:+.6g}, interval {interval}: {change.verdict}"


def _provenance(old: Profile, new: Profile) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []

    def row(name: str, before: object, after: object) -> None:
        if before != after:
            rows.append((name, _text(before), _text(after)))

    a, b = old.provenance, new.provenance
    row("name", old.name, new.name)
    for name in ("origin", "source", "tool", "device", "dtype"):
        row(name, getattr(a, name), getattr(b, name))
    for library in sorted({*a.versions, *b.versions}):
        row(f"versions.{library}", a.versions.get(library), b.versions.get(library))
    before = a.search.model_dump() if a.search else {}
    after = b.search.model_dump() if b.search else {}
    for name in dict.fromkeys([*before, *after]):
        row(f"search.{name}", before.get(name), after.get(name))
    sources = [{(d.name, d.split): f"{d.samples} x, {d.tokens} tokens, {d.digest}" for d in p.data} for p in (a, b)]
    for key in dict.fromkeys([*sources[0], *sources[1]]):
        row(f"data.{'.'.join(key)}", sources[0].get(key), sources[1].get(key))
    return rows


def _origins(comparison: Comparison) -> Iterator[Finding]:
    old, new = comparison.old, comparison.new
    by_prefix = {"origin": "origin-changed", "data": "data-changed", "search": "search-changed"}
    by_prefix |= dict.fromkeys(("tool", "versions", "device", "dtype"), "environment-changed")
    for name, before, after in comparison.provenance:
        rule = by_prefix.get(name.partition(".")[0])
        if rule:
            message = f"{name} is {_short(after)}, it was {_short(before)}"
            yield _finding(rule, new, f"provenance.{name}", message, before, after)
    if old.pareto != new.pareto:
        message = f"the front has {len(new.pareto)} points, it had {len(old.pareto)}"
        if len(new.pareto) == len(old.pareto):
            message = f"the front's {len(new.pareto)} points differ"
        fronts = [repr([(p.bytes_per_token, p.loss, p.layers) for p in profile.pareto]) for profile in (old, new)]
        yield _finding("pareto-changed", new, "pareto", message, *fronts)
    if old.validation is not None and new.validation is None:
        message = "the old profile was validated on a server, the new one was not: run validate"
        yield _finding("validation-dropped", new, "validation", message, old.digest, new.digest)
    elif old.validation is not None and old.validation == new.validation and stored_differently(old, new):
        message = "what is stored differs, but the validation block is the old one: run validate again"
        yield _finding("validation-stale", new, "validation", message, old.digest, new.digest)


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _short(value: object) -> str:
    """Digests cut to what a reader compares."""
    text = "none" if value in (None, "-") else str(value)
    start = text.find("sha256:")
    return text if start < 0 else text[: start + 19] + "…"
