"""Bit allocation over the bands of a layer: the predicted loss of a pattern, and the best patterns of each storage class.

A banded class fixes the total bits of a side's eight bands, and so, with the other side's class, the words of a row. Distributing
these bits over the bands costs nothing, so each layer takes the pattern with the smallest loss predicted by its gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.places import BANDS, MAX_BAND_BITS, WORD_BITS, digit_bits, place_bands
from kvtuner_search.calibration.basis import LayerWorth
from kvtuner_search.calibration.candidates import GRAIN, Pair, StorageClass, banded_classes

# Mean squared error of a standard normal variable at 0 to 8 bits, with the uniform steps of kvtuner_kernels.bands.
DISTORTION: Final = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000304, 0.0000875)
# A code for x is off by -D x on average, plus noise. Noise of different tokens cancels, the share D of x does not: information in a dropped
# channel is missing from many tokens of a text at once. So that part counts double.
SQUARE: Final = tuple(d * d for d in DISTORTION)
COST: Final = tuple(d + d * d for d in DISTORTION)
# Totals whose layer-alone losses are measured; between them the ratio of measured to predicted loss is interpolated.
MEASURED: Final = (12, 20, 32)
TRIED: Final = 24  # best patterns for a side and total that are combined with the other side's


@dataclass(frozen=True)
class BandedPair:
    """How one layer stores a pair of banded classes, and the expected loss."""

    spec: LayerSpec
    key_loss: float  # nats a token: predicted by the gradients, times the ratio of measured to predicted losses
    value_loss: float
    predicted: float  # by the gradients alone, both sides
    # The same of keys and of values: the part in proportion to the distortion, and that to its square.
    expected: tuple[tuple[float, float], tuple[float, float]]


@functools.cache
def patterns(total: int) -> NDArray[np.int64]:
    """Every way to give the bands ``total`` bits, a band never more than the one before it: [n, BANDS]."""

    def rest(bands: int, left: int, most: int) -> list[tuple[int, ...]]:
        if bands == 0:
            return [()] if left == 0 else []
        least = -(-left // bands)
        return [(b, *tail) for b in range(min(most, left), least - 1, -1) for tail in rest(bands - 1, left - b, b)]

    return np.array(rest(BANDS, total, MAX_BAND_BITS), dtype=np.int64)


def predicted_loss(bands: Sequence[int], worth: Sequence[float]) -> float:
    """Expected loss of a pattern in nats a token."""
    return sum(COST[b] * w for b, w in zip(bands, worth, strict=True))


@functools.cache
def _costs(total: int) -> NDArray[np.float64]:
    return np.array(COST)[patterns(total)]


def best_patterns(total: int, worth: Sequence[float], count: int = 1) -> list[tuple[tuple[int, ...], float]]:
    """The patterns of ``total`` bits with the smallest predicted losses, and the losses; best first."""
    found = patterns(total)
    losses = _costs(total) @ np.array(worth)
    order = np.argsort(losses, kind="stable")[:count]
    return [(tuple(map(int, found[i])), float(losses[i])) for i in order]


def class_spec(candidate: StorageClass, worth: Sequence[float]) -> TensorSpec:
    """A side's best spec of a banded class, the other side not considered."""
    return TensorSpec(bits=0, bands=best_patterns(candidate.total, worth)[0][0])


def banded_pairs(
    worth: LayerWorth, key_ratio: Mapping[int, float], value_ratio: Mapping[int, float], head_dim: int
) -> dict[Pair, BandedPair]:
    """Every pair of banded classes that fills its words, with the best patterns that pack into them beside the scales.

    Args:
        worth: of the layer.
        key_ratio, value_ratio: measured over predicted loss by total bits; missing totals are interpolated.
    """
    sides = (worth.keys.bands, worth.values.bands)
    classes = banded_classes()
    digit = digit_bits(head_dim)
    best = [{c.total: _near(c.total, bands, digit) for c in classes} for bands in sides]
    found = {}
    for key, value in itertools.product(classes, repeat=2):
        words, over = divmod(key.total + value.total, WORD_BITS)
        if over:
            continue
        packed = _packed(best[0][key.total], best[1][value.total], words, digit)
        if packed is None:
            continue
        k, v = packed
        found[key, value] = BandedPair(
            LayerSpec(TensorSpec(bits=0, bands=k[0]), TensorSpec(bits=0, bands=v[0])),
            k[1] * interpolated(key_ratio, key.total),
            v[1] * interpolated(value_ratio, value.total),
            k[1] + v[1],
            (_parts(k[0], sides[0]), _parts(v[0], sides[1])),
        )
    return found


def _parts(bands: Sequence[int], worth: Sequence[float]) -> tuple[float, float]:
    """The two summands of :func:`predicted_loss`: in proportion to the distortion, and to its square."""
    linear, square = (sum(table[b] * w for b, w in zip(bands, worth, strict=True)) for table in (DISTORTION, SQUARE))
    return linear, square


Pattern = tuple[tuple[int, ...], float]


def _near(total: int, worth: Sequence[float], digit: int) -> list[Pattern]:
    """The best patterns of up to ``total`` bits; a pattern with a few bits less may pack better beside ``digit`` bits of scales."""
    least = max(1, total - max(GRAIN, digit) + 1)
    found = [
        pattern for t in range(total, least - 1, -1) for pattern in best_patterns(t, worth, TRIED // (total - t + 1))
    ]
    return sorted(found, key=lambda pattern: (pattern[1], pattern[0]))


def _packed(
    keys: Sequence[Pattern], values: Sequence[Pattern], words: int, digit: int
) -> tuple[Pattern, Pattern] | None:
    """The two patterns with the smallest summed loss that fit into the words; None if none do, as may happen with the smallest heads."""
    room = words * WORD_BITS - digit
    fit = [(k, v) for k, v in itertools.product(keys, values) if sum(k[0]) + sum(v[0]) <= room]
    order = sorted(fit, key=lambda pair: pair[0][1] + pair[1][1])
    return next((pair for pair in order if place_bands(digit, pair[0][0], pair[1][0])[1] <= words), None)


def interpolated(ratio: Mapping[int, float], total: int) -> float:
    """Measured over predicted loss at ``total`` bits: log-linear between measured totals, constant beyond; 1 if nothing was measured."""
    if not ratio:
        return 1.0
    known = sorted(ratio)
    return float(np.exp(np.interp(total, known, [np.log(ratio[at]) for at in known])))
