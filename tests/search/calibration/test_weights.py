"""Weights and how they become settings: each proposal fits and spends its budget, and what is close stays close."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from test_space import make_space

from kvtuner_search.calibration.proxy import affordable_point, predicted_front, proxy_front
from kvtuner_search.calibration.samplers import SAMPLERS
from kvtuner_search.calibration.variables import (
    COARSE,
    MEASURED,
    PairVariables,
    WeightVariables,
    directions,
    single_layers,
    usual_losses,
    variables_of,
)

SPACE = make_space(6, banded=True)
PLAIN = make_space(6)
VARIABLES = WeightVariables(SPACE, directions(SPACE))
ZERO = dict.fromkeys(VARIABLES.distributions, 0.0)
BUDGET = SPACE.nbytes([len(v.pairs) // 3 for v in SPACE.variables])
WORD = 16 // 8 * 2 * 64 // 8  # bytes by which banded layers differ


def test_zero_is_what_gradients_predict_and_measured_is_the_proxy() -> None:
    assert VARIABLES.encode((), "fisher") == ZERO
    assert VARIABLES.decode(ZERO, BUDGET) == affordable_point(SPACE, predicted_front(SPACE), BUDGET).choices  # type: ignore[union-attr]
    proxy = VARIABLES.encode((), "proxy")
    assert proxy == {**ZERO, MEASURED: 1.0}
    for losses, variable in zip(VARIABLES.losses(proxy), SPACE.variables, strict=True):
        banded = np.isfinite(losses)
        assert losses[banded] == pytest.approx(variable.features.sum(1)[banded])
    assert VARIABLES.encode((), "uniform") is None
    plain = WeightVariables(PLAIN, directions(PLAIN))
    assert not {MEASURED, COARSE} & set(plain.distributions)
    assert plain.encode((), "proxy") == dict.fromkeys(plain.distributions, 0.0)
    budget = PLAIN.nbytes([len(v.pairs) // 2 for v in PLAIN.variables])
    optimum = affordable_point(PLAIN, proxy_front(PLAIN), budget)
    assert plain.decode(dict.fromkeys(plain.distributions, 0.0), budget) == optimum.choices  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.7, 1.0, 1.3]))
def test_every_proposal_fits_and_spends_the_budget(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    for variables in (VARIABLES, WeightVariables(SPACE, single_layers(SPACE))):
        drawn = {
            name: float(rng.uniform(d.low, d.high))
            for name, d in variables.distributions.items()
            if isinstance(d, FloatDistribution)
        }
        assert set(drawn) == set(variables.distributions)
        choices = variables.decode(drawn, BUDGET * share)
        assert choices is not None
        assert BUDGET * share - WORD < SPACE.cost(choices) <= BUDGET * share
    assert VARIABLES.decode(ZERO, 1) is None


def test_more_weight_on_a_side_gives_it_more_bits() -> None:
    def key_bits(weight: float) -> float:
        choices = VARIABLES.decode({**ZERO, "keys over values": weight}, BUDGET)
        assert choices is not None
        return sum(spec.key.mean_bits - spec.value.mean_bits for spec in SPACE.setting(choices))

    bits = [key_bits(weight) for weight in (-0.5, 0.0, 0.5)]
    assert bits == sorted(bits)
    assert bits[0] < bits[2]
    same = VARIABLES.decode({**ZERO, "keys over values": 1e-9}, BUDGET)
    assert same == VARIABLES.decode(ZERO, BUDGET)


def test_directions_are_what_their_names_say() -> None:
    shapes = {d.name: d.shape for d in directions(SPACE)}
    assert all(shape.shape == (6, 2) for shape in shapes.values())
    assert np.array_equal(shapes["first layer"][:, 0], [1, 0, 0, 0, 0, 0])
    assert np.array_equal(shapes["last layer"][:, 1], [0, 0, 0, 0, 0, 1])
    slope, curve = shapes["keys by depth"][:, 0], shapes["keys at both ends"][:, 0]
    assert slope.sum() == pytest.approx(0)
    assert np.all(np.diff(slope) > 0)
    assert curve[0] == pytest.approx(curve[-1])
    assert curve[0] > curve[2]
    assert not shapes["keys by depth"][:, 1].any()
    usual = shapes["contrast"].mean(1)  # make_layer hurts 1, 10, 100 and so on again
    assert usual[2] > usual[1] > usual[0]


def test_a_side_in_16_bits_does_not_count_as_one_that_hardly_hurts() -> None:
    assert np.exp(usual_losses(np.array([[0.1, 0.0], [0.4, 0.3], [0.0, 0.3]]))) == pytest.approx([0.2, 0.3])
    assert np.isfinite(usual_losses(np.zeros((2, 2)))).all()


def test_pairs_are_named_as_in_the_space() -> None:
    pairs = PairVariables(PLAIN)
    choices = tuple(len(v.pairs) // 2 for v in PLAIN.variables)
    parameters = pairs.encode(choices, "uniform")
    assert parameters is not None
    assert list(parameters) == [v.name for v in PLAIN.variables]
    assert pairs.decode(parameters, 0) == choices


def test_each_sampler_has_variables() -> None:
    for row in SAMPLERS.values():
        assert variables_of(SPACE, row.over).distributions
