"""The settings that a search starts from: the optima of gradients and of the proxy, uniform settings, and published presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from kvtuner_kernels.layout import UNIFORM_BITS, LayerSpec
from kvtuner_kernels.places import BANDS
from kvtuner_search.calibration.candidates import Pair, StorageClass
from kvtuner_search.calibration.proxy import ProxyPoint, affordable_point, predicted_front
from kvtuner_search.calibration.space import Space
from kvtuner_search.calibration.trials import Anchor

UNIFORM_BANDS: Final = (4, 3, 2)  # bits a channel of uniform banded settings
NEARBY: Final = (0.97, 1.0)  # the proxy's optimum is tried at these fractions of each budget


def uniform_pairs(classes: Sequence[StorageClass]) -> list[Pair]:
    """The usual uniform settings: K8V8, K8V4, K4V4, K4V2 and K2V2, for each group size and sign that both sides can have; and in bands
    of 4, 3 and 2 bits a channel, which each layer distributes in its own way."""
    found = [
        (key, value)
        for bits in ((16, 16), *UNIFORM_BITS)
        for key in classes
        for value in classes
        if (key.bits, value.bits) == bits and (key.symmetric, key.group_size) == (value.symmetric, value.group_size)
    ]
    totals = [bits * BANDS for bits in UNIFORM_BANDS]
    return found + [(c, c) for c in classes if c.banded and c.total in totals]


def preset_pairs(layers: Sequence[LayerSpec], classes: Sequence[StorageClass]) -> list[Pair] | None:
    """A published preset in the search's own classes: the same bits, asymmetric, with the largest group; None if bits are missing."""
    by_bits: dict[int, StorageClass] = {}
    for candidate in sorted(classes, key=lambda c: c.group_size):
        if not candidate.symmetric:
            by_bits[candidate.bits] = candidate
    if not all(side.bits in by_bits for layer in layers for side in (layer.key, layer.value)):
        return None
    return [(by_bits[layer.key.bits], by_bits[layer.value.bits]) for layer in layers]


def anchors(
    space: Space,
    front: Sequence[ProxyPoint],
    uniform: Sequence[Pair],
    presets: Sequence[Sequence[Pair]],
    budgets: Sequence[int],
) -> list[Anchor]:
    """All first trials, each setting once: optima of what gradients predict, optima of the proxy's ``front`` at and just below the
    budgets, uniform settings, presets."""
    found: dict[tuple[int, ...], Anchor] = {}

    def add(origin: str, choices: tuple[int, ...], goal: int | None = None) -> None:
        known = found.setdefault(choices, Anchor(origin, choices, goal))
        if known.goal is None and goal is not None:  # the optimum a little below a budget may be the budget's own
            found[choices] = replace(known, goal=goal)

    predicted = predicted_front(space)
    for budget in budgets:
        point = affordable_point(space, predicted, budget)
        if point is not None:
            add("fisher", point.choices, budget)
    for budget in budgets:
        for fraction in NEARBY:
            point = affordable_point(space, front, budget * fraction)
            if point is not None:
                add("proxy", point.choices, budget if fraction == 1 else None)
    layers, banded = len(space.options), bool(space.options[0].banded)
    for origin, rows in (("uniform", [[pair] * layers for pair in uniform]), ("preset", presets)):
        for row in rows:
            choices = space.choices_of(row)
            # With bands there are more uniform settings, so only those that may be chosen are tried.
            if choices is not None and not (banded and space.cost(choices) > max(budgets)):
                add(origin, choices)
    return list(found.values())
