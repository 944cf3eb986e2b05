"""Every rule of diff: a case that fires it, and one just below that does not."""

from __future__ import annotations

from typing import Any

import pytest

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search.profile.canonical import canonical_json, digest_of, digest_without_validation, loads
from kvtuner_search.profile.compare import Budgets, compare
from kvtuner_search.profile.rules import RULES
from kvtuner_search.profile.schema import Profile
from tests.search.profile_factory import (
    capacity,
    digest,
    front,
    measure,
    profile,
    server_measure,
    validated,
    validation,
)

SEARCH = {"sampler": "tpe", "seed": 1, "trials": 60, "variables": 4}
DATA = {"name": "recall", "split": "test", "samples": 200, "tokens": 51200}
VECTORS = {"file": "a.safetensors", "digest": digest("a")}
OTHER_VECTORS = {"file": "b.safetensors", "digest": digest("b")}
K8V4, K8V8, K4V4, K4V8 = (f"{k}-g64-asym/{v}-g64-asym" for k, v in ((8, 4), (8, 8), (4, 4), (4, 8)))
Side = dict[str, Any]


def block(failing: bool = False, **more: Any) -> Side:
    """A validation block of the default profile."""
    return validation(digest_without_validation(profile()), failing=failing, **more)


def banded(layers: str | list[str], vectors: Side = VECTORS) -> Side:
    """A side with a transforms file."""
    return {"layers": layers, "transforms": vectors}


OWN = block()
# rule -> (old, new, budgets) that fires it, (old, new, budgets) just below; sides are arguments of profile()
NONE = Budgets()
CASES: dict[str, tuple[tuple[Side, Side, Budgets], tuple[Side, Side, Budgets]]] = {
    "incomparable-model": (
        ({}, {"model__config_digest": digest("other")}, NONE),
        ({}, {"model__config_digest": None}, NONE),
    ),
    "model-renamed": (({}, {"model__id": "example/large"}, NONE), ({}, {"name": "large"}, NONE)),
    "model-unverified": (
        ({}, {"model__config_digest": None}, NONE),
        ({"model__config_digest": None}, {"model__config_digest": None}, NONE),
    ),
    "weights-changed": (
        ({"model__revision": "a"}, {"model__revision": "b"}, NONE),
        ({"model__revision": "a"}, {"model__revision": "a"}, NONE),
    ),
    "layer-bits-lowered": (
        ({"layers": K8V4}, {"layers": [K8V4, K4V8, K8V4, K8V4]}, NONE),  # the values' rise does not make up for the keys' fall
        ({"layers": K8V4}, {"layers": [K8V4, K8V8, K8V4, K8V4]}, NONE),
    ),
    "layer-bits-raised": (
        ({"layers": K8V4}, {"layers": [K8V4, K8V8, K8V4, K8V4]}, NONE),
        ({"layers": K8V4}, {"layers": [K8V4, K4V8, K8V4, K8V4]}, NONE),
    ),
    "layer-scheme-changed": (
        ({"layers": "4-g64-asym/4-g64-asym"}, {"layers": "4-g32-asym/4-g64-asym"}, NONE),
        ({"layers": "4-g64-asym/4-g64-asym"}, {"layers": "8-g32-asym/4-g64-asym"}, NONE),
    ),
    "layer-band-narrowed": (  # the mean stays, the last band goes from 2 bits to 1
        (banded("b44443322/16"), banded("b44444321/16"), NONE),
        (banded("b44443322/16"), banded("b44443222/16"), NONE),  # the mean falls too: that is another rule
    ),
    "layer-banding-changed": (
        ({"layers": "4-g64-asym/16"}, banded("b44444444/16"), NONE),
        (banded("b44444444/16"), banded("b55444433/16"), NONE),
    ),
    "transforms-changed": (
        ({"transforms": VECTORS}, {"transforms": OTHER_VECTORS}, NONE),
        ({"transforms": VECTORS}, {"transforms": {**OTHER_VECTORS, "digest": VECTORS["digest"]}}, NONE),
    ),
    "basis-changed": (
        (banded("b44443322/16"), banded("b44443322/16", OTHER_VECTORS), NONE),
        (banded("b44443322/16"), banded("b44443332/16", OTHER_VECTORS), NONE),  # the specs say that much
    ),
    "bytes-per-token-increased": (({"layers": K8V4}, {"layers": K8V8}, NONE), ({"layers": K8V4}, {"layers": K4V8}, NONE)),
    "bytes-per-token-decreased": (({"layers": K8V8}, {"layers": K8V4}, NONE), ({"layers": K8V4}, {"layers": K4V8}, NONE)),
    "bytes-per-request-increased": (
        ({"layers": [K8V8, K8V4], "kinds": ["sliding:16", "full"]}, {"layers": [K8V4, K8V8], "kinds": ["sliding:16", "full"]}, NONE),
        ({"layers": [K8V4, K8V8], "kinds": ["sliding:16", "full"]}, {"layers": [K8V8, K8V4], "kinds": ["sliding:16", "full"]}, NONE),
    ),
    "bytes-over-budget": (({}, {}, Budgets(max_bytes_per_token=831)), ({}, {}, Budgets(max_bytes_per_token=832))),
    # half-widths 0.003 and 0.004 combine to 0.005
    "quality-regressed": (
        ({"quality": [measure(value=0.02, half=0.003)]}, {"quality": [measure(value=0.02501, half=0.004)]}, NONE),
        ({"quality": [measure(value=0.02, half=0.003)]}, {"quality": [measure(value=0.02499, half=0.004)]}, NONE),
    ),
    "quality-improved": (
        ({"quality": [measure(value=0.02501, half=0.003)]}, {"quality": [measure(value=0.02, half=0.004)]}, NONE),
        ({"quality": [measure(value=0.02499, half=0.003)]}, {"quality": [measure(value=0.02, half=0.004)]}, NONE),
    ),
    "quality-inconclusive": (
        ({"quality": [measure(value=0.02)]}, {"quality": [measure(value=0.0201)]}, NONE),
        ({"quality": [measure(value=0.02)]}, {"quality": [measure(value=0.02)]}, NONE),
    ),
    "quality-unproven": (
        ({"layers": K8V8, "quality": []}, {"layers": K8V4, "quality": []}, NONE),
        ({"layers": K8V8, "quality": []}, {"layers": K8V8, "quality": []}, NONE),
    ),
    "quality-dropped": (
        ({"quality": [measure(), measure("accuracy")]}, {"quality": [measure()]}, NONE),
        ({"quality": [measure()]}, {"quality": [measure(), measure("accuracy")]}, NONE),
    ),
    "quality-incomparable": (
        ({"quality": [measure()]}, {"quality": [measure(tokens=51199)]}, NONE),
        ({"quality": [measure()]}, {"quality": [measure(tokens=51199, split="search")]}, NONE),
    ),
    "loss-over-budget": (
        ({"quality": [measure(value=0.0)]}, {"quality": [measure(value=0.26)]}, Budgets(max_loss_increase=0.25)),
        ({"quality": [measure(value=0.0)]}, {"quality": [measure(value=0.25)]}, Budgets(max_loss_increase=0.25)),
    ),
    "loss-budget-unproven": (
        ({"layers": K8V8}, {"layers": K8V4, "quality": [measure("accuracy")]}, Budgets(max_loss_increase=0.25)),
        ({"layers": K8V8}, {"layers": K8V8, "quality": [measure("accuracy")]}, Budgets(max_loss_increase=0.25)),
    ),
    "data-changed": (
        ({}, {"provenance__data": [{**DATA, "digest": digest("x")}]}, NONE),
        ({}, {"provenance__data": [{**DATA, "digest": digest("recall")}]}, NONE),
    ),
    "origin-changed": (({}, {"provenance__origin": "imported"}, NONE), ({}, {"provenance__source": "elsewhere"}, NONE)),
    "search-changed": (({}, {"provenance__search": SEARCH}, NONE), ({}, {"provenance__search": {**SEARCH, "seed": 0}}, NONE)),
    "environment-changed": (
        ({}, {"provenance__versions": {"torch": "2.14.0"}}, NONE),
        ({}, {"provenance__versions": {"torch": "2.13.0"}, "provenance__notes": ["x"]}, NONE),
    ),
    "pareto-changed": (
        ({"pareto": front((K8V4, 0.1))}, {"pareto": front((K8V4, 0.1001))}, NONE),
        ({"pareto": front((K8V4, 0.1))}, {"pareto": front((K8V4, 0.1))}, NONE),
    ),
    "validation-dropped": (({"validation": OWN}, {"validation": None}, NONE), ({"validation": OWN}, {"validation": OWN}, NONE)),
    "validation-stale": (({"validation": OWN}, {"name": "other", "validation": OWN}, NONE), ({"validation": None}, {"validation": OWN}, NONE)),
    "validation-failed": (
        ({"validation": OWN}, {"validation": block(failing=True)}, NONE),
        ({"validation": block(failing=True)}, {"validation": block(failing=True)}, NONE),
    ),
    "validation-regressed": (
        ({"validation": OWN}, {"validation": block(likelihood=[server_measure("nll", "recall", 0.0157, 0.004)])}, NONE),
        ({"validation": OWN}, {"validation": block(likelihood=[server_measure("nll", "recall", 0.0156, 0.004)])}, NONE),
    ),
    "validation-capacity-regressed": (
        ({"validation": OWN}, {"validation": block(capacity=capacity(394_990))}, NONE),
        ({"validation": OWN}, {"validation": block(capacity=capacity(395_010))}, NONE),
    ),
    "validation-incomparable": (
        ({"validation": OWN}, {"validation": block(tasks=[])}, NONE),
        ({"validation": block(tasks=[])}, {"validation": OWN}, NONE),
    ),
    "validation-server-changed": (
        ({"validation": OWN}, {"validation": block(versions={"sglang": "0.5.23"})}, NONE),
        ({"validation": OWN}, {"validation": block(date="2026-11-23T12:00:00Z")}, NONE),
    ),
}  # fmt: skip


def fired(old: Profile, new: Profile, budgets: Budgets = NONE) -> list[str]:
    return [finding.rule for finding in compare(old, new, budgets).findings]


def of_layout(version: int) -> Profile:
    body = profile().model_dump(mode="json") | {"layout_version": version}
    return loads(canonical_json(body | {"digest": digest_of(body)}).encode(), "x", any_layout=True)


def test_every_rule_has_its_cases() -> None:
    assert {*CASES, "incomparable-layout", "profile-added", "gate-changed"} == set(RULES)


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_fires(rule: str) -> None:
    old, new, budgets = CASES[rule][0]
    findings = [f for f in compare(profile(**old), profile(**new), budgets).findings if f.rule == rule]
    assert findings
    assert findings[0].severity == RULES[rule].severity
    assert findings[0].message
    assert findings[0].where


@pytest.mark.parametrize("rule", CASES)
def test_the_rule_does_not_fire_just_below(rule: str) -> None:
    old, new, budgets = CASES[rule][1]
    assert rule not in fired(profile(**old), profile(**new), budgets)


def test_other_layouts_are_not_comparable() -> None:
    other = LAYOUT_VERSION + 1
    assert fired(of_layout(other), profile()) == ["incomparable-layout"]
    assert fired(of_layout(other), of_layout(other)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model__architecture": "LlamaForCausalLM"},
        {"model__num_attention_heads": 8},
        {"count": 5},
    ],
)
def test_other_shapes_are_not_comparable(change: Side) -> None:
    comparison = compare(profile(), profile(**change))
    assert [finding.rule for finding in comparison.findings] == ["incomparable-model"]
    assert not comparison.comparable
    assert comparison.layers == []


def test_equal_profiles_have_no_findings() -> None:
    assert fired(profile(), profile()) == []


def test_accuracy_regresses_downwards() -> None:
    high, low = {"quality": [measure("accuracy", 0.9, 0.01)]}, {"quality": [measure("accuracy", 0.8, 0.01)]}
    assert fired(profile(**high), profile(**low)) == ["quality-regressed"]
    assert fired(profile(**low), profile(**high)) == ["quality-improved"]


def test_an_asymmetric_interval_is_used_on_its_own_side() -> None:
    """MOVER: the lower limit needs the new interval's lower half and the old one's upper half."""
    old = measure(value=0.02) | {"ci_low": 0.0, "ci_high": 0.023}
    new = measure(value=0.03) | {"ci_low": 0.026, "ci_high": 0.09}
    change = compare(profile(quality=[old]), profile(quality=[new])).quality[0]
    assert change.low == pytest.approx(0.01 - (0.004**2 + 0.003**2) ** 0.5)
    assert change.high == pytest.approx(0.01 + (0.06**2 + 0.02**2) ** 0.5)
    assert change.verdict == "regressed"


def test_a_measure_on_other_data_is_not_compared_even_if_its_size_agrees() -> None:
    new = {"quality": [measure(value=0.9)], "provenance__data": [{**DATA, "digest": digest("x")}]}
    rules = fired(profile(), profile(**new), Budgets(max_loss_increase=0.0))
    assert "quality-incomparable" in rules
    assert "quality-regressed" not in rules
    assert "loss-over-budget" not in rules


def test_a_stale_block_is_the_only_thing_said_of_the_validation() -> None:
    new = profile(name="other", validation=block(failing=True, capacity=capacity(1)))
    assert [rule for rule in fired(validated(), new) if rule.startswith("validation")] == ["validation-stale"]
    assert compare(validated(), new).validation == []


def test_figures_of_a_stale_old_block_are_not_compared_with() -> None:
    worse = validated(likelihood=[server_measure("nll", "recall", 0.9, 0.004)])
    assert "validation-regressed" in fired(validated(), worse)
    assert fired(profile(name="other", validation=OWN), worse) == []


def test_other_prompts_make_a_server_measure_incomparable() -> None:
    data = [{"name": "recall", "split": "test", "samples": 40, "tokens": 20000, "digest": digest("other prompts")}]
    assert fired(validated(), validated(data=data)) == ["validation-incomparable"]


def test_a_capacity_that_can_no_longer_be_compared_is_a_regression() -> None:
    new = validated(capacity=capacity(399_000) | {"comparable": False, "reason": "capped"})
    assert fired(validated(), new) == ["validation-capacity-regressed"]
    assert fired(new, validated()) == []
    [found] = compare(validated(), new).findings
    assert found.message == (
        "the server's token capacity can no longer be compared with what the layout predicts; it was 0.9975 of that"
    )


def test_server_measures_stand_apart_from_offline_ones() -> None:
    comparison = compare(validated(), validated(likelihood=[server_measure("nll", "recall", 0.02, 0.004)]))
    assert [(c.name, c.verdict) for c in comparison.validation] == [
        ("nll.recall.test", "regressed"),
        ("accuracy.recall.test", "same"),
    ]
    assert [c.verdict for c in comparison.quality] == ["same"]


def test_nll_counts_from_its_baseline() -> None:
    old = {"quality": [measure("nll", 2.50, 0.001, baseline=2.40)]}
    new = {"quality": [measure("nll", 2.60, 0.001, baseline=2.50)]}
    assert fired(profile(**old), profile(**new)) == [], "both lose 0.1 nats"


def test_fingerprints_depend_on_what_changed_and_on_nothing_else() -> None:
    def prints(old: Side, new: Side) -> dict[str, str]:
        return {f.where: f.fingerprint for f in compare(profile(**old), profile(**new)).findings}

    base = prints({"layers": K8V8}, {"layers": [K8V8, K8V4, K8V4, K8V8]})
    assert prints({"layers": K8V8}, {"layers": [K8V8, K8V4, K8V4, K8V8]}) == base
    assert len(set(base.values())) == len(base)
    renamed = prints(
        {"layers": K8V8, "name": "a"}, {"layers": [K8V8, K8V4, K8V4, K8V8], "name": "b", "provenance__notes": ["x"]}
    )
    assert renamed["layers.1"] == base["layers.1"]
    assert prints({"layers": K8V8}, {"layers": [K8V8, K4V4, K8V4, K8V8]})["layers.1"] != base["layers.1"]
    assert prints({"layers": K8V8}, {"layers": [K8V8, K4V4, K8V4, K8V8]})["layers.2"] == base["layers.2"]


def test_a_known_fingerprint_stays() -> None:
    """Configurations carry fingerprints, so they must survive releases."""
    finding = compare(profile(K8V8), profile([K8V4, K8V8, K8V8, K8V8])).findings[0]
    assert (finding.rule, finding.where, finding.fingerprint) == ("layer-bits-lowered", "layers.0", "126694049ce3e0ab")


def test_the_totals_are_the_layers() -> None:
    comparison = compare(profile(K8V8), profile([K8V4, K4V4, K8V8, "16/16"]))
    assert sum(layer.old_bytes for layer in comparison.layers) == comparison.old.storage.bytes_per_token
    assert sum(layer.new_bytes for layer in comparison.layers) == comparison.new.storage.bytes_per_token
    assert comparison.layers[3].new_bits == 16


B, RAISED, LOWERED = "b65443322", "b65443332", "b65443222"


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        (f"{B}/{B}", f"{RAISED}/{B}", ["layer-bits-raised"]),
        (f"{B}/{B}", f"{RAISED}/{LOWERED}", ["layer-bits-lowered"]),
        (f"{B}/{B}", f"b66543320/{B}", ["layer-band-narrowed"]),
        (f"{B}/{B}", f"b88543320/{B}", ["layer-bits-raised", "layer-band-narrowed"]),
        (f"{B}/{B}", f"b65443320/{B}", ["layer-bits-lowered"]),
        (f"{B}/{B}", f"b56443322/{B}", ["layer-scheme-changed"]),
        (f"4-g64-asym/{B}", f"{B}/{B}", ["layer-bits-lowered", "layer-banding-changed"]),
        (f"{B}/{B}", f"4-g64-asym/{B}", ["layer-bits-raised", "layer-banding-changed"]),
        (f"4-g64-asym-c/{B}", f"b66644420/{B}", ["layer-banding-changed"]),
        (f"{B}/{B}", f"16/{B}", ["layer-bits-raised", "layer-banding-changed"]),
    ],
)
def test_what_a_change_of_bands_is_called(old: str, new: str, rules: list[str]) -> None:
    found = compare(profile(**banded(old)), profile(**banded(new))).findings
    assert list(dict.fromkeys(f.rule for f in found if f.rule.startswith("layer-"))) == rules
    assert all(f.message.endswith(f": {old} becomes {new}") for f in found if f.rule.startswith("layer-"))


def test_another_basis_is_said_once_and_counts_as_stored_differently() -> None:
    old = banded(f"{B}/16")
    new = old | {"transforms": OTHER_VECTORS, "quality": []}
    findings = compare(profile(**old), profile(**new)).findings
    assert [f.rule for f in findings] == ["basis-changed", "quality-unproven", "quality-dropped"]
    assert (findings[0].severity, findings[0].where) == ("warning", "transforms")
    assert fired(profile(**old), profile(**old)) == []


def test_other_vectors_without_bands_are_no_other_basis() -> None:
    centred = "4-g64-asym-c/16"
    assert fired(profile(**banded(centred)), profile(**banded(centred, OTHER_VECTORS))) == ["transforms-changed"]


def test_bytes_of_bands_are_those_of_shared_words() -> None:
    comparison = compare(profile(**banded("b44444444/16")), profile(**banded("b65443322/b44333222")))
    layer = comparison.layers[0]
    assert layer.new_bytes == 2 * (4 * 8 * 2), (
        "52 bits of codes and two of scales in 4 words of 8 channels, for each head"
    )
    assert comparison.new.storage.bytes_per_token == 4 * layer.new_bytes
