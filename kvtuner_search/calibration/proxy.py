"""The additive proxy of the loss: its exact optimum at every budget, and its correction from finished trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.calibration.space import Choices, Space

SPREAD: Final = 0.5  # prior standard deviation of a weight, relative to the common factor
NOISE: Final = 0.15  # standard deviation of a trial's loss about the corrected proxy, relative
WEIGHT_RANGE: Final = (0.2, 5.0)  # of a weight, relative to the common factor


@dataclass(frozen=True)
class ProxyPoint:
    """One optimum of the proxy."""

    nbytes: int
    loss: float
    choices: Choices


def proxy_front(space: Space, weights: NDArray[np.float64] | None = None) -> list[ProxyPoint]:
    """Every Pareto optimum of ``sum(weights * features)`` against bytes, exactly, by dynamic programming over bytes; cheapest first.

    ``weights`` is [2 * variables], all one if not given.
    """
    count = len(space.variables)
    pairs = np.ones((count, 2)) if weights is None else weights.reshape(count, 2)
    return _front(space, [v.features @ weight for v, weight in zip(space.variables, pairs, strict=True)])


def predicted_front(space: Space) -> list[ProxyPoint]:
    """The same for the predictions of gradients alone; empty without banded pairs."""
    return _front(space, [v.predicted for v in space.variables]) if space.options[0].banded else []


def _front(space: Space, losses: Sequence[NDArray[np.float64]]) -> list[ProxyPoint]:
    """Pareto optima of the summed losses, each [pairs of the variable]; pairs of infinite loss are never taken."""
    unit = math.gcd(*(int(n) for v in space.variables for n in v.nbytes))
    least = np.zeros(1)
    picks: list[NDArray[np.int16]] = []
    for variable, loss in zip(space.variables, losses, strict=True):
        cost = variable.nbytes // unit
        size = len(least) + int(cost.max())
        table = np.full(size, np.inf)
        pick = np.zeros(size, dtype=np.int16)
        for index in range(len(cost)):
            part = slice(int(cost[index]), int(cost[index]) + len(least))
            better = least + loss[index] < table[part]
            table[part][better] = (least + loss[index])[better]
            pick[part][better] = index
        least = table
        picks.append(pick)
    front: list[ProxyPoint] = []
    for total in np.flatnonzero(np.isfinite(least)):
        if not front or least[total] < front[-1].loss:
            at, choices = int(total), []
            for variable, pick in zip(reversed(space.variables), reversed(picks), strict=True):
                choices.append(int(pick[at]))
                at -= int(variable.nbytes[choices[-1]]) // unit
            front.append(ProxyPoint(int(total) * unit, float(least[total]), tuple(reversed(choices))))
    return front


def optimum(space: Space, losses: Sequence[NDArray[np.float64]], budget: float) -> Choices | None:
    """The choices of least summed loss within the budget, exactly; None if nothing fits. ``losses`` are [pairs] of each variable."""
    point = affordable_point(space, _front(space, losses), budget)
    return None if point is None else point.choices


def affordable_point(space: Space, front: Sequence[ProxyPoint], budget: float) -> ProxyPoint | None:
    """The dearest proxy optimum within the budget."""
    return next((p for p in reversed(front) if p.nbytes <= budget and space.cost(p.choices) <= budget), None)


@dataclass(frozen=True)
class Correction:
    """Posterior of the proxy's weights given finished trials: normal, in units of the common factor."""

    common: float  # measured over predicted loss, median over trials
    mean: NDArray[np.float64]  # [2 * variables], about 1
    factor: NDArray[np.float64]  # [2 * variables, 2 * variables]: times standard normals, the deviation of a draw

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Weights drawn from the posterior (Thompson sampling)."""
        weights: NDArray[np.float64] = self.common * np.clip(
            self.mean + self.factor @ rng.standard_normal(len(self.mean)), *WEIGHT_RANGE
        )
        return weights


def correct(space: Space, trials: Sequence[tuple[Choices, float]]) -> Correction:
    """Bayesian linear regression of the trials' relative errors on the proxy's features.

    Layers that hurt more together than alone get a mean weight above the common factor, and draws vary most where the trials give the least information.

    Source: O. Chapelle and L. Li, An Empirical Evaluation of Thompson Sampling, NeurIPS 2011.
    """
    size = 2 * len(space.variables)
    features = np.array([space.features(choices) for choices, _ in trials]).reshape(len(trials), size)
    losses = np.array([loss for _, loss in trials])
    keep = (losses > 0) & (features.sum(1) > 0)
    features, losses = features[keep], losses[keep]
    common = float(np.median(losses / features.sum(1))) if len(losses) else 1.0
    scaled = features * common / losses[:, None]
    precision = scaled.T @ scaled / NOISE**2 + np.eye(size) / SPREAD**2
    mean = 1 + np.linalg.solve(precision, scaled.T @ (1 - scaled.sum(1)) / NOISE**2)
    return Correction(common, mean, np.linalg.cholesky(np.linalg.inv(precision)))
