"""What all workers of a search must agree on: the measured sensitivity, the chosen variants, and the centring vectors."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.calibration.alone import LayerAlone, side_losses
from kvtuner_search.calibration.candidates import Pair, StorageClass
from kvtuner_search.calibration.sensitivity import PairError, Sensitivity, best_variants
from kvtuner_search.calibration.space import LayerOptions
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.scorer import Scorer


@dataclass(frozen=True)
class Plan:
    """The outcome of the analysis that precedes the search."""

    fingerprint: str  # of everything that the search depends on
    options: tuple[LayerOptions, ...]  # by layer
    errors: tuple[tuple[PairError, ...], ...]  # by layer: every measured pair of variants
    centres: Mapping[int, Centres]  # by layer

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers read back exactly, errors with six digits."""
        return {
            "fingerprint": self.fingerprint,
            "layers": [
                {
                    "keys": {str(name): [str(spec), layer.key_loss[name]] for name, spec in layer.keys.items()},
                    "values": {str(name): [str(spec), layer.value_loss[name]] for name, spec in layer.values.items()},
                    "errors": [
                        [str(e.spec), *(float(f"{x:.6g}") for x in (e.e_k, e.e_v, e.e_a, e.e_o))] for e in errors
                    ],
                    "centres": [_encode(self.centres[index].key), _encode(self.centres[index].value)],
                }
                for index, (layer, errors) in enumerate(zip(self.options, self.errors, strict=True))
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], kv_heads: int) -> Self:
        """The inverse of to_json."""
        options, errors, centres = [], [], {}
        for index, layer in enumerate(content["layers"]):
            rows = tuple(PairError(LayerSpec.parse(row[0]), *row[1:]) for row in layer["errors"])
            keys, key_loss = _sides(layer["keys"])
            values, value_loss = _sides(layer["values"])
            options.append(layer_options(keys, values, key_loss, value_loss, rows))
            errors.append(rows)
            centres[index] = Centres(*(_decode(text, kv_heads) for text in layer["centres"]))
        return cls(content["fingerprint"], tuple(options), tuple(errors), centres)


def layer_options(
    keys: Mapping[StorageClass, TensorSpec],
    values: Mapping[StorageClass, TensorSpec],
    key_loss: Mapping[StorageClass, float],
    value_loss: Mapping[StorageClass, float],
    errors: Sequence[PairError],
) -> LayerOptions:
    """Look up the output error of every pair of chosen variants."""
    by_spec = {(error.spec.key, error.spec.value): error.e_o for error in errors}
    pair_error: dict[Pair, float] = {
        (k, v): by_spec[key, value] for k, key in keys.items() for v, value in values.items()
    }
    return LayerOptions(keys, values, key_loss, value_loss, pair_error)


def make_plan(
    fingerprint: str,
    scorer: Scorer,
    moments: Moments,
    classes: Sequence[StorageClass],
    *,
    tiers: int,
    least_error: float,
    stage: Callable[[str, int], AbstractContextManager[Callable[..., None]]],
) -> Plan:
    """Measure the errors of every pair on the first ``tiers`` tiers, then the layer-alone losses on the first.

    Args:
        fingerprint: see Plan.
        scorer: search split.
        moments: gathered while the scorer was made.
        classes: storage classes of keys and values.
        tiers: how many tiers the errors are measured on.
        least_error: see side_losses.
        stage: opens a stage of so many units and yields what advances it (see Reporter.stage).
    """
    sensitivity = Sensitivity(classes, moments)
    tokens = sum(batch.numel() for tier in range(tiers) for batch in scorer.token_batches(tier))
    with stage("sensitivity of each layer", tokens) as advance:
        scorer.observe(sensitivity, tiers, advance)
    layers = len(scorer.runner.layers)
    errors = [sensitivity.errors(layer) for layer in range(layers)]
    best = [best_variants(table) for table in errors]
    centres = moments.centres()
    keys = [[(s, e[s, RAW].e_o) for s in k.values()] for (k, _), e in zip(best, errors, strict=True)]
    values = [[(s, e[RAW, s].e_o) for s in v.values()] for (_, v), e in zip(best, errors, strict=True)]
    with stage("each layer alone", sum(map(len, keys + values))) as advance:
        losses = side_losses(LayerAlone(scorer, 0, centres), keys, values, least_error, advance)
    options = [
        layer_options(
            key_specs,
            value_specs,
            dict(zip(key_specs, key_loss, strict=True)),
            dict(zip(value_specs, value_loss, strict=True)),
            list(table.values()),
        )
        for (key_specs, value_specs), key_loss, value_loss, table in zip(best, *losses, errors, strict=True)
    ]
    return Plan(fingerprint, tuple(options), tuple(tuple(table.values()) for table in errors), centres)


def _sides(rows: Mapping[str, Sequence[Any]]) -> tuple[dict[StorageClass, TensorSpec], dict[StorageClass, float]]:
    specs = {StorageClass.parse(name): TensorSpec.parse(row[0]) for name, row in rows.items()}
    return specs, {StorageClass.parse(name): float(row[1]) for name, row in rows.items()}


def _encode(centre: torch.Tensor | None) -> str:
    assert centre is not None, "moments give both centres"
    return base64.b64encode(centre.cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str, kv_heads: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(kv_heads, -1).copy())
