"""Layer-alone losses: measured by running, or extrapolated where the error is tiny."""

from pathlib import Path

import pytest

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_search.calibration.alone import LayerAlone, side_losses
from kvtuner_search.data.types import Sample
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> LayerAlone:
    runner = Runner(load_model(ModelOptions(source=str(tiny_model), dtype="float32")))
    samples = [Sample("text", tuple(range(start, start + 40)), ((1, 40),), False) for start in (10, 500, 900)]
    return LayerAlone(Scorer(runner, [samples]), 0, {})


def test_it_is_the_loss_of_a_setting_with_one_stored_layer(alone: LayerAlone) -> None:
    spec = LayerSpec(TensorSpec(2, 16), TensorSpec(4, 16))
    for layer in (0, 3):
        setting = tuple(spec if index == layer else LayerSpec() for index in range(4))
        assert alone.loss(layer, spec) == pytest.approx(alone.scorer.score(setting, {}, 0).loss, rel=1e-6)
    assert alone.loss(1, LayerSpec()) == 0.0


def test_tiny_errors_are_extrapolated_by_their_square(alone: LayerAlone) -> None:
    fine, rough = TensorSpec(8, 16), TensorSpec(4, 16)
    sides = [[(RAW, 0.0), (fine, 0.005), (rough, 0.05)]] * 4
    keys, values = side_losses(alone, sides, sides, least_error=0.01)
    measured_keys, measured_values = side_losses(alone, sides, sides)
    for layer in range(4):
        for found, measured in ((keys[layer], measured_keys[layer]), (values[layer], measured_values[layer])):
            assert found[0] == measured[0] == 0.0
            assert found[2] == measured[2] > 0
            assert found[1] == pytest.approx(found[2] / 100)
            assert measured[1] not in (0.0, found[1])
    only_fine, _ = side_losses(alone, [[(RAW, 0.0), (fine, 0.005)]] * 4, [[]] * 4, least_error=0.01)
    assert only_fine[0][1] == measured_keys[0][1]  # with nothing to extrapolate from, it is run
