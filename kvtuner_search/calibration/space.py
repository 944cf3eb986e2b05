"""The search space after pruning and grouping: a few variables, each with a list of storage-class pairs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.calibration.banded import BandedPair
from kvtuner_search.calibration.candidates import RAW_CLASS, Pair, StorageClass
from kvtuner_search.profile.stages import pipeline_cost

MIN_SILHOUETTE: Final = 0.7  # below this, layers of a group differ too much to share a variable
# Of the banded pairs of the same bytes a layer keeps those that are best where keys count this many times as much as values.
TILTS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
Choices = tuple[int, ...]  # index into each variable's pairs


@dataclass(frozen=True)
class LayerOptions:
    """The storage options of one layer."""

    keys: Mapping[StorageClass, TensorSpec]  # best variant of each class
    values: Mapping[StorageClass, TensorSpec]
    key_loss: Mapping[StorageClass, float]  # layer-alone loss of each class, the other side at 16 bits
    value_loss: Mapping[StorageClass, float]
    pair_error: Mapping[Pair, float]  # e_o of each pair without bands
    banded: Mapping[Pair, BandedPair] = field(default_factory=dict)  # pairs of which both sides are banded

    @property
    def pairs(self) -> list[Pair]:
        """All pairs that may be chosen."""
        return [*self.pair_error, *self.banded]

    def spec(self, pair: Pair) -> LayerSpec:
        """The pair's spec in this layer."""
        if pair in self.banded:
            return self.banded[pair].spec
        return LayerSpec(self.keys[pair[0]], self.values[pair[1]])

    def losses(self, pair: Pair) -> tuple[float, float]:
        """Layer-alone losses of the pair's keys and of its values."""
        if pair in self.banded:
            return self.banded[pair].key_loss, self.banded[pair].value_loss
        return self.key_loss[pair[0]], self.value_loss[pair[1]]

    def loss(self, pair: Pair) -> float:
        """Additive estimate of the pair's layer-alone loss."""
        return sum(self.losses(pair))

    def expected(self, pair: Pair) -> tuple[tuple[float, float], tuple[float, float]]:
        """What gradients alone predict for the pair's keys and for its values: the part in proportion to the distortion, and that to
        its square. Infinite if they give no prediction."""
        if pair in self.banded:
            return self.banded[pair].expected
        return ((0.0, 0.0),) * 2 if pair == (RAW_CLASS, RAW_CLASS) else ((float("inf"), 0.0),) * 2

    def predicted(self, pair: Pair) -> float:
        """The pair's loss predicted by gradients alone; infinite if they give no prediction."""
        if pair in self.banded:
            return self.banded[pair].predicted
        return 0.0 if pair == (RAW_CLASS, RAW_CLASS) else float("inf")


@dataclass(frozen=True)
class Variable:
    """Layers that share one choice."""

    name: str
    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]  # cheapest first
    nbytes: NDArray[np.int64]  # [pairs] bytes per token of all its layers
    features: NDArray[np.float64]  # [pairs, 2] summed layer-alone loss of keys and of values
    predicted: NDArray[np.float64]  # [pairs] summed losses as gradients alone predict them (LayerOptions.predicted)
    expected: NDArray[np.float64]  # [pairs, 2, 2] LayerOptions.expected, summed: of keys and values, in two parts each


@dataclass(frozen=True)
class Space:
    """All variables, and how a choice becomes a setting."""

    options: tuple[LayerOptions, ...]
    variables: tuple[Variable, ...]
    kv_heads: int
    head_dim: int
    grouping_quality: float | None  # silhouette of the groups in use; None if each layer is its own variable
    rejected_quality: float | None = None  # silhouette of the best grouping that was not good enough
    stages: int = 1  # pipeline stages

    def setting(self, choices: Sequence[int]) -> tuple[LayerSpec, ...]:
        """One LayerSpec a layer."""
        specs: dict[int, LayerSpec] = {}
        for variable, choice in zip(self.variables, choices, strict=True):
            for layer in variable.layers:
                specs[layer] = self.options[layer].spec(variable.pairs[choice])
        return tuple(specs[layer] for layer in range(len(self.options)))

    def features(self, choices: Sequence[int]) -> NDArray[np.float64]:
        """[2 * variables]: summed layer-alone losses of keys and values of each variable."""
        return np.concatenate([v.features[c] for v, c in zip(self.variables, choices, strict=True)])

    def nbytes(self, choices: Sequence[int]) -> int:
        """Bytes per token of all layers."""
        return int(sum(v.nbytes[c] for v, c in zip(self.variables, choices, strict=True)))

    def cost(self, choices: Sequence[int]) -> int:
        """Bytes per token that limit capacity: the sum over layers, or with pipeline stages the heaviest stage's sum times the number of stages."""
        if self.stages == 1:
            return self.nbytes(choices)
        return pipeline_cost(
            [spec.bytes_per_token(self.kv_heads, self.head_dim) for spec in self.setting(choices)], self.stages
        )

    def uniform_pair(self, choices: Sequence[int]) -> Pair | None:
        """The pair that all layers have, or None if they differ."""
        pairs = {v.pairs[c] for v, c in zip(self.variables, choices, strict=True)}
        return pairs.pop() if len(pairs) == 1 else None

    def choices_of(self, pairs: Sequence[Pair]) -> Choices | None:
        """The choices that give each layer its pair, or None if a variable cannot."""
        found = []
        for variable in self.variables:
            wanted = {pairs[layer] for layer in variable.layers}
            if len(wanted) != 1 or (pair := wanted.pop()) not in variable.pairs:
                return None
            found.append(variable.pairs.index(pair))
        return tuple(found)


def prune(options: LayerOptions, kv_heads: int, head_dim: int, keep: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs that may be optimal, and those in ``keep``; cheapest first.

    Pairs without bands are on the layer's front of (bytes, e_o), and no banded pair of no more bytes is expected to lose less. Banded pairs are on the
    front of (bytes, loss): for the same bytes those that are best if keys count TILTS times as much as values, by the measured losses and by what
    gradients alone predict.
    """

    @functools.cache
    def cost(pair: Pair) -> int:
        return options.spec(pair).bytes_per_token(kv_heads, head_dim)

    by_cost: dict[int, list[Pair]] = {}
    for pair in options.banded:
        by_cost.setdefault(cost(pair), []).append(pair)
    front: set[Pair] = set()
    best: list[tuple[int, float]] = []  # of banded pairs: bytes, and the least loss at no more
    for nbytes, pairs in sorted(by_cost.items()):
        pairs.sort(key=lambda pair: (options.loss(pair), pair))
        if not best or options.loss(pairs[0]) < best[-1][1]:
            best.append((nbytes, options.loss(pairs[0])))
            front.update(_tilted(options, pairs))
    least = float("inf")
    for pair in sorted(options.pair_error, key=lambda p: (cost(p), options.pair_error[p], p)):
        if options.pair_error[pair] < least:
            least = options.pair_error[pair]
            if not any(nbytes <= cost(pair) and loss < options.loss(pair) for nbytes, loss in best):
                front.add(pair)
    return tuple(sorted(front | set(keep), key=lambda p: (cost(p), p)))


def _tilted(options: LayerOptions, pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The best of the pairs for each of TILTS, by measured losses and by predicted ones."""
    measured = {pair: options.losses(pair) for pair in pairs}
    predicted = {pair: (sum(keys), sum(values)) for pair in pairs for keys, values in [options.expected(pair)]}
    for losses, tilt in itertools.product((measured, predicted), TILTS):
        yield min(pairs, key=lambda pair: (tilt * losses[pair][0] + losses[pair][1], pair))


def group_layers(options: Sequence[LayerOptions], pairs: Sequence[Pair]) -> tuple[list[list[int]], float]:
    """Cluster layers by the logarithm of their layer-alone losses on ``pairs``; the number of groups has the best mean silhouette.

    Returns:
        groups of layer indices, and their mean silhouette in [-1, 1]; one group a layer and -1 if there are too few layers.

    Source: P. Rousseeuw, Silhouettes, J. Comput. Appl. Math. 20, 1987.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    table = np.log10(np.array([[max(layer.loss(pair), 1e-9) for pair in pairs] for layer in options]))
    best: tuple[float, list[int]] = (-1.0, list(range(len(options))))
    if len(options) > 3:
        for count in range(2, max(3, len(options) * 3 // 4)):
            labels = AgglomerativeClustering(count, linkage="average").fit_predict(table)
            quality = float(silhouette_score(table, labels))
            if quality > best[0]:
                best = (quality, [int(label) for label in labels])
    groups: dict[int, list[int]] = {}
    for layer, label in enumerate(best[1]):
        groups.setdefault(label, []).append(layer)
    return sorted(groups.values()), best[0]


def build_space(
    options: Sequence[LayerOptions], kv_heads: int, head_dim: int, keep: Sequence[Pair], grouping: str, stages: int = 1
) -> Space:
    """Prune, group and tabulate.

    Args:
        options: storage options of each layer.
        kv_heads, head_dim: shape of the cache.
        keep: pairs that every layer keeps, so that uniform settings and presets can be expressed.
        grouping: ``auto`` (group if the silhouette is at least MIN_SILHOUETTE), ``on`` or ``off``.
        stages: pipeline stages.
    """
    pruned = [prune(layer, kv_heads, head_dim, keep) for layer in options]
    common = [pair for pair in pruned[0] if all(pair in other for other in pruned)]
    groups, quality = ([[i] for i in range(len(options))], None) if grouping == "off" else group_layers(options, common)
    rejected = None
    if grouping == "auto" and (quality is None or quality < MIN_SILHOUETTE):
        groups, rejected, quality = [[i] for i in range(len(options))], quality, None
    variables = []
    for members in groups:
        union = {pair for layer in members for pair in pruned[layer]}
        cost = {pair: sum(options[i].spec(pair).bytes_per_token(kv_heads, head_dim) for i in members) for pair in union}
        pairs = tuple(sorted(union, key=lambda pair: (cost[pair], pair)))
        features = [np.sum([options[i].losses(pair) for i in members], axis=0) for pair in pairs]
        predicted = [sum(options[i].predicted(pair) for i in members) for pair in pairs]
        expected = [np.sum([options[i].expected(pair) for i in members], axis=0) for pair in pairs]
        variables.append(
            Variable(
                "layer " + ",".join(map(str, members)),
                tuple(members),
                pairs,
                np.array([cost[pair] for pair in pairs]),
                np.array(features),
                np.array(predicted),
                np.array(expected),
            )
        )
    return Space(tuple(options), tuple(variables), kv_heads, head_dim, quality, rejected, stages)
