"""The values that all workers of a search share: the measured sensitivity, the chosen variants, the centring vectors and the bases."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.calibration.alone import LayerAlone, side_losses
from kvtuner_search.calibration.banded import MEASURED, banded_pairs, class_spec, predicted_loss
from kvtuner_search.calibration.basis import LayerWorth, SideWorth
from kvtuner_search.calibration.candidates import Pair, StorageClass
from kvtuner_search.calibration.record import Alone, HeadSides, LayerSensitivity, PairErrors, Sides
from kvtuner_search.calibration.sensitivity import PairError, Sensitivity, best_variants
from kvtuner_search.calibration.space import LayerOptions
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.scorer import Scorer

LEAST: Final = 1e-12  # nats: the ratio of two smaller losses counts as one


@dataclass(frozen=True)
class SearchPlan:
    """The outcome of the analysis that precedes the search."""

    fingerprint: str  # of everything that the search depends on
    options: tuple[LayerOptions, ...]  # by layer
    errors: tuple[tuple[PairError, ...], ...]  # by layer: every measured pair of variants
    centres: Mapping[int, Centres]  # by layer: bases, or centring vectors without bands (see transform_of)
    worth: tuple[LayerWorth, ...] = ()  # by layer; empty without bands

    def sensitivity(self) -> list[LayerSensitivity]:
        """What was measured, by layer; errors with six digits."""
        found = []
        for index, (layer, errors) in enumerate(zip(self.options, self.errors, strict=True)):
            worth = self.worth[index] if self.worth else None
            found.append(
                LayerSensitivity(
                    keys={str(name): Alone(str(spec), layer.key_loss[name]) for name, spec in layer.keys.items()},
                    values={str(name): Alone(str(spec), layer.value_loss[name]) for name, spec in layer.values.items()},
                    errors=[
                        PairErrors(str(e.spec), *(float(f"{x:.6g}") for x in (e.e_k, e.e_v, e.e_a, e.e_o)))
                        for e in errors
                    ],
                    worth=Sides(keys=list(worth.keys.bands), values=list(worth.values.bands)) if worth else None,
                    worth_by_head=HeadSides(
                        keys=[list(row) for row in worth.keys.by_head],
                        values=[list(row) for row in worth.values.by_head],
                    )
                    if worth
                    else None,
                )
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers read back exactly, errors with six digits."""
        layers = [layer.model_dump(mode="json") for layer in self.sensitivity()]
        for index, layer in enumerate(layers):
            layer["centres"] = [_encode(self.centres[index].key), _encode(self.centres[index].value)]
        return {"fingerprint": self.fingerprint, "layers": layers}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], kv_heads: int, head_dim: int) -> Self:
        """The inverse of to_json."""
        options, errors, centres, worth = [], [], {}, []
        for index, layer in enumerate(content["layers"]):
            rows = tuple(PairError(LayerSpec.parse(row[0]), *row[1:]) for row in layer["errors"])
            keys, key_loss = _sides(layer["keys"])
            values, value_loss = _sides(layer["values"])
            if "worth" in layer:
                heads = layer["worth_by_head"]
                worth.append(LayerWorth(*(SideWorth(tuple(map(tuple, heads[side]))) for side in ("keys", "values"))))
            options.append(
                layer_options(
                    keys, values, key_loss, value_loss, rows, head_dim, worth[index] if "worth" in layer else None
                )
            )
            errors.append(rows)
            centres[index] = Centres(*(_decode(text, kv_heads, head_dim) for text in layer["centres"]))
        return cls(content["fingerprint"], tuple(options), tuple(errors), centres, tuple(worth))


def layer_options(
    keys: Mapping[StorageClass, TensorSpec],
    values: Mapping[StorageClass, TensorSpec],
    key_loss: Mapping[StorageClass, float],
    value_loss: Mapping[StorageClass, float],
    errors: Sequence[PairError],
    head_dim: int,
    worth: LayerWorth | None = None,
) -> LayerOptions:
    """Look up the output error of every pair of chosen variants, and predict the losses of banded pairs.

    Args:
        keys, values: chosen spec of each class; of banded classes, those with a measured loss.
        key_loss, value_loss: layer-alone loss of each.
        errors: of every measured pair.
        head_dim: channels of a head.
        worth: of the layer's bands; None without bands.
    """
    by_spec = {(error.spec.key, error.spec.value): error.e_o for error in errors}
    pair_error: dict[Pair, float] = {
        (k, v): by_spec[key, value]
        for k, key in keys.items()
        for v, value in values.items()
        if not (k.banded or v.banded)
    }
    banded = {}
    if worth is not None:
        ratios = [
            {
                name.total: max(loss[name], LEAST) / max(predicted_loss(spec.bands, side.bands), LEAST)
                for name, spec in specs.items()
                if name.banded
            }
            for specs, loss, side in ((keys, key_loss, worth.keys), (values, value_loss, worth.values))
        ]
        banded = banded_pairs(worth, ratios[0], ratios[1], head_dim)
    return LayerOptions(keys, values, key_loss, value_loss, pair_error, banded)


def make_plan(
    fingerprint: str,
    scorer: Scorer,
    moments: Moments,
    classes: Sequence[StorageClass],
    *,
    tiers: int,
    least_error: float,
    stage: Callable[[str, int], AbstractContextManager[Callable[..., None]]],
    fitted: tuple[Mapping[int, Centres], Sequence[LayerWorth]] | None = None,
) -> SearchPlan:
    """Measure the errors of every pair on the first ``tiers`` tiers, then the layer-alone losses on the first.

    Args:
        fingerprint: see SearchPlan.
        scorer: search split.
        moments: gathered while the scorer was made.
        classes: storage classes of keys and values.
        tiers: how many tiers the errors are measured on.
        least_error: see side_losses.
        stage: opens a progress stage and yields the function that advances it (see Reporter.stage).
        fitted: bases and the worth of bands (see fit_bases); None leaves bands out. With bands and a ``least_error``, only one other class per
            bit-width is run.
    """
    centres = moments.centres() if fitted is None else fitted[0]
    layers = len(scorer.runner.layers)
    banded: list[tuple[dict[StorageClass, TensorSpec], dict[StorageClass, TensorSpec]]] = [({}, {})] * layers
    if fitted is not None:
        measured = [StorageClass(0, total=total) for total in MEASURED]
        banded = [
            (
                {c: class_spec(c, worth.keys.bands) for c in measured},
                {c: class_spec(c, worth.values.bands) for c in measured},
            )
            for worth in fitted[1]
        ]
    sensitivity = Sensitivity(
        classes, moments, centres, {i: (list(k.values()), list(v.values())) for i, (k, v) in enumerate(banded)}
    )
    tokens = sum(batch.numel() for tier in range(tiers) for batch in scorer.token_batches(tier))
    with stage("sensitivity of each layer", tokens) as advance:
        scorer.observe(sensitivity, tiers, advance)
    errors = [sensitivity.errors(layer) for layer in range(layers)]
    best = [best_variants(table) for table in errors]
    alone = LayerAlone(scorer, 0, centres)
    rounds = [(best, least_error, fitted is not None and least_error > 0)]
    if fitted is not None:
        rounds.append((banded, 0.0, False))
    losses: list[list[dict[StorageClass, float]]] = [[{}, {}] for _ in range(layers)]
    with stage("each layer alone", sum(len(s) for specs, _, _ in rounds for layer in specs for s in layer)) as advance:
        for specs, least, one_a_width in rounds:
            keys = [[(s, e[s, RAW].e_o) for s in k.values()] for (k, _), e in zip(specs, errors, strict=True)]
            values = [[(s, e[RAW, s].e_o) for s in v.values()] for (_, v), e in zip(specs, errors, strict=True)]
            found = side_losses(alone, keys, values, least, advance, one_a_width=one_a_width)
            for layer, sides in enumerate(specs):
                for side, names in enumerate(sides):
                    losses[layer][side].update(zip(names, found[side][layer], strict=True))
    options = [
        layer_options(
            best[layer][0] | banded[layer][0],
            best[layer][1] | banded[layer][1],
            losses[layer][0],
            losses[layer][1],
            list(errors[layer].values()),
            _head_dim(centres[layer]),
            fitted[1][layer] if fitted is not None else None,
        )
        for layer in range(layers)
    ]
    worth = tuple(fitted[1]) if fitted is not None else ()
    return SearchPlan(fingerprint, tuple(options), tuple(tuple(table.values()) for table in errors), centres, worth)


def _sides(rows: Mapping[str, Sequence[Any]]) -> tuple[dict[StorageClass, TensorSpec], dict[StorageClass, float]]:
    specs = {StorageClass.parse(name): TensorSpec.parse(row[0]) for name, row in rows.items()}
    return specs, {StorageClass.parse(name): float(row[1]) for name, row in rows.items()}


def _head_dim(transforms: Centres) -> int:
    assert transforms.key is not None, "moments and fits give both sides"
    return transforms.key.shape[-1]


def _encode(transform: torch.Tensor | None) -> str:
    assert transform is not None, "moments and fits give both sides"
    return base64.b64encode(transform.cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str, kv_heads: int, head_dim: int) -> torch.Tensor:
    """A centring vector [H, D] or a basis [H, D + 2, D]."""
    found = torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
    return (
        found.view(kv_heads, head_dim) if found.numel() == kv_heads * head_dim else found.view(kv_heads, -1, head_dim)
    )
