"""What Optuna searches: a few logarithms of weights in the proxy, or one pair of storage classes a layer.

The proxy adds up losses that are predicted for each layer alone. What is uncertain is how much each of them counts, so its weights are
what is searched, along a few directions, and the exact allocation at the budget makes a setting of them. Each proposal is feasible and spends the budget,
and close proposals give close settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from kvtuner_search.calibration.candidates import pair_name
from kvtuner_search.calibration.proxy import optimum
from kvtuner_search.calibration.space import Choices, Space

Kind = Literal["directions", "layers", "pairs"]
Parameters = Mapping[str, Any]  # values of a trial's variables, by name; floats of weights, texts of pairs

MEASURED: Final = "measured"  # 0: losses as gradients predict them; 1: as measured for each layer alone
COARSE: Final = "coarse"  # logarithm of the weight of a distortion's square, which is large where bits are few
MEASURED_RANGE: Final = (-0.5, 1.5)
COARSE_RANGE: Final = (-1.5, 1.5)
LAYER_RANGE: Final = 1.0  # logarithm of the weight of one side of one layer, either way
LEAST: Final = 1e-12  # nats


class Variables(Protocol):
    """The variables of a search."""

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """By the names that Optuna's dashboard shows."""

    def decode(self, parameters: Parameters, budget: float) -> Choices | None:
        """The choices that the values stand for; None if nothing fits the budget."""

    def encode(self, choices: Choices, origin: str) -> Parameters | None:
        """The values that stand for choices which no sampler proposed, at a budget if at all; None if there are none."""


def variables_of(space: Space, kind: Kind) -> Variables:
    """The variables of that kind."""
    if kind == "pairs":
        return PairVariables(space)
    return WeightVariables(space, directions(space) if kind == "directions" else single_layers(space))


@dataclass(frozen=True)
class Direction:
    """One way in which the logarithms of all weights change together."""

    name: str
    reach: float  # the variable runs from minus this to this
    shape: NDArray[np.float64]  # [variables, 2] by how much those of keys and values change for one unit


def directions(space: Space) -> list[Direction]:
    """The few ways in which weights are likely to be wrong, so that some dozens of trials can find out.

    Keys against values; each side's course over depth, straight and bent; the first and the last layer, which are often unlike the others; and
    how far all layers' losses differ.
    """
    depth = np.array([np.mean(v.layers) for v in space.variables])
    along = 2 * depth / max(1, len(space.options) - 1) - 1
    bent = along**2 - np.mean(along**2)
    along = along - np.mean(along)
    first = np.array([float(0 in v.layers) for v in space.variables])
    last = np.array([float(len(space.options) - 1 in v.layers) for v in space.variables])
    zero = np.zeros_like(depth)
    one = np.ones_like(depth)

    def shape(keys: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack((keys, values), 1)

    return [
        Direction("keys over values", 1.0, shape(one / 2, -one / 2)),
        Direction("keys by depth", 0.75, shape(along, zero)),
        Direction("values by depth", 0.75, shape(zero, along)),
        Direction("keys at both ends", 0.75, shape(bent, zero)),
        Direction("values at both ends", 0.75, shape(zero, bent)),
        Direction("first layer", 1.0, shape(first, first)),
        Direction("last layer", 1.0, shape(last, last)),
        Direction("contrast", 0.4, _contrast(space)),
    ]


def _contrast(space: Space) -> NDArray[np.float64]:
    """[variables, 2]: logarithm of each side's usual loss, about the mean; a unit more squares how layers differ."""
    usual = np.array([usual_losses(_sides(v.features, v.expected)) for v in space.variables])
    found: NDArray[np.float64] = usual - usual.mean()
    return found


def usual_losses(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2]: mean logarithm of each side's losses [pairs, 2]; a side in 16 bits loses nothing, and does not count."""
    lossy = losses > 0
    logs = np.where(lossy, np.log(np.where(lossy, losses, 1.0)), 0.0)
    found: NDArray[np.float64] = np.where(lossy.any(0), logs.sum(0) / np.maximum(lossy.sum(0), 1), np.log(LEAST))
    return found


def _sides(features: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """[pairs, 2] losses of the pairs that gradients have a prediction for, or else of all."""
    found: NDArray[np.float64] = features[np.isfinite(expected).all((1, 2)) & (features > 0).all(1)]
    return found if len(found) else features


def single_layers(space: Space) -> list[Direction]:
    """Each side of each variable by itself."""
    found = []
    for index, variable in enumerate(space.variables):
        for side, name in enumerate(("keys", "values")):
            shape = np.zeros((len(space.variables), 2))
            shape[index, side] = 1
            found.append(Direction(f"{variable.name}: {name}", LAYER_RANGE, shape))
    return found


class WeightVariables:
    """Logarithms of weights, which the exact allocation turns into a setting.

    Example::

        variables = WeightVariables(space, directions(space))
        choices = variables.decode({**dict.fromkeys(variables.distributions, 0.0), "keys over values": 0.3}, budget)
    """

    def __init__(self, space: Space, along: Sequence[Direction]) -> None:
        self.space, self.along = space, tuple(along)
        self._banded = bool(space.options[0].banded)
        self.distributions: dict[str, BaseDistribution] = {
            d.name: FloatDistribution(-d.reach, d.reach) for d in self.along
        }
        if self._banded:
            self.distributions[MEASURED] = FloatDistribution(*MEASURED_RANGE)
            self.distributions[COARSE] = FloatDistribution(*COARSE_RANGE)
        self._tables = [self._table(v.features, v.expected) for v in space.variables]

    def losses(self, parameters: Parameters) -> list[NDArray[np.float64]]:
        """Expected loss of every pair of every variable with these weights: [pairs] each."""
        weights = np.exp(sum(parameters[d.name] * d.shape for d in self.along))
        measured, coarse = parameters.get(MEASURED, 0.0), math.exp(parameters.get(COARSE, 0.0))
        return [
            ((linear + coarse * square) * np.exp(measured * ratio)) @ weight
            for (linear, square, ratio), weight in zip(self._tables, weights, strict=True)
        ]

    def decode(self, parameters: Parameters, budget: float) -> Choices | None:
        """The setting of least expected loss within the budget."""
        return optimum(self.space, self.losses(parameters), budget)

    def encode(self, choices: Choices, origin: str) -> Parameters | None:
        """Weights that are all one for what gradients alone predict to be best (``fisher``), and for the optimum of the losses that were measured for each
        layer alone (``proxy``); other settings do not tell the weights they would be best for."""
        if origin == "fisher" or (origin == "proxy" and not self._banded):
            return dict.fromkeys(self.distributions, 0.0)
        return {**dict.fromkeys(self.distributions, 0.0), MEASURED: 1.0} if origin == "proxy" else None

    def _table(
        self, features: NDArray[np.float64], expected: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """[pairs, 2] each: the part in proportion to the distortion, that to its square, and the logarithm of measured over predicted loss."""
        if not self._banded:
            return features, np.zeros_like(features), np.zeros_like(features)
        linear, square = expected[..., 0], expected[..., 1]
        known = np.isfinite(linear) & (linear > 0)
        ratio = np.log(np.maximum(features, LEAST) / np.where(known, np.maximum(linear + square, LEAST), 1.0))
        return linear, square, np.where(known, ratio, 0.0)


class PairVariables:
    """The pair of storage classes of each variable of the space, as a category."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._names = [[pair_name(pair) for pair in v.pairs] for v in space.variables]
        self.distributions: dict[str, BaseDistribution] = {
            v.name: CategoricalDistribution(names) for v, names in zip(space.variables, self._names, strict=True)
        }

    def decode(self, parameters: Parameters, budget: float) -> Choices | None:
        """The choices that the names say, whatever they cost."""
        return tuple(
            names.index(parameters[v.name]) for v, names in zip(self.space.variables, self._names, strict=True)
        )

    def encode(self, choices: Choices, origin: str) -> Parameters | None:
        """The names of the choices."""
        return {v.name: names[c] for v, names, c in zip(self.space.variables, self._names, choices, strict=True)}
