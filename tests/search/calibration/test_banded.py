"""Bits over bands against brute force, and what a layer may choose from."""

import itertools
import math

import numpy as np
import pytest
import torch

from kvtuner_kernels.bands import SCALE_MIDDLE, STEPS, BandCodes, dequantize_bands, quantize_bands
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.places import BANDS, place_bands
from kvtuner_search.calibration.banded import (
    COST,
    DISTORTION,
    MEASURED,
    banded_pairs,
    best_patterns,
    class_spec,
    interpolated,
    patterns,
    predicted_loss,
)
from kvtuner_search.calibration.basis import LayerWorth, SideWorth
from kvtuner_search.calibration.candidates import GRAIN, StorageClass, banded_classes


def make_worth(seed: int, heads: int = 2) -> LayerWorth:
    rng = np.random.default_rng(seed)

    def side() -> SideWorth:
        rows = -np.sort(-rng.lognormal(-4, 2, (heads, BANDS)), axis=1)
        return SideWorth(tuple(tuple(map(float, row)) for row in rows))

    return LayerWorth(side(), side())


def test_distortions_are_those_of_the_codes() -> None:
    y = torch.special.ndtri((torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20).view(-1, 1, 64)
    one = torch.full(y.shape[:2], SCALE_MIDDLE, dtype=torch.uint8)
    for bits in range(1, 9):
        half = 2 ** (bits - 1)
        codes = ((y / STEPS[bits]).floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)
        error = float((dequantize_bands(BandCodes(codes, one), (bits,) * BANDS) - y).square().mean())
        assert error == pytest.approx(DISTORTION[bits], rel=0.01)


def test_the_choice_of_a_scale_takes_nothing_from_what_is_predicted() -> None:
    y = torch.randn(2000, 1, 64, generator=torch.Generator().manual_seed(0))
    bands = (6, 5, 5, 4, 4, 3, 3, 2)
    error = (dequantize_bands(quantize_bands(y, bands), bands) - y).square().mean((0, 1)).view(BANDS, -1).mean(-1)
    assert all(found < 1.1 * DISTORTION[b] for found, b in zip(error.tolist(), bands, strict=True))
    assert DISTORTION[0] == 1
    assert all(a > b for a, b in itertools.pairwise(COST))


def test_patterns_are_all_of_them_and_the_best_is_the_best() -> None:
    worth = make_worth(0).keys.bands
    every: dict[int, set[tuple[int, ...]]] = {}
    for bands in itertools.product(range(9), repeat=4):  # pairs of equal bands are enough to count by hand
        doubled = tuple(b for b in bands for _ in (0, 1))
        if all(a >= b for a, b in itertools.pairwise(doubled)):
            every.setdefault(sum(doubled), set()).add(doubled)
    for total, expected in every.items():
        found = {tuple(map(int, row)) for row in patterns(total)} if total else {(0,) * BANDS}
        assert expected <= found
        assert all(sum(row) == total and list(row) == sorted(row, reverse=True) for row in found)
    assert sum(len(patterns(total)) for total in range(1, 65)) + 1 == math.comb(16, 8)
    for total in (4, 17, 28):
        ranked = sorted((predicted_loss(tuple(map(int, row)), worth), tuple(map(int, row))) for row in patterns(total))
        best = best_patterns(total, worth, 3)
        assert [loss for _, loss in best] == pytest.approx([loss for loss, _ in ranked[:3]])
        assert best[0][0] == ranked[0][1]


def test_a_band_worth_nothing_gets_nothing_and_even_worth_even_bits() -> None:
    assert best_patterns(12, [1.0] * 3 + [0.0] * 5)[0][0] == (4, 4, 4, 0, 0, 0, 0, 0)
    assert best_patterns(24, [1.0] * 8)[0][0] == (3,) * 8
    assert str(class_spec(StorageClass(0, total=24), [1.0] * 8)) == "b33333333"


def test_pairs_fill_the_words_that_they_pay_for() -> None:
    worth = make_worth(1)
    found = banded_pairs(worth, {}, {}, 64)
    assert len(found) == 16 * 4  # sixteen totals of each side, those of one rest to sixteen together
    for (key, value), pair in found.items():
        spec = pair.spec
        assert 0 <= key.total - sum(spec.key.bands) < GRAIN
        assert 0 <= value.total - sum(spec.value.bands) < GRAIN
        assert (key.total + value.total) % 16 == 0
        words = place_bands(2, spec.key.bands, spec.value.bands)[1]
        assert words * 16 == key.total + value.total
        assert spec.bytes_per_token(2, 64) == 2 * words * 8 * 2
        least = min(  # two bits hold digits of the scales
            best_patterns(key.total - less, worth.keys.bands)[0][1]
            + best_patterns(value.total - 2 + less, worth.values.bands)[0][1]
            for less in (0, 1, 2)
        )
        assert (
            least <= pair.predicted <= (1.05 if words < 4 else 1.5) * least
        )  # where bands are wide, little packs well
        assert pair.key_loss + pair.value_loss == pytest.approx(pair.predicted)
        assert pair.key_loss == pytest.approx(predicted_loss(spec.key.bands, worth.keys.bands))


def test_what_packs_is_the_best_that_packs() -> None:
    worth = make_worth(2)
    key, value = StorageClass(0, total=8), StorageClass(0, total=8)
    expected = min(
        predicted_loss(tuple(map(int, k)), worth.keys.bands) + predicted_loss(tuple(map(int, v)), worth.values.bands)
        for total in (6, 7, 8)
        for k in patterns(total)
        for v in patterns(14 - total)
        if place_bands(2, tuple(map(int, k)), tuple(map(int, v)))[1] == 1
    )
    assert banded_pairs(worth, {}, {}, 64)[key, value].predicted == pytest.approx(expected)


def test_measured_losses_scale_predictions() -> None:
    ratio = {12: 4.0, 20: 1.0}
    assert interpolated(ratio, 12) == 4
    assert interpolated(ratio, 16) == pytest.approx(2)
    assert interpolated(ratio, 4) == 4
    assert interpolated(ratio, 64) == 1
    assert interpolated({}, 20) == 1
    assert all(total in [c.total for c in banded_classes()] for total in MEASURED)
    worth = make_worth(3)
    plain, scaled = banded_pairs(worth, {}, {}, 64), banded_pairs(worth, ratio, {20: 0.5}, 64)
    for pair, found in scaled.items():
        assert found.spec == plain[pair].spec
        assert found.predicted == plain[pair].predicted
        assert found.key_loss == pytest.approx(plain[pair].key_loss * interpolated(ratio, pair[0].total))
        assert found.value_loss == pytest.approx(plain[pair].value_loss * 0.5)


def test_more_bits_lose_less_and_every_head_size_takes_them() -> None:
    found = banded_pairs(make_worth(4), {}, {}, 64)
    by_words: dict[int, float] = {}
    for (key, value), pair in found.items():
        words = (key.total + value.total) // 16
        by_words[words] = min(by_words.get(words, math.inf), pair.predicted)
    losses = [by_words[words] for words in sorted(by_words)]
    assert sorted(by_words) == list(range(1, 9))
    assert losses == sorted(losses, reverse=True)
    for head_dim in (64, 80, 96, 128, 192, 256):
        for pair in found.values():
            assert isinstance(pair.spec, LayerSpec)
            assert pair.spec.effective_bits(2, head_dim) <= 8.5
