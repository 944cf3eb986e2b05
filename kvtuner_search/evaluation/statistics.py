"""Paired confidence intervals: the same samples under two caches, resampled together."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from kvtuner_search.evaluation.scorer import Scores
from kvtuner_search.profile.fields import Measure

LEAST_KL: Final = 1e-6  # nats of a sample: less is rounding
RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95


class Interval(NamedTuple):
    """A difference and its confidence interval."""

    estimate: float
    low: float
    high: float


def paired_ratio(difference: NDArray[np.float64], weight: NDArray[np.float64], seed: int = 0) -> Interval:
    """Interval of ``sum(difference) / sum(weight)`` by the percentile bootstrap over samples.

    Args:
        difference: [n] sums over each sample's tokens under one cache, minus the same under the other.
        weight: [n] tokens of each sample.
        seed: seed of the resampling; the same input gives the same interval.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    estimate = float(difference.sum() / weight.sum())
    count = len(difference)
    picks = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    means = difference[picks].sum(1) / weight[picks].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(estimate, float(low), float(high))


def paired_loss(ours: Scores, theirs: Scores, seed: int = 0) -> Interval:
    """Interval of ``ours.loss - theirs.loss``; samples are resampled within each source. Negative means that ours is better."""
    rng = np.random.default_rng(seed)
    estimate, means = 0.0, np.zeros(RESAMPLES)
    for name, share in ours.weights.items():
        a, b = ours.of(name), theirs.of(name)
        difference, weight = a.kl - b.kl, a.tokens.astype(np.float64)
        picks = rng.integers(0, len(weight), size=(RESAMPLES, len(weight)))
        estimate += share * float(difference.sum() / weight.sum())
        means += share * difference[picks].sum(1) / weight[picks].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(estimate, float(low), float(high))


def paired_log_ratio(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    weight: NDArray[np.float64] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of the logarithm of ``ours`` over ``theirs``, the mean over samples; positive means that ours is worse.

    It holds for the few samples of a first rung, which a bootstrap cannot resample: Student's t of the samples' log ratios, of all sources
    together. One sample alone says nothing.

    Args:
        ours, theirs: fp64 [n] KL sums of two settings on the same samples.
        weight: fp64 [n] of the samples in the mean, with the sum 1; all alike if not given.
        confidence: of the interval.

    Example:
        >>> paired_log_ratio(np.array([1.1, 2.2, 3.3]), np.array([1.0, 2.0, 3.0])).low > 0.09
        True
    """
    ratio, count = np.log((ours + LEAST_KL) / (theirs + LEAST_KL)), len(ours)
    weight = np.full(count, 1 / count) if weight is None else weight
    estimate = float(weight @ ratio)
    if count < 2:
        return Interval(estimate, -math.inf, math.inf)
    half = float(student.ppf((1 + confidence) / 2, count - 1)) * float(ratio.std(ddof=1) * np.sqrt(weight @ weight))
    return Interval(estimate, estimate - half, estimate + half)


def paired_change(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Interval:
    """Interval of ``ours.sum() / theirs.sum() - 1``; negative means that ours is less.

    Student's t, of what is left of each sample's difference once the ratio is taken out: quick, and good enough to watch a search by. One sample
    alone says nothing.

    Args:
        ours, theirs: fp64 [n] what each sample contributes to two losses; the sum of ``theirs`` is not 0.

    Example:
        >>> round(paired_change(np.array([1.1, 2.2, 3.2]), np.array([1.0, 2.0, 3.0])).estimate, 3)
        0.083

    Source: W. Cochran, Sampling Techniques, 1977, section 6.3 (the ratio estimator).
    """
    count, total = len(ours), float(theirs.sum())
    estimate = float(ours.sum()) / total - 1
    if count < 2:
        return Interval(estimate, -math.inf, math.inf)
    left = ours - (1 + estimate) * theirs
    half = (
        float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
        * math.sqrt(count / (count - 1) * float(left @ left))
        / total
    )
    return Interval(estimate, estimate - half, estimate + half)


def paired_proportions(lost: int, gained: int, count: int) -> Interval:
    """Interval of the difference of two proportions of the same ``count`` prompts.

    Half a prompt is added to each of the four cells, so that it has a width even if no prompt flipped, unlike the bootstrap's.
    Source: A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24, 2005.
    """
    size, difference = count + 2, gained - lost
    centre = difference / size
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(lost + gained + 1 - difference**2 / size) / size
    return Interval(difference / count, max(-1.0, centre - half), min(1.0, centre + half))


def measures(scores: Scores, baseline: Scores, split: Literal["search", "selection", "test"]) -> list[Measure]:
    """KL and NLL of every source, and accuracy of every task source, against the 16-bit cache on the same samples."""
    found = []
    for name in scores.names:
        ours, base = scores.of(name), baseline.of(name)
        tokens, ones = ours.tokens.astype(np.float64), np.ones(len(ours.tokens))
        rows: list[
            tuple[Literal["kl", "nll", "accuracy"], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
        ]
        rows = [("kl", ours.kl, np.zeros_like(ours.kl), tokens), ("nll", ours.nll, base.nll, tokens)]
        if ours.is_task.all():
            rows.append(("accuracy", ours.exact.astype(np.float64), base.exact.astype(np.float64), ones))
        for metric, value, reference, weight in rows:
            interval = paired_ratio(value - reference, weight)
            found.append(
                Measure(
                    metric=metric,
                    data=name,
                    split=split,
                    samples=len(ours.tokens),
                    tokens=int(ours.tokens.sum()),
                    baseline=float(reference.sum() / weight.sum()),
                    value=float(value.sum() / weight.sum()),
                    ci_low=interval.low,
                    ci_high=interval.high,
                    confidence=CONFIDENCE,
                )
            )
    return found
