"""Pruning, grouping, the exact proxy, its correction, and pipeline stages, each against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_kernels.layout import TensorSpec
from kvtuner_search.calibration.anchors import anchors, preset_pairs, uniform_pairs
from kvtuner_search.calibration.banded import banded_pairs
from kvtuner_search.calibration.basis import LayerWorth, SideWorth
from kvtuner_search.calibration.candidates import RAW_CLASS, Pair, StorageClass, banded_classes, storage_classes
from kvtuner_search.calibration.proxy import correct, predicted_front, proxy_front
from kvtuner_search.calibration.space import TILTS, LayerOptions, Space, build_space, prune
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.presets import per_token
from kvtuner_search.profile.stages import balanced_partition, pipeline_cost

HEADS, DIM = 2, 64
CLASSES = storage_classes((2, 4, 8), (0,), DIM)
BANDED = storage_classes((2, 4, 8), (0,), DIM, bands=True)


def parse_pair(text: str) -> Pair:
    key, _, value = text.partition("/")
    return StorageClass.parse(key), StorageClass.parse(value)


def make_layer(seed: int, hurt: float = 1.0) -> LayerOptions:
    rng = np.random.default_rng(seed)
    specs = {c: c.spec("centred") for c in CLASSES}
    key_loss, value_loss = ({c: float(hurt * 4.0**-c.bits * rng.uniform(0.5, 2)) for c in CLASSES} for _ in range(2))
    errors = {(k, v): float(2.0**-k.bits + 2.0**-v.bits + rng.uniform(0, 0.02)) for k in CLASSES for v in CLASSES}
    return LayerOptions(specs, specs, key_loss, value_loss, errors)


def make_banded_layer(seed: int, hurt: float = 1.0) -> LayerOptions:
    rng = np.random.default_rng(seed + 1000)
    sides = [-np.sort(-rng.lognormal(0, 1.5, 8)) * hurt * 0.1 for _ in range(2)]
    worth = LayerWorth(*(SideWorth((tuple(map(float, side)),)) for side in sides))
    plain = make_layer(seed, hurt)
    pairs = banded_pairs(worth, {20: float(rng.uniform(0.5, 2))}, {20: float(rng.uniform(0.5, 2))}, 64)
    return LayerOptions(plain.keys, plain.values, plain.key_loss, plain.value_loss, plain.pair_error, pairs)


def make_space(layers: int = 3, banded: bool = False, **changes: object) -> Space:
    make = make_banded_layer if banded else make_layer
    options = [make(seed, hurt=10.0 ** (seed % 3)) for seed in range(layers)]
    arguments = {"keep": uniform_pairs(CLASSES), "grouping": "off"} | changes
    return build_space(options, HEADS, DIM, **arguments)  # type: ignore[arg-type]


def test_classes_have_names_that_read_back() -> None:
    assert [str(c) for c in storage_classes((16, 4), (0, 32), 64)] == [
        "16",
        "4-g32-asym",
        "4-g32-sym",
        "4-g64-asym",
        "4-g64-sym",
    ]
    assert [StorageClass.parse(str(c)) for c in CLASSES] == CLASSES
    assert parse_pair("16/2-g64-sym") == (RAW_CLASS, StorageClass(2, True, 64))
    assert str(StorageClass(0, total=28)) == "3.5-bands"
    assert parse_pair("3.5-bands/0.5-bands") == (StorageClass(0, total=28), StorageClass(0, total=4))
    assert [StorageClass.parse(str(c)) for c in BANDED] == BANDED
    for text in (
        *("4a64/16", "5-g64-asym/16", "4-g64/16", "4-g64-asym-c/16", "4-g64-asym/", "4-g64-asym", "b28/b4"),
        *("-bands/16", "8.125-bands/16", "0-bands/16", "3.50-bands/16", "3.4-bands/16", "b65443322/4-bands"),
    ):
        with pytest.raises(UsageError, match="write"):
            parse_pair(text)
    with pytest.raises(UsageError, match="groups of 128"):
        storage_classes((4,), (128,), 64)


def test_pruning_keeps_the_front_and_what_it_is_told_to() -> None:
    layer, keep = make_layer(0), uniform_pairs(CLASSES)
    kept = prune(layer, HEADS, DIM, keep)

    def cost(pair: tuple[StorageClass, StorageClass]) -> int:
        return layer.spec(pair).bytes_per_token(HEADS, DIM)

    for pair in layer.pair_error:
        beaten = any(
            cost(other) <= cost(pair) and layer.pair_error[other] < layer.pair_error[pair] for other in layer.pair_error
        )
        assert (pair in kept) == (not beaten or pair in keep)
    assert list(kept) == sorted(kept, key=lambda pair: (cost(pair), pair))


def test_pruning_keeps_the_best_banded_pairs_of_each_size_and_drops_what_they_beat() -> None:
    layer, keep = make_banded_layer(0), uniform_pairs(BANDED)
    kept = prune(layer, HEADS, DIM, keep)

    def cost(pair: tuple[StorageClass, StorageClass]) -> int:
        return layer.spec(pair).bytes_per_token(HEADS, DIM)

    for pair in kept:
        if pair in keep:
            continue
        cheaper = [p for p in layer.banded if cost(p) <= cost(pair)]
        if pair not in layer.banded:
            assert all(layer.loss(p) >= layer.loss(pair) for p in cheaper)
            continue
        same = [p for p in cheaper if cost(p) == cost(pair)]
        predicted = {p: tuple(map(sum, layer.expected(p))) for p in same}
        assert any(
            tilt * losses[pair][0] + losses[pair][1] == min(tilt * keys + values for keys, values in losses.values())
            for losses in ({p: layer.losses(p) for p in same}, predicted)
            for tilt in TILTS
        )
    for nbytes in {cost(pair) for pair in layer.banded}:
        same = [pair for pair in layer.banded if cost(pair) == nbytes]
        assert min(same, key=layer.loss) in kept
        assert min(same, key=layer.predicted) in kept
    assert set(keep) <= set(kept)
    assert (StorageClass(0, total=24), StorageClass(0, total=24)) in keep
    assert len(kept) < 60


def test_what_gradients_predict_is_handed_out_exactly_and_spends_the_budget() -> None:
    """Against every combination of every banded pair, kept or not."""
    space = make_space(2, banded=True)
    first, second = space.options
    cost = {pair: first.spec(pair).bytes_per_token(HEADS, DIM) for pair in first.banded}
    assert cost == {pair: second.spec(pair).bytes_per_token(HEADS, DIM) for pair in second.banded}
    front = predicted_front(space)
    for point in front:
        least = min(
            first.predicted(a) + second.predicted(b)
            for a, b in itertools.product(cost, repeat=2)
            if cost[a] + cost[b] <= point.nbytes
        )
        assert point.loss == pytest.approx(least)
        setting = space.setting(point.choices)
        assert all(side.banded for spec in setting for side in (spec.key, spec.value)) or point is front[-1]
        assert sum(spec.bytes_per_token(HEADS, DIM) for spec in setting) == point.nbytes
    word = 16 // 8 * HEADS * DIM // 8  # bytes by which banded layers differ
    assert all(b.nbytes - a.nbytes == word for a, b in itertools.pairwise(front[:-1]))
    assert predicted_front(make_space(2)) == []


def test_layers_are_grouped_when_they_are_alike_and_not_when_they_are_not() -> None:
    alike = [make_layer(0, hurt) for hurt in (1, 1.01, 1.02, 1000, 1010, 1020)]
    grouped = build_space(alike, HEADS, DIM, uniform_pairs(CLASSES), "auto")
    assert [v.layers for v in grouped.variables] == [(0, 1, 2), (3, 4, 5)]
    assert grouped.grouping_quality is not None
    assert grouped.grouping_quality > 0.9
    spread = [make_layer(seed) for seed in range(6)]  # differ in every class, with no pattern
    single = build_space(spread, HEADS, DIM, uniform_pairs(CLASSES), "auto")
    assert [v.layers for v in single.variables] == [(i,) for i in range(6)]
    assert single.grouping_quality is None
    assert single.rejected_quality is not None
    assert single.rejected_quality < 0.7
    assert len(build_space(spread, HEADS, DIM, uniform_pairs(CLASSES), "on").variables) < 6


@pytest.mark.parametrize("banded", [False, True])
def test_the_proxy_front_is_exact(banded: bool) -> None:
    space = make_space(3, banded)
    weights = np.random.default_rng(3).uniform(0.5, 2, 6)
    everything = []
    for choices in itertools.product(*(range(len(v.pairs)) for v in space.variables)):
        everything.append((space.nbytes(choices), float(space.features(choices) @ weights)))
    best: dict[int, float] = {}
    for nbytes, loss in everything:
        best[nbytes] = min(loss, best.get(nbytes, np.inf))
    expected, least = [], np.inf
    for nbytes in sorted(best):
        if best[nbytes] < least - 1e-15:
            least = best[nbytes]
            expected.append((nbytes, least))
    front = proxy_front(space, weights)
    assert [p.nbytes for p in front] == [nbytes for nbytes, _ in expected]
    assert [p.loss for p in front] == pytest.approx([loss for _, loss in expected])
    for point in front:
        assert space.nbytes(point.choices) == point.nbytes
        assert float(space.features(point.choices) @ weights) == pytest.approx(point.loss)


def test_an_optimum_keeps_its_budget_though_it_is_also_that_of_a_smaller_one() -> None:
    """Above the front's end, 97 % of the budget has the same optimum."""
    space = make_space(4)
    front = proxy_front(space)
    budget = 2 * front[-1].nbytes
    [proxy] = [anchor for anchor in anchors(space, front, [], [], [budget]) if anchor.origin == "proxy"]
    assert (proxy.choices, proxy.goal) == (front[-1].choices, budget)


def test_the_correction_learns_which_layer_hurts_more_than_alone() -> None:
    space = make_space(4)
    rng = np.random.default_rng(0)
    truth = np.array([1, 1, 3, 1, 1, 1, 0.5, 1])
    trials = []
    for _ in range(80):
        choices = tuple(int(rng.integers(len(v.pairs))) for v in space.variables)
        trials.append((choices, float(space.features(choices) @ truth)))
    correction = correct(space, trials)
    assert correction.mean.argmax() == 2
    assert correction.common * correction.mean[2] == pytest.approx(3, rel=0.25)
    assert np.allclose(correct(space, []).mean, 1)
    draws = np.array([correct(space, []).draw(rng) for _ in range(500)])
    assert draws.std(0) == pytest.approx(0.5, rel=0.25)


def test_anchors_are_distinct_affordable_and_cover_uniform_settings() -> None:
    space = make_space(4)
    budget = space.nbytes(space.choices_of([parse_pair("4-g64-asym/4-g64-asym")] * 4) or ())
    found = anchors(
        space, proxy_front(space), uniform_pairs(CLASSES), [[parse_pair("8-g64-asym/4-g64-asym")] * 4], [budget]
    )
    assert len({a.choices for a in found}) == len(found)
    assert all(space.nbytes(a.choices) <= budget for a in found if a.origin == "proxy")
    uniform = [a for a in found if a.origin == "uniform"]
    assert len(uniform) == 10  # five bit pairs, asymmetric and symmetric
    assert "fisher" not in {a.origin for a in found}
    banded = make_space(4, banded=True)
    found = anchors(banded, proxy_front(banded), uniform_pairs(BANDED), [], [budget, budget // 2])
    assert [a.origin for a in found[:3]] == ["fisher", "fisher", "proxy"]
    for anchor, limit in zip(found, (budget, budget // 2), strict=False):
        assert banded.nbytes(anchor.choices) <= limit
        assert banded.nbytes(anchor.choices) > limit - 64  # a word more would not fit
    alike = {pair for a in found if a.origin == "uniform" and (pair := banded.uniform_pair(a.choices)) is not None}
    assert {(c, c) for c in banded_classes() if c.total in (16, 24, 32)} <= alike  # 4.25 bits, as 4-g64-sym
    assert preset_pairs([per_token(4, 2, DIM)] * 2, CLASSES) == [parse_pair("4-g64-asym/2-g64-asym")] * 2
    assert preset_pairs([space.setting(uniform[0].choices)[0]], [RAW_CLASS]) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 4))
def test_the_partition_into_stages_is_the_best_one(layer_bytes: list[int], stages: int) -> None:
    if stages > len(layer_bytes):
        return
    ranges = balanced_partition(layer_bytes, stages)
    assert [a for a, _ in ranges] == [0, *[b for _, b in ranges][:-1]]
    assert ranges[-1][1] == len(layer_bytes)
    assert all(a < b for a, b in ranges)
    best = min(
        max(sum(layer_bytes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(layer_bytes))))
        for cuts in itertools.combinations(range(1, len(layer_bytes)), stages - 1)
    )
    assert pipeline_cost(layer_bytes, stages) == stages * best


def test_stages_make_a_lopsided_setting_dearer() -> None:
    space = make_space(4, stages=2)
    cheap, dear = 0, len(space.variables[0].pairs) - 1
    lopsided = (dear, cheap, cheap, cheap)
    assert space.cost(lopsided) > space.nbytes(lopsided)
    assert space.cost((cheap,) * 4) == space.nbytes((cheap,) * 4)


def test_specs_of_a_class_cost_the_same() -> None:
    for candidate in CLASSES:
        sizes = {
            candidate.spec(t, c).metadata_bytes(DIM) + candidate.spec(t, c).code_bytes(DIM)
            for t in ("plain", "centred", "rotated")
            for c in (1.0, 0.8)
        }
        assert len(sizes) == 1
    assert CLASSES[0].spec("rotated") == TensorSpec(8, 64, False, True, True)
