"""Confidence intervals of ratios between two runs: the bootstrap over blocks of requests. numpy is imported here, and scipy where an interval is made.

Requests that are in flight together share the server's steps, so they are not independent samples: the bootstrap resamples blocks of as
many consecutive requests as were in flight. An interval covers the scatter of requests in these two runs, not the
variation from one server start to the next, which only repeated runs show.

Source: E. Carlstein, The use of subseries values for estimating the variance of a general statistic from a stationary sequence, 1986;
B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13. With few blocks the plain percentile interval is too narrow; it is
expanded as in T. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69(4), 2015, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.bench.record import Summary

RESAMPLES: Final = 4000
CONFIDENCE: Final = 0.95
MIN_BLOCKS: Final = 6  # fewer do not show their scatter
_MAX_DRAWN: Final = 2**24  # values held at once
Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # [resamples, values] -> [resamples]


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


def mean(values: Floats) -> Floats:
    """Along the last axis."""
    found: Floats = values.mean(axis=-1)
    return found


def percentile(share: float) -> Statistic:
    """The statistic that takes this quantile along the last axis, by linear interpolation."""

    def take(values: Floats) -> Floats:
        return np.asarray(np.quantile(values, share, axis=-1))

    return take


def ratio(new: Floats, old: Floats, block: tuple[int, int], statistic: Statistic, seed: int = 0) -> Interval | None:
    """Interval of ``statistic(new) / statistic(old)`` by the expanded percentile bootstrap over blocks; the runs are resampled separately.

    Args:
        new, old: [n] values above zero, one a request, in the order in which requests were sent.
        block: requests in flight in each run.
        statistic: of many samples at once.
        seed: of the resampling; the same input gives the same interval.

    Returns:
        None if either run has fewer than MIN_BLOCKS blocks.
    """
    rng = np.random.default_rng(seed)
    drawn = [_drawn(values, size, statistic, rng) for values, size in zip((new, old), block, strict=True)]
    top, bottom = drawn
    if top is None or bottom is None:
        return None
    tail = _tail(min(len(values) // size for values, size in zip((new, old), block, strict=True)))
    low, high = np.quantile(top / bottom, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _tail(blocks: int) -> float:
    """The share of draws to leave out at each end, so that the interval of a mean is as wide as Student's t makes it."""
    from scipy.special import stdtrit  # a quarter of a second, for comparisons alone

    degrees = blocks - 1
    t = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
    return NormalDist().cdf(-t * math.sqrt(blocks / degrees))


def _drawn(values: Floats, size: int, statistic: Statistic, rng: np.random.Generator) -> Floats | None:
    """The statistic of RESAMPLES draws of whole blocks; requests beyond the last whole block are left out."""
    count = len(values) // size
    if count < MIN_BLOCKS:
        return None
    blocks = values[: count * size].reshape(count, size)
    step = max(1, _MAX_DRAWN // blocks.size)
    parts = []
    for start in range(0, RESAMPLES, step):
        picks = rng.integers(0, count, size=(min(step, RESAMPLES - start), count))
        parts.append(statistic(blocks[picks].reshape(len(picks), -1)))
    return np.concatenate(parts)


def values_from_summary(summary: Summary, block: int) -> Floats:
    """[samples // block] values that have the summary's percentiles: evenly spaced on the piecewise linear curve through them.

    One value represents a whole block, because a summary does not say which requests ran together: requests that ran together then
    count as one, which is cautious.
    """
    count = summary.samples // block
    at = (np.arange(count) + 0.5) / max(count, 1)
    found = np.interp(
        at, [0, 0.5, 0.9, 0.99, 1], [summary.minimum, summary.p50, summary.p90, summary.p99, summary.maximum]
    )
    return np.asarray(found, dtype=np.float64)
