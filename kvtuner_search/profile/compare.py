"""What differs between two profiles: figures layer by layer and in total, and the rules that fire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.profile.build import build
from kvtuner_search.profile.capacity import CONTEXTS
from kvtuner_search.profile.changes import QualityChange, change_message, make_finding, measure_change, short
from kvtuner_search.profile.compare_validation import validation_changes, validation_findings
from kvtuner_search.profile.model_differences import MAX_NAMED, differences
from kvtuner_search.profile.rules import RULES, Finding
from kvtuner_search.profile.schema import Profile, Provenance
from kvtuner_search.profile.text import percent, ranges, runs


@dataclass(frozen=True)
class Budgets:
    """Limits set by the user."""

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
class ProfileComparison:
    """Everything that ``diff`` reports."""

    old: Profile
    new: Profile
    budgets: Budgets
    findings: list[Finding]
    layers: list[LayerChange] = field(default_factory=list)
    quality: list[QualityChange] = field(default_factory=list)
    validation: list[QualityChange] = field(default_factory=list)  # the same through a server
    provenance: list[tuple[str, str, str]] = field(default_factory=list)  # field, old, new: only what differs
    added: bool = False  # there is no old profile; `old` is the 16-bit cache

    @property
    def comparable(self) -> bool:
        return not any(RULES[finding.rule].fixed for finding in self.findings)


def compare(old: Profile, new: Profile, budgets: Budgets | None = None) -> ProfileComparison:
    """Compare two valid profiles; findings carry the catalogue's severities."""
    budgets = budgets or Budgets()
    blocking = list(_incomparable(old, new))
    if blocking:
        return ProfileComparison(old, new, budgets, blocking)
    quality = list(_quality_changes(old, new))
    on_server = validation_changes(old, new)
    draft = ProfileComparison(old, new, budgets, [], list(_layers(old, new)), quality, on_server, _provenance(old, new))
    findings = [
        *_model(old, new),
        *_storage(draft),
        *_quality(draft),
        *_origins(draft),
        *validation_findings(old, new, on_server),
    ]
    return replace(draft, findings=findings)


_JUDGED_ALONE = (
    "incomparable-layout",
    "bytes-over-budget",
    "quality-unproven",
    "loss-over-budget",
    "loss-budget-unproven",
    "validation-stale",
    "validation-failed",
)


def added(new: Profile, budgets: Budgets | None = None) -> ProfileComparison:
    """The same for a new profile: it must meet the budgets, which count its loss against the 16-bit cache.

    Other findings are kept only if they are about the new profile alone.
    """
    found = compare(_sixteen_bit(new), new, budgets)
    message = f"{new.name} is a new profile: there is nothing to compare it with but the 16-bit cache"
    first = make_finding("profile-added", new, "", message, "", new.digest)
    findings = [first, *(finding for finding in found.findings if finding.rule in _JUDGED_ALONE)]
    return replace(found, findings=findings, provenance=[], added=True)


def _sixteen_bit(profile: Profile) -> Profile:
    """The unquantized cache of the same model, with measures that lose nothing."""
    model = profile.model
    layers = [LayerSpec()] * model.num_layers
    alike = [m.model_copy(update={"value": m.baseline, "ci_low": 0.0, "ci_high": 0.0}) for m in profile.quality]
    return build("none", layers, model, Provenance(origin="uniform", tool=profile.provenance.tool), quality=alike)


def stored_differently(old: Profile, new: Profile) -> bool:
    """True if the two caches hold different bytes for the same tokens."""
    vectors = [profile.transforms.digest if profile.transforms else None for profile in (old, new)]
    return old.layers != new.layers or vectors[0] != vectors[1]


def _incomparable(old: Profile, new: Profile) -> Iterator[Finding]:
    for name in ("architecture", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim"):
        before, after = getattr(old.model, name), getattr(new.model, name)
        if before != after:
            yield make_finding(
                "incomparable-model", new, f"model.{name}", f"{name} is {before} and {after}: two models", before, after
            )
    if old.model.num_layers == new.model.num_layers:
        pairs = list(zip(old.model.kinds, new.model.kinds, strict=True))
        for indices, (before, after) in runs(pairs):
            if before != after:
                message = f"layers {ranges(indices)} are {before} and {after}: two models"
                yield make_finding("incomparable-model", new, f"model.layer_kinds.{indices[0]}", message, before, after)
    before, after = old.model.config_digest, new.model.config_digest
    if before and after and before != after:
        fields = differences(old.model, new.model, ("old", "new"))
        message = "the config digests differ: the two models compute attention differently"
        message += f", by {'; '.join(fields[:MAX_NAMED])}" if fields else ""
        yield make_finding("incomparable-model", new, "model.config_digest", message, before, after)
    if old.layout_version != new.layout_version:
        message = f"layout versions {old.layout_version} and {new.layout_version} store different bytes"
        yield make_finding(
            "incomparable-layout", new, "layout_version", message, old.layout_version, new.layout_version
        )


def _model(old: Profile, new: Profile) -> Iterator[Finding]:
    a, b = old.model, new.model
    if a.id != b.id:
        yield make_finding("model-renamed", new, "model.id", f"the model is called {b.id}, it was {a.id}", a.id, b.id)
    if (a.config_digest is None) != (b.config_digest is None):
        side = "old" if a.config_digest is None else "new"
        message = f"the {side} profile has no config digest: only the shapes were compared"
        yield make_finding("model-unverified", new, "model.config_digest", message, a.config_digest, b.config_digest)
    for name in ("revision", "weights_digest"):
        before, after = getattr(a, name), getattr(b, name)
        if before != after:
            message = f"the model's {name.replace('_', ' ')} is {short(after)}, it was {short(before)}"
            yield make_finding("weights-changed", new, f"model.{name}", message, before, after)


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


def basis_changed(old: Profile, new: Profile) -> bool:
    """True if all specs are the same and some are banded, but the transforms differ: the same format stores other numbers."""
    banded = any(entry.bands is not None for layer in new.layers for entry in (layer.key, layer.value))
    return banded and old.layers == new.layers and stored_differently(old, new)


def _layer_rules(layer: LayerChange) -> Iterator[str]:
    """Ids of the rules that a layer's change of spec fires."""
    sides = [(layer.old.key, layer.new.key), (layer.old.value, layer.new.value)]
    pairs = [(before.mean_bits, after.mean_bits) for before, after in sides]
    lowered = any(after < before for before, after in pairs)
    raised = any(after > before for before, after in pairs)
    banding = any(before.banded != after.banded for before, after in sides)
    narrowed = any(
        before.banded and after.banded and min(after.bands) < min(before.bands) and after.mean_bits >= before.mean_bits
        for before, after in sides
    )
    if lowered or raised:
        yield "layer-bits-lowered" if lowered else "layer-bits-raised"
    if narrowed:
        yield "layer-band-narrowed"
    if banding:
        yield "layer-banding-changed"
    if not (lowered or raised or narrowed or banding):
        yield "layer-scheme-changed"


def _storage(comparison: ProfileComparison) -> Iterator[Finding]:
    old, new = comparison.old, comparison.new
    for layer in comparison.layers:
        if layer.changed:
            message = f"layer {layer.index}: {layer.old} becomes {layer.new}"
            for rule in _layer_rules(layer):
                yield make_finding(rule, new, f"layers.{layer.index}", message, layer.old, layer.new)
    digests = [profile.transforms.digest if profile.transforms else None for profile in (old, new)]
    if digests[0] != digests[1]:
        rule, what = "transforms-changed", "the centring vectors or bases are"
        if basis_changed(old, new):
            rule, what = "basis-changed", "all specs are the same, but their bases are"
        message = f"{what} {short(digests[1])}, they were {short(digests[0])}"
        yield make_finding(rule, new, "transforms", message, *digests)
    before, after = old.storage.bytes_per_token, new.storage.bytes_per_token
    if before != after:
        rule = "bytes-per-token-increased" if after > before else "bytes-per-token-decreased"
        message = f"a token takes {after} bytes, it took {before} ({percent(before, after)})"
        yield make_finding(rule, new, "storage.bytes_per_token", message, before, after)
    longest = CONTEXTS[-1]
    first, then = old.bytes_per_request(longest), new.bytes_per_request(longest)
    if new.model.layer_kinds is not None and then > first and after <= before:
        message = f"a request of {longest:,} tokens takes {then} bytes, it took {first} ({percent(first, then)}), though a token takes no more"
        yield make_finding("bytes-per-request-increased", new, "storage.bytes_per_token_full", message, first, then)
    limit = comparison.budgets.max_bytes_per_token
    if limit is not None and after > limit:
        message = f"a token takes {after} bytes, {after - limit} over the budget of {limit}"
        yield make_finding("bytes-over-budget", new, "storage.bytes_per_token", message, limit, after)


def _quality_changes(old: Profile, new: Profile) -> Iterator[QualityChange]:
    sides = [{(m.metric, m.data, m.split): m for m in profile.quality} for profile in (old, new)]
    data = [{(d.name, d.split): d.digest for d in profile.provenance.data} for profile in (old, new)]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        digests = [found.get(key[1:]) for found in data]
        yield measure_change(sides[0].get(key), sides[1].get(key), None not in digests and digests[0] != digests[1])


def _quality(comparison: ProfileComparison) -> Iterator[Finding]:
    old, new, budgets = comparison.old, comparison.new, comparison.budgets
    differs = stored_differently(old, new)
    if differs and not any(measure.has_interval for measure in new.quality):
        found = "was measured on more than one sample" if new.quality else "was measured"
        message = (
            f"the stored format differs, and nothing {found}: evaluate the profile, or accept it by this fingerprint"
        )
        yield make_finding("quality-unproven", new, "quality", message, old.digest, new.digest)
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
            yield make_finding(rule, new, where, change_message(change), before, after)
        increase, limit = change.loss_increase, budgets.max_loss_increase
        if limit is not None and increase is not None and increase > limit:
            message = f"{change.name} rose by {increase:.6g} nats, {increase - limit:.6g} over the budget of {limit:g}"
            yield make_finding("loss-over-budget", new, where, message, before, after)
    proven = any(change.loss_increase is not None for change in comparison.quality)
    if budgets.max_loss_increase is not None and differs and not proven:
        message = "a loss budget is set, but no kl or nll was measured on the same data in both profiles: evaluate both"
        yield make_finding("loss-budget-unproven", new, "quality", message, old.digest, new.digest)


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


def _origins(comparison: ProfileComparison) -> Iterator[Finding]:
    old, new = comparison.old, comparison.new
    by_prefix = {"origin": "origin-changed", "data": "data-changed", "search": "search-changed"}
    by_prefix |= dict.fromkeys(("tool", "versions", "device", "dtype"), "environment-changed")
    for name, before, after in comparison.provenance:
        rule = by_prefix.get(name.partition(".")[0])
        if rule:
            message = f"{name} is {short(after)}, it was {short(before)}"
            yield make_finding(rule, new, f"provenance.{name}", message, before, after)
    if old.pareto != new.pareto:
        message = f"the front has {len(new.pareto)} points, it had {len(old.pareto)}"
        if len(new.pareto) == len(old.pareto):
            message = f"the front's {len(new.pareto)} points differ"
        fronts = [repr([(p.bytes_per_token, p.loss, p.layers) for p in profile.pareto]) for profile in (old, new)]
        yield make_finding("pareto-changed", new, "pareto", message, *fronts)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
