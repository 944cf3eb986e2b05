"""Each layer's loss with each storage class: errors of keys, values, attention scores and attention output.

One pass over the data, streamed: a layer's queries, keys and values are reduced to a few sums as they appear, so memory does not
grow with the number of sequences. Errors are measured at evenly spaced query positions of every sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres, as_stored
from kvtuner_search.calibration.candidates import TRANSFORMS, StorageClass, clips
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.stored import first_tokens
from kvtuner_search.models.attention import Attends, attends
from kvtuner_search.transforms import transform_of

QUERIES: Final = 64  # query positions a sequence
CLIP_TOKENS: Final = 2048  # tokens on which clips are chosen


@dataclass(frozen=True)
class PairError:
    """Errors of one layer with one pair of specs, against the 16-bit cache."""

    spec: LayerSpec
    e_k: float  # relative Frobenius error of the keys
    e_v: float  # relative Frobenius error of the values
    e_a: float  # mean total-variation distance of the attention probabilities, 0 to 1
    e_o: float  # relative Frobenius error of the attention output


@dataclass
class _Sums:
    key: Tensor  # [NK] squared errors
    value: Tensor  # [NV]
    scores: Tensor  # [NK] summed total-variation distances
    output: Tensor  # [NK, NV] squared errors; of banded specs only where the other side is raw
    key_norm: float = 0.0
    value_norm: float = 0.0
    output_norm: float = 0.0
    rows: int = 0  # attention rows


@dataclass
class Sensitivity:
    """Tap that measures every pair of variants in every layer, and banded specs with the other side at 16 bits.

    Args:
        classes: storage classes to measure, for keys and values alike; banded ones are left out.
        moments: query moments of every layer.
        centres: tensors that specs need (see transform_of), by layer.
        banded: banded specs of keys and of values to measure, by layer.
    """

    classes: Sequence[StorageClass]
    moments: Moments
    centres: Mapping[int, Centres]
    banded: Mapping[int, tuple[Sequence[TensorSpec], Sequence[TensorSpec]]] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    keys: dict[int, list[TensorSpec]] = field(default_factory=dict)
    values: dict[int, list[TensorSpec]] = field(default_factory=dict)
    sums: dict[int, _Sums] = field(default_factory=dict)

    def begin(self, valid: Tensor) -> None:
        """Announce a batch: ``valid`` [B, T] marks what is not padding (on the right)."""
        self.lengths = valid.sum(1).tolist()

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        centres = self.centres[layer]
        how = attends() or Attends(key.shape[-1] ** -0.5)
        if layer not in self.sums:
            self._choose_clips(layer, key, value, centres, how)
        for row, length in enumerate(self.lengths):
            self._measure(layer, query[row, :length], key[row, :length], value[row, :length], centres, how)
        return key, value

    def errors(self, layer: int) -> dict[tuple[TensorSpec, TensorSpec], PairError]:
        """Errors of every measured pair of one layer.

        Raises:
            DataError: if numbers are too large to be stored: a group's scale has 16 bits, and what is beyond comes back as no number.
        """
        sums = self.sums[layer]
        for name, squares in (("keys", sums.key), ("values", sums.value), ("attention", sums.output)):
            if not squares.isfinite().all():
                raise DataError(
                    f"{name} of layer {layer} cannot be measured: its keys or values are too large to be stored, though they are finite:"
                    " look for overflow in the weights, or give another checkpoint"
                )
        found = {}
        for i, key in enumerate(self.keys[layer]):
            for j, value in enumerate(self.values[layer]):
                if (key.banded and not value.raw) or (value.banded and not key.raw):
                    continue
                found[key, value] = PairError(
                    LayerSpec(key, value),
                    _relative(float(sums.key[i]), sums.key_norm),
                    _relative(float(sums.value[j]), sums.value_norm),
                    float(sums.scores[i]) / sums.rows,
                    _relative(float(sums.output[i, j]), sums.output_norm),
                )
        return found

    def _choose_clips(self, layer: int, key: Tensor, value: Tensor, centres: Centres, how: Attends) -> None:
        """Pick each variant's clip on the first tokens: by the error of q.k for keys, by the plain error for values."""
        k, v = (torch.cat([x[row, :n] for row, n in enumerate(self.lengths)])[:CLIP_TOKENS] for x in (key, value))
        weight = self.moments.layers[layer].query
        chosen: dict[str, list[TensorSpec]] = {"key": [RAW], "value": [RAW]}
        for side, x, centre in (("key", k, centres.key), ("value", v, centres.value)):
            for candidate in self.classes:
                if candidate.bits == 16 or candidate.banded:
                    continue
                for transform in (
                    TRANSFORMS[1:] if candidate.symmetric else TRANSFORMS
                ):  # a grid about zero wants a centre
                    options = [candidate.spec(transform, clip) for clip in clips(candidate.bits)]
                    if len(options) > 1:
                        options.sort(
                            key=lambda spec: (
                                _error(x, spec, centre, weight if side == "key" else None, how.plain),
                                spec,
                            )
                        )
                    chosen[side].append(options[0])
        banded = self.banded.get(layer, ((), ()))
        chosen["key"] += banded[0]
        chosen["value"] += banded[1]
        self.keys[layer], self.values[layer] = chosen["key"], chosen["value"]
        zero = torch.zeros(len(chosen["key"]), len(chosen["value"]), dtype=torch.float64, device=key.device)
        self.sums[layer] = _Sums(zero[:, 0].clone(), zero[0].clone(), zero[:, 0].clone(), zero)

    def _measure(self, layer: int, query: Tensor, key: Tensor, value: Tensor, centres: Centres, how: Attends) -> None:
        """Add one sequence: query [T, Hq, D], key and value [T, H, D]; each query reads what the layer lets it see, as the layer does."""
        sums = self.sums[layer]
        length, heads, head_dim = key.shape
        at = torch.linspace(0, length - 1, min(QUERIES, length), device=key.device).round().long()
        picked = query[at].float().reshape(len(at), heads, -1, head_dim) * how.scaling
        visible = how.visible(at, torch.arange(length, device=key.device))
        k, v = key.float(), value.float()
        first = first_tokens(k.unsqueeze(0))[0]
        stored_values = [
            as_stored(v, spec, transform_of(spec, centres.value, v.device), first=first) for spec in self.values[layer]
        ]
        plain = sum(not spec.banded for spec in self.values[layer])  # they come first, 16 bits before all
        sums.key_norm += float(k.square().sum(dtype=torch.float64))
        sums.value_norm += float(v.square().sum(dtype=torch.float64))
        sums.value += torch.stack([(stored - v).square().sum(dtype=torch.float64) for stored in stored_values])
        wide = torch.stack(stored_values, dim=2)  # [T, H, NV, D]
        exact_p = exact_o = None
        for i, spec in enumerate(self.keys[layer]):
            stored = as_stored(k, spec, transform_of(spec, centres.key, k.device), first=first)
            seen = len(stored_values) if spec.raw else 1 if spec.banded else plain
            p = how.weights(torch.einsum("nhgd,thd->hgnt", picked, stored), visible)
            output = torch.einsum("hgnt,thvd->hgnvd", p, wide[:, :, :seen])
            if exact_p is None or exact_o is None:  # the first spec of each side is raw
                exact_p, exact_o = p, output[..., :1, :]
                sums.output_norm += float(exact_o.square().sum(dtype=torch.float64))
                sums.rows += p[..., 0].numel()
            sums.key[i] += (stored - k).square().sum(dtype=torch.float64)
            sums.scores[i] += (p - exact_p).abs().sum(dtype=torch.float64) / 2
            sums.output[i, :seen] += (output - exact_o).square().sum((0, 1, 2, 4), dtype=torch.float64)


def _error(x: Tensor, spec: TensorSpec, centre: Tensor | None, weight: Tensor | None, plain: bool = True) -> float:
    """Squared error of x [N, H, D]; with ``weight`` [H, D, D] that of the products with queries of that second moment, read by a ``plain`` softmax or
    by one with a soft cap or sinks."""
    wrong = (as_stored(x.float(), spec, transform_of(spec, centre, x.device)) - x.float()).double()
    if weight is None:
        return float(wrong.square().sum())
    if plain:
        wrong = wrong - wrong.mean(0)  # an error that all keys share does not change the softmax
    return float(torch.einsum("nhd,hde,nhe->", wrong, weight, wrong))


def best_variants(
    errors: Mapping[tuple[TensorSpec, TensorSpec], PairError],
) -> tuple[dict[StorageClass, TensorSpec], dict[StorageClass, TensorSpec]]:
    """For each class of keys, and of values, the variant with the least error of the attention output, the other side at 16 bits.

    Banded specs are left out: gradients predict their loss better than this error.
    """
    best: tuple[dict[StorageClass, tuple[float, TensorSpec]], dict[StorageClass, tuple[float, TensorSpec]]] = ({}, {})
    for (key, value), error in errors.items():
        for side, spec, other in ((0, key, value), (1, value, key)):
            if other.raw and not spec.banded:
                found = (error.e_o, spec)
                best[side][StorageClass.of(spec)] = min(best[side].get(StorageClass.of(spec), found), found)
    return {name: spec for name, (_, spec) in best[0].items()}, {name: spec for name, (_, spec) in best[1].items()}


def _relative(squares: float, norm: float) -> float:
    """Root of the squared error over the squared stored values; 0 if these are all 0, as in a layer that does nothing."""
    return math.sqrt(squares / norm) if norm else 0.0
